"""Pipelines: what a file may say, which steps are still to do, and how their jobs wait for each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llara_dist import cli
from llara_dist.cluster.pipeline import pipeline_submissions, steps_due
from llara_dist.cluster.pipeline_file import parse_pipeline, read_pipeline
from llara_dist.errors import InputError
from tests.runs import ROOT
from tests.unit.fake_slurm import FakeSlurm

EXAMPLE = ROOT / "launch" / "pipelines" / "synthetic.yaml"
ALL = ["prepare", "recommender", "shards", "merge", "train", "evaluate", "report"]


def touch(path: Path, text: str = "{}") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def finish(out: Path, *steps: str) -> None:
    """Put the marks of finished steps in place."""
    marks = {
        "prepare": "data/dataset.json",
        "recommender": "recommender/recommender.json",
        "merge": "shards/shards.json",
        "evaluate": "run/evaluation/test-hybrid/metrics.json",
        "report": "report.html",
    }
    for step in steps:
        if step == "train":
            touch(out / "run/checkpoints/step-00000002/complete.json")
            touch(out / "run/checkpoints/step-00000002/state.json", '{"step": 2, "total_steps": 2}')
        elif step == "shards":
            for part in (1, 2):
                touch(out / f"shards.parts/{part:05d}-of-00002/part.json")
        else:
            touch(out / marks[step])


def test_the_example_becomes_jobs_that_wait_for_each_other(tmp_path: Path) -> None:
    submissions = pipeline_submissions(EXAMPLE, tmp_path / "out", check=True)
    assert [submission.step for submission in submissions] == ALL
    after = {submission.step: submission.job.after for submission in submissions}
    assert after["shards"] == ("prepare",)
    assert after["train"] == ("recommender", "merge")
    assert after["report"] == ("evaluate",)
    jobs = {submission.step: submission.job for submission in submissions}
    assert jobs["shards"].array == "1-2"
    assert "--part={index}/2" in jobs["shards"].command
    assert len({job.folder for job in jobs.values()}) == 7
    assert not (tmp_path / "out").exists()


def test_the_report_shows_the_split_that_is_evaluated(tmp_path: Path) -> None:
    steps = yaml.safe_load(EXAMPLE.read_text())
    steps["steps"]["evaluate"]["options"]["split"] = "val"
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(steps))
    jobs = {submission.step: submission.job for submission in pipeline_submissions(path, tmp_path / "out", check=True)}
    assert "--split=val" in jobs["report"].command
    steps["steps"]["report"] = {"options": {"split": "test"}}
    path.write_text(yaml.safe_dump(steps))
    with pytest.raises(InputError, match=r"steps.report.options.split: test, but steps.evaluate does val"):
        pipeline_submissions(path, tmp_path / "out", check=True)


def test_jobs_depend_on_the_ids_of_those_before(slurm: FakeSlurm, tmp_path: Path) -> None:
    cli.run_command("submit", ["--pipeline", str(EXAMPLE), "--out", str(tmp_path / "out"), "--check", "false"])
    queued = [call["arguments"] for call in slurm.calls("sbatch") if "--test-only" not in call["arguments"]]
    dependencies = [[word for word in words if word.startswith("--dependency")] for words in queued]
    expected = ["101", "101", "103", "102:104", "105", "106"]
    assert dependencies == [[], *([f"--dependency=afterok:{ids}"] for ids in expected)]
    assert all("--kill-on-invalid-dep=yes" in words for words in queued[1:])
    record = json.loads((tmp_path / "out/jobs/5/job.json").read_text())
    assert (record["step"], record["job_id"], record["runs"]) == ("train", "105", {"": "run"})


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def test_when_one_job_is_refused_those_before_are_cancelled(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.refuse_from(3)
    with pytest.raises(InputError, match="sbatch: error: too many jobs"):
        cli.run_command("submit", ["--pipeline", str(EXAMPLE), "--out", str(tmp_path / "out"), "--check", "false"])
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["101", "102"]]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("finished", "due"),
    [
        ((), ALL),
        (("prepare",), ALL[1:]),
        (("prepare", "recommender", "shards"), ALL[3:]),
        (("prepare", "recommender", "merge"), ALL[4:]),
        (("prepare", "merge", "recommender", "train", "evaluate"), ["report"]),
        # What is evaluated is not the run that is to be trained to its end.
        (("prepare", "merge", "recommender", "evaluate", "report"), ["train", "evaluate", "report"]),
        (ALL, []),
    ],
)
def test_what_is_done_is_left_out_and_what_waits_for_the_rest_is_not(
    finished: tuple[str, ...], due: list[str], tmp_path: Path
) -> None:
    finish(tmp_path, *finished)
    assert steps_due(read_pipeline(EXAMPLE), tmp_path) == due


def test_an_artifact_whose_input_is_made_anew_is_refused(tmp_path: Path) -> None:
    finish(tmp_path, "recommender")
    with pytest.raises(InputError, match=r"steps.recommender: .*/recommender was made from what prepare is to make"):
        steps_due(read_pipeline(EXAMPLE), tmp_path)


def test_a_finished_step_with_other_options_is_refused(slurm: FakeSlurm, tmp_path: Path) -> None:
    file, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    values = yaml.safe_load(EXAMPLE.read_text())
    file.write_text(yaml.safe_dump(values))
    cli.run_command("submit", ["--pipeline", str(file), "--out", str(out), "--check", "false"])
    finish(out, "prepare", "recommender")
    assert [s.step for s in pipeline_submissions(file, out, check=False)] == ALL[2:]
    values["steps"]["recommender"]["options"]["epochs"] = 13
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=r"pipeline\.yaml: steps\.recommender: done with other options already"):
        pipeline_submissions(file, out, check=False)


def test_given_artifacts_take_the_place_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    given = {"data": "my/data", "shards": "my/shards", "recommender": "my/rec"}
    train = {"gpus_per_node": 1, "options": {"model.path": "llm"}}
    file.write_text(yaml.safe_dump({"given": given, "steps": {"train": train, "evaluate": {}, "report": {}}}))
    submissions = pipeline_submissions(file, tmp_path / "out", check=False)
    assert [submission.step for submission in submissions] == ["train", "evaluate", "report"]
    assert submissions[0].job.after == ()
    settings = yaml.safe_load(submissions[0].files["run.yaml"])
    assert (settings["data"]["shards"], settings["recommender"]["path"]) == ("my/shards", "my/rec")
    assert "--data=my/data" in submissions[2].job.command


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": {"train": {}}}, "steps.train: nothing makes its input; add the step recommender, or give given.rec"),
        ({"steps": {"trian": {}}}, "unknown field 'trian' in steps; known are prepare, recommender"),
        ({"steps": {"prepare": {"time": 3600}}}, "steps.prepare.time must be text, found 3600; put it in quotes"),
        ({"steps": {"prepare": {"parts": 3}}}, "unknown field 'parts' in steps.prepare"),
        ({"steps": {"prepare": {}}, "given": {"data": "x"}}, "steps.prepare: its artifact is given"),
        ({"steps": {"prepare": {"options": ["x"]}}}, "steps.prepare.options must be a mapping"),
        ({"steps": {"prepare": {"gpus_per_node": "8"}}}, "steps.prepare.gpus_per_node must be a whole number"),
        ({"resources": {"node": 2}, "steps": {"prepare": {}}}, "unknown field 'node' in resources"),
        ({"given": {}}, "steps must be a mapping"),
        ([], "the file must be a mapping"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(values: object, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_pipeline(values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        ("evaluate", {"splitt": "test"}, "splitt"),
        ("recommender", {"epochs": "many"}, "epochs"),
        ("train", {"lora.ranks": 3}, "ranks"),
        ("prepare", {"out": "x"}, "steps.prepare.options.out: the pipeline sets it"),
    ],
)
def test_options_are_parsed_before_anything_is_queued(
    step: str, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    values = yaml.safe_load(EXAMPLE.read_text())
    values["steps"][step]["options"] |= options
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        pipeline_submissions(file, tmp_path / "out", check=True)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [("--seed", "3"), ("--nodes", "2"), ("--array", "0-1"), ("--signal_s", "60")])
def test_settings_beside_a_pipeline_are_refused(options: tuple[str, str], slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="settings and resources belong to its steps"):
        cli.run_command("submit", ["--pipeline", str(EXAMPLE), "--out", str(tmp_path), *options])
