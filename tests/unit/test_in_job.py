"""What runs inside a job, without Slurm: the step's command, what an end means, who is to blame, when to give up."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llara_dist.cluster.controller import Controller, ControllerError, own_job_id, parse_status
from llara_dist.cluster.in_job import LastWords, ending, go_on, no_use, refusal, resumable, run_folder
from llara_dist.cluster.lost_nodes import (
    nodes_at_fault,
    nodes_of,
    nodes_that_failed_alone,
    nodes_to_exclude,
    ranks_to_blame,
    records_of_start,
)
from llara_dist.cluster.requeues import Requeue, idle_requeues, newest_step, read_requeues, record_requeue
from llara_dist.cluster.site import Container, Site
from llara_dist.cluster.step import Step, step_command, step_environment
from llara_dist.config import RunConfig
from llara_dist.distributed import Job
from llara_dist.supervision.early_end import EarlyEnd, early_paths, early_prefix, read_early_ends
from llara_dist.supervision.process_identity import ProcessIdentity
from llara_dist.supervision.progress import Phase, Progress
from llara_dist.supervision.rank_status import KILLED, STOPPED, RankRecord, write_status
from llara_dist.supervision.run_lock import LockRecord

ROOT = Path(__file__).parents[2]
STATUS = """\
JobId=7 JobName=a name with NodeList=x9 JobState=RUNNING
   UserId=u(1000) GroupId=u(1000) MCS_label=N/A
   JobState=COMPLETING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   Partition=low AllocNode:Sid=head:0
   ReqNodeList=(null) ExcNodeList=n9
   NodeList=n[1-2]
   BatchHost=n1
   Command=/home/u/my NodeList=n7 run.sbatch
"""
NODES = ("n1", "n2", "n3", "n4")
JOB = Job("7@test", 1)


def test_what_slurm_says_of_a_job() -> None:
    status = parse_status(STATUS)
    assert (status.state, status.partition, status.nodes) == ("COMPLETING", "low", "n[1-2]")
    assert (status.reason, status.requeue, status.excluded, status.required) == ("", True, "n9", "")


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("RUNNING", "", True),
        ("COMPLETING", "", False),  # scancel, or Slurm's own requeueing
        ("COMPLETING", "TimeLimit", True),
        ("PENDING", "BeginTime", False),
    ],
)
def test_a_job_that_somebody_else_ends_is_left_alone(state: str, reason: str, expected: bool) -> None:
    assert dataclasses.replace(parse_status(STATUS), state=state, reason=reason).is_ours == expected


def test_a_task_of_an_array_is_named_by_its_index() -> None:
    last = {"SLURM_JOB_ID": "4", "SLURM_ARRAY_JOB_ID": "4", "SLURM_ARRAY_TASK_ID": "2"}
    assert own_job_id(last) == "4_2"
    assert own_job_id({"SLURM_JOB_ID": "4"}) == "4"


def test_a_job_is_requeued_only_where_that_leads_somewhere() -> None:
    running = dataclasses.replace(parse_status(STATUS), state="RUNNING")
    assert refusal(running, idle=2, done=4) is None
    assert "after step 4" in str(refusal(running, idle=3, done=4))
    assert "--no-requeue" in str(refusal(dataclasses.replace(running, requeue=False), idle=0, done=4))
    assert "COMPLETING" in str(refusal(parse_status(STATUS), idle=0, done=4))


@pytest.mark.parametrize(
    ("code", "asked", "expected"),
    [
        (0, True, "done"),
        (75, False, "stopped"),  # pre-emption signals the tasks alone
        (138, True, "stopped"),  # before they listened
        (-9, True, "stopped"),
        (70, True, "lost"),
        (137, False, "lost"),
        (-9, False, "lost"),
        (1, True, "failed"),
        (2, True, "failed"),
        (127, False, "failed"),
    ],
)
def test_what_an_end_means(code: int, asked: bool, expected: str) -> None:
    assert ending(code, asked) == expected


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    file, broken = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text("out: from/file\nseed: 1\n")
    broken.write_text("out: [")
    assert run_folder(["train", "--config", str(file)]) == Path("from/file")
    assert run_folder(["train", "--config", str(file), "--out", "o"]) == Path("o")
    assert run_folder(["train", "--out=o", f"--config={file}"]) == Path("from/file")
    assert run_folder(["train", "--out=o", "--config", str(broken), "--config", "/nowhere"]) == Path("o")
    assert run_folder(["train", "--out"]) == Path("")
    assert run_folder(["train"]) == RunConfig().out


def test_a_run_goes_on_unless_told_otherwise_and_always_after_its_own_start() -> None:
    command = ["train", "--resume", "no"]
    assert resumable(command, started=False) == ["train", "--resume", "auto", "--resume", "no"]
    assert resumable(command, started=True) == [*command, "--resume", "auto"]
    assert resumable(["evaluate", "--run", "x"], started=True) == ["evaluate", "--run", "x"]


WORDS = st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4)
TEXT = st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]))


@settings(max_examples=40)
@given(arguments=WORDS, value=TEXT)
def test_every_word_and_variable_arrives_unchanged(arguments: list[str], value: str) -> None:
    show = r'printf "%s\0" "$GIVEN" "$MADE" "$@"'
    site = Site(
        environment={"GIVEN": value},
        setup=("MADE=by-set-up", "export MADE"),
        container=Container(command=("bash", "-c", show, "container")),
        python="python3",
    )
    environment = step_environment(site, {"PATH": "/usr/bin:/bin", "GIVEN": "the job's"}, None, JOB)
    words = step_command(["train", *arguments], site, environment)
    program = words[words.index("bash") :]  # what follows srun's options
    done = subprocess.run(program, env=environment, capture_output=True, check=True)
    seen = os.fsdecode(done.stdout).split("\0")[:-1]
    assert seen == [value, "by-set-up", "python3", "-m", "llara_dist.cli", "train", *arguments]


def test_no_value_of_the_site_is_on_a_command_line_or_lost_on_the_way() -> None:
    site = Site(environment={"WANDB_API_KEY": "hunter2"}, python="true")
    environment = step_environment(site, {"PATH": "/usr/bin:/bin"}, None, JOB)
    words = step_command(["train"], site, environment)
    assert "hunter2" not in " ".join(words)
    program = words[words.index("bash") :]
    done = subprocess.run(program, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "srun did not pass it on" in done.stderr


def test_another_launchs_variables_end_at_the_batch_script(tmp_path: Path) -> None:
    left = dict.fromkeys(("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/bash\nenv -0\n")
    interpreter.chmod(0o755)
    given = {"PATH": "/usr/bin:/bin", "LLARA_DIST_PYTHON": str(interpreter), "KEPT": "1"}
    script = ROOT / "launch" / "train.sbatch"
    done = subprocess.run(["bash", script, "c.yaml"], env={**left, **given}, capture_output=True, text=True, check=True)
    names = {line.partition("=")[0] for line in done.stdout.split("\0")}
    assert "KEPT" in names
    assert not names & left.keys()


@pytest.mark.parametrize(
    ("site", "code"),
    [(Site(setup=("exit 3",)), 3), (Site(python="/nowhere/python"), 127), (Site(python="false"), None)],
)
def test_a_rank_whose_program_does_not_start_says_so(tmp_path: Path, site: Site, code: int | None) -> None:
    out = tmp_path / """a 'run' %d"""
    slurm = {"PATH": "/usr/bin:/bin", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURMD_NODENAME": "n2"}
    environment = step_environment(site, slurm, out, JOB)
    words = step_command(["train"], site, environment)
    done = subprocess.run(words[words.index("bash") :], env=environment, stderr=subprocess.DEVNULL, cwd="/")
    ends = [(end.rank, end.world_size, end.host, end.code) for end in read_early_ends(early_paths(out, JOB))]
    assert ends == ([] if code is None else [(5, 8, "n2", code)])  # a program that ran speaks for itself
    assert done.returncode == (code or 1)


def test_what_srun_is_told() -> None:
    site = Site(srun=("--mpi=none",), container=Container(image="i.sqsh", mounts=("/a:/b", "/c:/c")))
    words = step_command(["train"], site, {"SLURM_CPUS_PER_TASK": "6"})
    assert words[0] == "srun"
    told = words[1 : words.index("bash")]
    expected = {"--cpus-per-task=6", "--mpi=none", "--container-image=i.sqsh", "--container-mounts=/a:/b,/c:/c"}
    assert expected <= set(told)
    assert "--ntasks=1" not in told
    assert "--ntasks=1" in step_command(["shards", "build"], Site(), {})


@pytest.fixture
def _handlers() -> Iterator[None]:
    """A step handles signals until its process ends; here it goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_is_told_to_stop_by_the_signal_that_srun_hands_on(tmp_path: Path, number: signal.Signals) -> None:
    ready = tmp_path / "ready"
    script = 'trap "exit 75" USR1; touch "$0"; while :; do sleep 0.05; done'
    step = Step(["bash", "-c", script, str(ready)], os.environ, tmp_path, JOB)
    while not ready.exists():
        pass
    signal.raise_signal(number)
    assert (step.wait(), step.asked) == (75, True)


@pytest.mark.usefixtures("_handlers")
def test_commands_without_checkpoints_are_not_told() -> None:
    step = Step(["sleep", "0.3"], os.environ, None, JOB)
    signal.raise_signal(signal.SIGUSR1)
    assert (step.wait(), step.asked) == (0, False)


@pytest.mark.usefixtures("_handlers")
def test_srun_that_waits_for_a_lost_node_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llara_dist.cluster.step._LINGER_S", 0.1)
    monkeypatch.setattr("llara_dist.cluster.step._LOOK_S", 0.1)
    monkeypatch.setattr("llara_dist.cluster.step.silence_s", lambda interval_s: 0.0)
    write_status_in(tmp_path, record(0, STOPPED))
    (tmp_path / "ranks" / "lost-of-an-earlier-start.txt").touch()
    assert Step(["sleep", "0.5"], os.environ, tmp_path, JOB).wait() == 0
    step = Step(["sleep", "1000"], os.environ, tmp_path, JOB)
    (tmp_path / "ranks" / "lost-token.txt").touch()
    assert step.wait() == 70


@pytest.mark.usefixtures("_handlers")
def test_a_run_that_is_told_to_stop_before_srun_is_there_tells_it_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def late(*arguments: object, **options: object) -> object:
        signal.raise_signal(signal.SIGUSR1)
        return popen(*arguments, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]

    monkeypatch.setattr(subprocess, "Popen", late)
    step = Step(["sleep", "1000"], os.environ, tmp_path, JOB)
    assert (step.wait(), step.asked) == (-signal.SIGUSR1, True)


@pytest.mark.usefixtures("_handlers")
def test_srun_whose_ranks_wait_for_one_that_ended_early_is_ended_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llara_dist.cluster.step._LINGER_S", 0.3)
    monkeypatch.setattr("llara_dist.cluster.step._LOOK_S", 0.1)
    write_early_end(tmp_path, Job("7@test", 0), EarlyEnd(3, 4, "n4", 1, False, "of an earlier start"))
    write_early_end(tmp_path, JOB, EarlyEnd(2, 4, "n3", 1, False, "of an earlier step"))
    assert Step(["sleep", "1"], os.environ, tmp_path, JOB).wait() == 0
    step = Step(["sleep", "1000"], os.environ, tmp_path, JOB)
    write_early_end(tmp_path, JOB, EarlyEnd(1, 4, "n2", 2, False, "no GPU"))
    assert step.wait() == 2
    assert [end.rank for end in step.early_ends()] == [1]
    assert "rank 1 on n2 ended before the run began: no GPU" in capsys.readouterr().out
    write_early_end(tmp_path, JOB, EarlyEnd(0, 4, "n1", 143, False, "ended with srun"))
    assert [end.rank for end in step.early_ends()] == [1]


def write_early_end(out: Path, job: Job, end: EarlyEnd) -> None:
    path = Path(f"{early_prefix(out, job)}{end.rank:05d}.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(end)))


def record(rank: int, ended: str | None, step: int = 5, host: str = "", size: int = 4) -> RankRecord:
    process = ProcessIdentity(host or f"n{rank + 1}.cluster", "boot", 100 + rank, 1)
    place = Progress(Phase.FORWARD, step, 0)
    return RankRecord("token", rank, size, process, 9, 1.0, place, 3, 0.5, False, ended, "now")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((STOPPED, None, STOPPED, STOPPED), [1]),  # silent: its node is gone, or it was suspended
        ((STOPPED, STOPPED, KILLED, STOPPED), [2]),
        ((STOPPED, STOPPED, "RuntimeError: CUDA error", STOPPED), [2]),
        ((STOPPED, STOPPED, STOPPED), [3]),  # never gave a sign of life
    ],
)
def test_the_ranks_to_blame(ends: tuple[str | None, ...], expected: list[int]) -> None:
    records = [record(rank, ended) for rank, ended in enumerate(ends)]
    assert ranks_to_blame(records) == expected
    assert nodes_at_fault(records, NODES) == [f"n{expected[0] + 1}"]


def test_of_ranks_that_all_stopped_the_one_behind_hung() -> None:
    assert ranks_to_blame([record(rank, STOPPED, step=4 if rank == 2 else 5) for rank in range(4)]) == [2]
    assert ranks_to_blame([record(rank, STOPPED) for rank in range(4)]) == []
    assert ranks_to_blame([]) == []
    assert nodes_at_fault([], NODES) == []


def test_nodes_by_name_else_by_order() -> None:
    assert nodes_of([2, 3, 7], dict.fromkeys(range(8), "login"), 8, NODES) == ["n2", "n4"]
    assert nodes_of([0], {0: "n3.cluster"}, 4, NODES) == ["n3"]


def early(rank: int, everywhere: bool = False, code: int = 2) -> EarlyEnd:
    return EarlyEnd(rank, 8, f"n{rank // 2 + 1}.cluster", code, everywhere, "why")


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([], []),
        ([early(2), early(3), early(7)], ["n2", "n4"]),
        ([early(2), early(7, everywhere=True)], []),
        ([early(0), early(2), early(4), early(7)], []),  # a mistake of everybody's
    ],
)
def test_nodes_that_failed_before_the_run_began(ends: list[EarlyEnd], expected: list[str]) -> None:
    assert nodes_that_failed_alone(ends, NODES) == expected


WITH_RECORDS = LastWords(records=[record(0, "RuntimeError")])
BAD_INPUT, NOT_JOINED = LastWords(early=[early(2, True)]), LastWords(early=[early(2, True, code=1)])


@pytest.mark.parametrize(
    ("ended", "said", "troubled", "alone", "expected"),
    [
        ("stopped", LastWords(), [], [], None),
        ("lost", WITH_RECORDS, [], [], None),
        ("lost", LastWords(), ["n2"], [], None),
        ("lost", LastWords(silence_tells=False), [], [], None),
        ("lost", LastWords(), [], [], "no rank got as far"),
        ("failed", WITH_RECORDS, ["n2"], [], "says above why"),
        ("failed", LastWords(), [], [], "says above why"),
        ("failed", LastWords(), ["n2"], [], None),
        ("failed", LastWords(early=[early(2)]), [], ["n2"], None),
        ("failed", BAD_INPUT, ["n2"], [], "says above why"),
        ("lost", BAD_INPUT, [], [], "says above why"),
        ("failed", NOT_JOINED, [], [], "says above why"),
        ("failed", NOT_JOINED, ["n1"], [], None),  # the one that they wait for is on a node that is gone
    ],
)
def test_when_another_start_would_end_in_the_same_way(
    ended: Any, said: LastWords, troubled: list[str], alone: list[str], expected: str | None
) -> None:
    found = no_use(ended, said, troubled, alone)
    assert found is None if expected is None else expected in str(found)


@pytest.mark.parametrize(
    ("blamed", "nodes", "usable", "ours", "expected"),
    [
        (["n2"], ["n1", "n2"], {"n1", "n2", "n3"}, set(), ["n2"]),
        (["n2"], ["n1", "n2"], {"n1", "n2"}, set(), []),  # too few would be left
        (["n2"], ["n1", "n2"], {"n1", "n3"}, set(), ["n2"]),  # down already
        (["n1", "n2"], ["n1", "n2"], {"n1", "n2", "n3", "n4"}, set(), []),  # all are, so none is
        (["n1"], ["n1"], {"n1", "n2"}, set(), ["n1"]),
        (["n2"], ["n1", "n2"], {"n1", "n2", "n4", "n5"}, {"n3"}, []),  # a second one of five
        (["n2"], ["n1", "n2"], {f"n{k}" for k in range(1, 10) if k != 3}, {"n3"}, ["n2"]),  # of nine
    ],
)
def test_nodes_are_excluded_while_the_job_can_do_without(
    blamed: list[str], nodes: list[str], usable: set[str], ours: set[str], expected: list[str]
) -> None:
    assert nodes_to_exclude(blamed, nodes, usable, ours) == expected


def test_only_the_records_of_this_start_count(tmp_path: Path) -> None:
    for rank in range(2):
        write_status_in(tmp_path, record(rank, None))
    process = ProcessIdentity("n1", "boot", 1, 1)
    lock = LockRecord("token", Job("7@test", 1, "0"), process, "now", 1, "now", 1.0, False)
    (tmp_path / "lock-000002.json").write_text(lock.to_json())
    assert len(records_of_start(tmp_path, Job("7@test", 1))) == 2
    assert records_of_start(tmp_path, Job("7@test", 2)) == []
    assert records_of_start(tmp_path, Job("8@test", 1)) == []
    assert records_of_start(tmp_path / "nowhere", Job("7@test", 1)) == []


def write_status_in(out: Path, status: RankRecord) -> None:
    (out / "ranks").mkdir(exist_ok=True)
    write_status(out, status)


def test_requeues_without_a_new_checkpoint_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert (newest_step(out), read_requeues(out)) == (0, [])
    for restart, step in enumerate((0, 4, 4, 4)):
        record_requeue(out, Requeue("7@test", restart, step, "lost", ("n2",), (), "now"))
    with open(out / "requeues.jsonl", "a") as file:
        file.write('{"job": "7@te')  # torn by a kill
    record_requeue(out, Requeue("7@test", 4, 4, "stopped", (), ("n2",), "now"))
    requeues = read_requeues(out)
    assert [requeue.restart for requeue in requeues] == [0, 1, 2, 3, 4]
    assert requeues[0].blamed == ("n2",)
    assert [idle_requeues(requeues, step) for step in (4, 5, 0)] == [4, 0, 0]
    for name in ("step-00000004", "step-00000012", ".step-00000020.staging", "step-00000030.bad"):
        (out / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(out) == 12


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["Unable to contact slurm controller (connect failure)"] * 2, None),
        (["Requested operation is presently disabled"], "presently disabled"),
        (["Socket timed out on send/recv operation"] * 50, "timed out"),
    ],
)
def test_a_controller_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], said: str | None
) -> None:
    """A scontrol that fails with one line after the other."""
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    fake = tmp_path / "scontrol"
    fake.write_text(
        f'#!/bin/bash\ncd {tmp_path}\n[ -s lines ] || {{ echo "$@" >asked; exit 0; }}\n'
        "head -n 1 lines >&2; sed -i 1d lines; exit 1\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr("llara_dist.cluster.controller._PAUSE_S", 0.01)
    controller = Controller("7", patience_s=0.3)
    if said is None:
        Controller("7", patience_s=60).requeue()
        assert (tmp_path / "asked").read_text().split() == ["requeue", "7"]
    else:
        with pytest.raises(ControllerError, match=said):
            controller.requeue()


class FakeController(Controller):
    """One whose job had two of four nodes, and which refuses to change it."""

    def __init__(self) -> None:
        super().__init__("7")
        self.requeued = False

    def _ask(self, *command: str) -> str:
        if command[1] == "update":
            raise ControllerError("scontrol update: Access/permission denied")
        self.requeued |= command[1] == "requeue"
        answers = {"hostnames": "n1\nn2\n" if command[-1] == "n[1-2]" else "n9\n", "job": RUNNING}
        return answers.get(command[2], "".join(f"{node} idle\n" for node in NODES))


RUNNING = STATUS.replace("JobState=COMPLETING", "JobState=RUNNING")


def test_a_node_that_fails_before_the_run_begins_is_excluded_or_that_fails_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    controller = FakeController()
    go_on(tmp_path, JOB, "failed", LastWords(early=[EarlyEnd(1, 2, "n2", 2, False, "no GPU")]), controller)
    assert controller.requeued
    (requeue,) = read_requeues(tmp_path)
    assert (requeue.blamed, requeue.excluded) == (("n2",), ("n2",))
    said = capsys.readouterr().out
    assert "not requeued" not in said
    assert "requeued, but it may get n2 again: scontrol update: Access/permission denied" in said


def test_an_id_of_several_jobs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller("7")
    monkeypatch.setattr(controller, "_ask", lambda *command: f"{RUNNING}\n{RUNNING}")
    with pytest.raises(ControllerError, match="several jobs"):
        controller.status()
