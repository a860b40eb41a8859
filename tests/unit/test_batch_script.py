"""Batch scripts: what bash makes of them is what was meant, and sbatch gets its options whole."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llara_dist.cluster import batch_script
from llara_dist.cluster.batch_script import (
    INDEX,
    JobDescription,
    Resources,
    array_indices,
    array_variants,
    sbatch_options,
    script_text,
)
from llara_dist.cluster.site import Site
from llara_dist.errors import InputError

# What a word of a command may hold: anything but zero bytes and line breaks.
WORDS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), max_size=20), max_size=5)
AWKWARD = "a b'\"$(touch x)`y`\\%j*"


def job(folder: Path, *command: str, array: str = "", **resources: object) -> JobDescription:
    asked = Resources(**resources)  # pyright: ignore[reportArgumentType]
    return JobDescription("run", command or ("train",), folder, folder, asked, array)


def in_bash(text: str, folder: Path, **variables: str) -> tuple[list[str], dict[str, str]]:
    """What the interpreter is started with, and where and with what variables, when bash runs a script."""
    script = folder / "script"
    script.write_bytes(os.fsencode(text))
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, check=True)
    seen = json.loads(done.stdout)
    return seen["arguments"], seen["variables"]


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program in the interpreter's place that prints its arguments, folder and variables."""
    path = tmp_path / "bin of 'mine'" / "python"
    path.parent.mkdir()
    code = (
        "import json, os, sys; "
        "print(json.dumps({'arguments': sys.argv[1:], 'variables': dict(os.environ, CWD=os.getcwd())}))"
    )
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setattr(batch_script.sys, "executable", str(path))
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS)
def test_every_word_arrives_unchanged(words: list[str], fake_python: Path, tmp_path: Path) -> None:
    text = script_text(job(tmp_path, "train", *words), Site())
    got, _ = in_bash(text, tmp_path)
    assert got == ["-m", "llara_dist.cluster.in_job", "train", *words]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS)
def test_an_array_replaces_the_index_and_nothing_else(words: list[str], fake_python: Path, tmp_path: Path) -> None:
    indexed = [f"{INDEX}{word}{INDEX}" for word in words]
    text = script_text(job(tmp_path, "train", *words, *indexed, array="0-7"), Site())
    got, _ = in_bash(text, tmp_path, SLURM_ARRAY_TASK_ID="7")
    replaced = [word.replace(INDEX, "7") for word in (*words, *indexed)]
    assert got == ["-m", "llara_dist.cluster.in_job", "train", *replaced]


def test_awkward_folders_are_entered_and_named(fake_python: Path, tmp_path: Path) -> None:
    folder = tmp_path / AWKWARD
    folder.mkdir()
    description = JobDescription("x", ("train",), folder, folder, source=folder)
    text = script_text(description, Site())
    _, seen = in_bash(text, tmp_path, PYTHONPATH="/before")
    assert seen["CWD"] == str(folder)
    assert seen["LLARA_DIST_SITE"] == str(folder / "site.yaml")
    assert seen["PYTHONPATH"] == f"{folder}:/before"
    assert not (tmp_path / "x").exists()


def test_options_that_a_plain_line_cannot_hold_are_comments(tmp_path: Path) -> None:
    site = Site(sbatch=("--comment=a b", "--exclusive"), partition="gpu")
    lines = script_text(job(tmp_path / AWKWARD), site).splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--exclusive" in directives
    assert "--partition=gpu" in directives
    (comment,) = [line for line in lines if line.startswith("# '--chdir=")]
    given = shlex.split(comment[2:])
    assert sorted([*directives, *given]) == sorted(sbatch_options(job(tmp_path / AWKWARD), site))


def test_resources_become_options(tmp_path: Path) -> None:
    description = job(
        tmp_path,
        nodes="2-4",
        gpus_per_node=8,
        cpus_per_task=12,
        mem="900G",
        time="1-12:00:00",
        partition="big",
        qos="q",
    )
    options = sbatch_options(description, Site(partition="small", account="mine"))
    expected = ["--nodes=2-4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=900G"]
    expected += ["--time=1-12:00:00", "--partition=big", "--qos=q", "--account=mine", "--signal=B:USR1@300"]
    assert set(expected) <= set(options)
    sites = sbatch_options(description, Site(sbatch=("--time=9:00", "--exclusive")))
    assert sites.index("--time=9:00") < sites.index("--time=1-12:00:00")  # the last one holds
    assert "--exclusive" in sites
    assert "--gres=gpu:8" in sbatch_options(description, Site(gpus="gres"))
    assert not [option for option in sbatch_options(description, Site(gpus="none")) if "gpu" in option]


def test_only_runs_are_signalled_and_fill_their_nodes(tmp_path: Path) -> None:
    options = sbatch_options(job(tmp_path, "prepare", gpus_per_node=4), Site())
    assert "--ntasks-per-node=1" in options
    assert not [option for option in options if option.startswith("--signal")]
    with pytest.raises(InputError, match="nodes=2: `llara-dist prepare` is one process"):
        job(tmp_path, "prepare", nodes="2")


def test_output_keeps_percent_signs_and_backslashes(tmp_path: Path) -> None:
    assert f"--output={tmp_path}/5%%j/slurm-%j.out" in sbatch_options(job(tmp_path / "5%j"), Site())
    assert f"--output={tmp_path}/5%j\\\\n/slurm.out" in sbatch_options(job(tmp_path / "5%j\\n"), Site())
    assert f"--output={tmp_path}/slurm-%A_%a.out" in sbatch_options(job(tmp_path, array="0-3"), Site())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": "0"}, "nodes=0"),
        ({"nodes": "4-2"}, "ends before it begins"),
        ({"nodes": "two"}, "nodes=two"),
        ({"gpus_per_node": -1}, "gpus_per_node=-1"),
        ({"time": "12h"}, "time=12h"),
    ],
)
def test_bad_resources_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Resources(**values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("word", ["a\n#SBATCH --partition=x", "a\0b", os.fsdecode(b"a\xff")])
def test_what_no_script_can_say_is_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one line of UTF-8 without zero bytes"):
        job(tmp_path, "train", "--out", word)


def test_line_breaks_in_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a line break"):
        script_text(job(tmp_path), Site(sbatch=("--comment=a\nrm",)))


@pytest.mark.parametrize(
    ("text", "indices"),
    [("0-4", [0, 1, 2, 3, 4]), ("7", [7]), ("1,3,5-9:2%2", [1, 3, 5, 7, 9]), ("0-99%4", [*range(100)])],
)
def test_array_indices(text: str, indices: list[int]) -> None:
    assert array_indices(text) == indices


@pytest.mark.parametrize("text", ["", "a", "0-", "4-2", "1,1", "0-4%", "0-4%x", "0-4:0"])
def test_bad_array_indices(text: str) -> None:
    with pytest.raises(InputError, match="--array"):
        array_indices(text)


def test_array_variants_replace_the_index() -> None:
    words = ["--array", "3-4", "--seed={index}", "--out", "runs/{index}"]
    assert array_variants(words) == {
        "3": ["--array", "3-4", "--seed=3", "--out", "runs/3"],
        "4": ["--array", "3-4", "--seed=4", "--out", "runs/4"],
    }
    assert array_variants(["--out", "runs/{index}"]) == {}
