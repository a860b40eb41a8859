"""What a launch over ssh decides, and the process on each host, here without ssh."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llara_dist.cli import main
from llara_dist.cluster.connections import SSH_FAILED
from llara_dist.cluster.node import MARK, NodeFacts, NodeTask, code_hash, describe, exit_code
from llara_dist.cluster.ssh_launch import (
    carried,
    checked,
    interface_of,
    launch,
    master_address,
    node_command,
    outcome,
    rank_command,
)
from llara_dist.errors import InputError, RankLostError, RequeueError, RunFailedError
from tests.runs import ROOT

ODD = "a b'\"$(echo x)`echo y`\\ \n* é"
FACTS = NodeFacts("3.11.2", "abc", {"torch": "2.13.0"}, "10.0.0.1", {"10.0.0.1": "eth0", "10.9.0.1": "ib0"}, 20001)


def test_variables_that_travel() -> None:
    environment = {"NCCL_DEBUG": "INFO", "HF_HOME": ODD, "PYTHONPATH": "x", "MY_FLAG": ODD}
    environment |= {"CUDA_VISIBLE_DEVICES": "1", "SECRET": "s", "RANK": "3", "SLURM_JOB_ID": "7"}
    found = carried(environment, " MY_FLAG,")
    assert {name: found[name] for name in ("NCCL_DEBUG", "HF_HOME", "MY_FLAG")} == {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": ODD,
        "MY_FLAG": ODD,
    }
    assert not {"CUDA_VISIBLE_DEVICES", "SECRET", "RANK", "SLURM_JOB_ID"} & set(found)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), os.path.abspath("x")]
    with pytest.raises(InputError, match="--env OTHER: not set here"):
        carried(environment, "OTHER")


def test_hosts_must_run_the_same() -> None:
    assert checked({"a": FACTS, "b": replace(FACTS, port=7)}, FACTS) == {"a": FACTS, "b": replace(FACTS, port=7)}
    other = replace(FACTS, python="3.12.1", code="abd", versions={"torch": None})
    with pytest.raises(InputError) as raised:
        checked({"a": FACTS, "b": other, "c": "not reached: no route"}, FACTS)
    assert str(raised.value) == (
        "b: Python 3.12.1, here 3.11.2, other code of llara_dist than here, torch missing, here 2.13.0; all hosts must "
        "run the same; nothing was started (trouble also with c)"
    )


def test_the_hash_of_the_code_sees_names_and_bytes(tmp_path: Path) -> None:
    hashes = set()
    for name, text in (("a.py", "1"), ("b.py", "1"), ("b.py", "2")):
        (tmp_path / name).write_text(text)
        hashes.add(code_hash(tmp_path))
    (tmp_path / "notes.txt").write_text("no code")
    assert len(hashes | {code_hash(tmp_path)}) == 3


@pytest.mark.parametrize(
    ("facts", "alone", "address"),
    [
        (FACTS, False, "10.0.0.1"),
        (FACTS, True, "127.0.0.1"),
        (replace(FACTS, address="127.0.1.1"), False, "10.0.0.1"),
        (replace(FACTS, address="::1"), False, "10.0.0.1"),
        (replace(FACTS, address="127.0.1.1", addresses={}), False, ""),
    ],
)
def test_the_address_of_rank_0(facts: NodeFacts, alone: bool, address: str) -> None:
    assert master_address(facts, alone) == address


def test_the_interface_is_the_one_that_ssh_came_through() -> None:
    assert interface_of(replace(FACTS, address="10.9.0.1")) == {"GLOO_SOCKET_IFNAME": "ib0"}
    assert interface_of(replace(FACTS, address="127.0.1.1")) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface_of(replace(FACTS, addresses={})) == {}


@pytest.mark.parametrize(
    ("codes", "kind", "said"),
    [
        ({"a": 0, "b": 0}, type(None), ""),
        ({"a": 70, "b": 2}, InputError, "b: bad input"),
        ({"a": 70, "b": 1}, RunFailedError, "b: the run failed"),
        ({"a": 70, "b": SSH_FAILED, "c": SSH_FAILED}, RankLostError, "b, c: lost, .* --exclude b@c"),
        ({"a": 75, "b": 70}, RankLostError, "b: a rank was lost"),
        ({"a": 75, "b": 0}, RequeueError, "start again"),
    ],
)
def test_what_explains_the_end_comes_first(codes: dict[str, int], kind: type, said: str) -> None:
    ended = outcome(codes)
    assert type(ended) is kind
    if ended is not None:
        assert re.search(said, str(ended))


@pytest.mark.parametrize(
    ("code", "stopped", "expected"),
    [
        *((code, False, code) for code in (0, 1, 2, 70, 75)),
        (256 - signal.SIGKILL, True, 70),  # what `sys.exit(-9)` of DeepSpeed's launcher becomes
        (-signal.SIGKILL, False, 70),
        (255, False, 70),
        (256 - signal.SIGTERM, True, 75),
        (256 - signal.SIGTERM, False, 70),
    ],
)
def test_exit_codes_of_a_host(code: int, stopped: bool, expected: int) -> None:
    assert exit_code(code, stopped) == expected


def test_deepspeed_is_told_hosts_slots_and_arguments() -> None:
    command = rank_command({"a": (0, 2), "b": (1, 3)}, 1, "10.0.0.1", 20001, ["train", "--out", ODD])
    place = command.index("deepspeed.launcher.launch")
    world = json.loads(base64.urlsafe_b64decode(command[place + 1].removeprefix("--world_info=")))
    assert world == {"a": [0, 2], "b": [1, 3]}
    assert command[place + 2] == "--node_rank=1"
    assert command[-4:] == ["llara_dist.cli", "train", "--out", ODD]


def test_bad_options(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\n")
    with pytest.raises(InputError, match="say what to run"):
        launch(hosts, [])
    with pytest.raises(InputError, match="--alive_s 0"):
        launch(hosts, ["train"], alive_s=0)
    with pytest.raises(InputError, match=r"--ssh -i 'x: No closing quotation"):
        launch(hosts, ["train"], ssh="-i 'x")


def test_the_command_line_hands_on_what_follows_the_command_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}

    @functools.wraps(launch)
    def record(**options: object) -> None:
        given.update(options)

    monkeypatch.setattr("llara_dist.cluster.ssh_launch.launch", record)
    options = ["--hostfile", "hosts", "--num-nodes", "2", "--ssh", "-p 2222"]
    main(["launch", *options, "train", "--out", "train", "--model.path", "--odd", "--include", "x"])
    assert given["arguments"] == ["train", "--out", "train", "--model.path", "--odd", "--include", "x"]
    assert (given["hostfile"], given["num_nodes"], given["ssh"], given["include"]) == (Path("hosts"), 2, "-p 2222", "")


PRINT = """
import json, os, sys, time
print(json.dumps([sys.argv[1:], os.environ["FLAG"]]), flush=True)
"""
WAIT = (
    "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(75)))\n"
    + PRINT
    + "time.sleep(1000)"
)
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
"""Stands for DeepSpeed's launcher: the ranks are its children."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of a host, started by a shell as sshd does, once it has described the host."""
    folder = tmp_path / "a b'$(x)"
    folder.mkdir()
    process = subprocess.Popen(
        ["sh", "-c", node_command(str(folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(MARK), process.communicate()
    found = NodeFacts(**json.loads(line.removeprefix(MARK)))
    assert replace(found, port=0) == replace(describe(), port=0, address=found.address)
    yield process
    process.kill()
    process.wait()


def tell(node: subprocess.Popen[str], lines: str | None) -> None:
    """Send lines to the process of a host, or end its input."""
    assert node.stdin is not None
    if lines is None:
        node.stdin.close()
    else:
        node.stdin.write(lines)
        node.stdin.flush()


def heard(node: subprocess.Popen[str]) -> str:
    """The next line that it says; "" at the end."""
    assert node.stdout is not None
    return node.stdout.readline()


def task(code: str) -> str:
    return json.dumps(asdict(NodeTask([sys.executable, "-c", LAUNCHER, code, ODD], {"FLAG": ODD}))) + "\n"


def test_a_host_runs_what_it_is_told_with_odd_arguments_and_variables(node: subprocess.Popen[str]) -> None:
    tell(node, task(PRINT + "sys.exit(2)"))
    assert json.loads(heard(node)) == [[ODD], ODD]
    assert node.wait(60) == 2


def test_a_host_that_is_told_nothing_ends(node: subprocess.Popen[str]) -> None:
    assert node.communicate("", timeout=60) == ("", "")
    assert node.returncode == 0


@pytest.mark.parametrize("request_line", ["stop\n", None])
def test_a_request_to_stop_and_a_lost_launcher_let_the_ranks_save(
    request_line: str | None, node: subprocess.Popen[str]
) -> None:
    tell(node, task(WAIT))
    assert heard(node)
    tell(node, request_line)
    assert heard(node) == "saved\n"
    assert node.wait(60) == 75


def test_a_request_to_end_at_once_ends_ranks_that_do_not_listen(node: subprocess.Popen[str]) -> None:
    tell(node, task("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PRINT + "time.sleep(1000)"))
    assert heard(node)
    tell(node, "stop\nkill\n")
    assert heard(node) == "", "somebody still has it open"
    assert node.wait(60) == 70


def test_no_such_folder() -> None:
    command = node_command("/nowhere at all")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "/nowhere at all: No such file or directory\n"
