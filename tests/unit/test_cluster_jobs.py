"""`llara-dist status`, `logs` and `cancel` from files and from what Slurm says."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest

from llara_dist.cluster import jobs as cluster_jobs
from llara_dist.cluster.jobs import cancel, follow_file, last_line, logs, print_end, progress, status
from llara_dist.cluster.records import JobRecord, jobs_of, make_folder, next_folders, remove_folder, write_record
from llara_dist.cluster.slurm import job_states
from llara_dist.errors import InputError
from llara_dist.supervision.process_identity import ProcessIdentity
from llara_dist.supervision.progress import Phase, Progress
from llara_dist.supervision.rank_status import RankRecord, write_status
from tests.unit.fake_slurm import FakeSlurm


def record(job_id: str, step: str = "train", at: str = "2030-01-01T00:00:00+0000", **runs: str) -> JobRecord:
    output = "slurm-%A_%a.out" if runs else "slurm-%j.out"
    return JobRecord(job_id, "fake", step, (step,), runs or {"": "."}, output, (), "", at)


def add(out: Path, made: JobRecord) -> Path:
    (folder,) = next_folders(out, 1)
    make_folder(folder)
    write_record(folder, made)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def test_status_joins_slurm_and_files(slurm: FakeSlurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = add(out, record("101"))
    (out / "metrics.jsonl").write_text('{"step": 3, "loss": 1.5}\n{"step": 4, "loss": 1.25}\n{"step": 5, "lo')
    state = out / "checkpoints" / "step-00000004" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 4, "total_steps": 90}')
    slurm.job("101", "PENDING", folder, Reason="Resources", Restarts="2")
    found = status(out)
    (job,), (run,) = found["jobs"], found["runs"]
    assert (job["job"], job["state"], job["reason"], job["restarts"]) == ("101", "PENDING", "Resources", 2)
    assert (run["step"], run["of"], run["loss"], run["ranks"]) == (5, 90, 1.25, None)


def test_the_length_of_a_run_is_known_before_its_first_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    process = ProcessIdentity("n1", "boot", 100, 1)
    place = Progress(Phase.FORWARD, 5, 0)
    write_status(tmp_path, RankRecord("token", 0, 2, process, 9, 1.0, place, 3, 0.5, False, None, "now", 90))
    found = progress(tmp_path)
    assert found is not None
    assert (found["of"], found["ranks"]) == (90, 2)


def test_a_job_that_the_controller_has_forgotten_is_looked_up_in_accounting(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.answer("job 1_0", 1, output="Job 1_0 not found\n")
    slurm.answer("sacct", output=f"1_0|COMPLETED|0:0|n1|{tmp_path}\n")
    (state,) = job_states("1_0", tmp_path)
    assert (state.state, state.is_over) == ("COMPLETED", True)


def test_status_without_slurm_says_what_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "run"
    add(out, record("101"))
    (out / "metrics.jsonl").write_text('{"step": 0, "loss": null}\n')
    found = status(out)
    assert found["jobs"][0]["state"] == "not known to Slurm"
    assert found["runs"][0]["step"] == 1
    assert "no Slurm here: scontrol not found" in capsys.readouterr().out
    with pytest.raises(InputError, match="no Slurm here"):
        cancel(out)
    with pytest.raises(InputError, match="no such folder"):
        status(tmp_path / "none")


def test_a_run_that_has_not_begun_has_no_progress(tmp_path: Path) -> None:
    assert progress(tmp_path) is None


def test_the_last_line_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "pad": "x" * 100}) + "\n" for step in range(5000)))
    row = last_line(path)
    assert row is not None
    assert row["step"] == 4999
    assert last_line(tmp_path / "none") is None


def test_cancel_ends_what_is_not_over_and_says_so(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first, second, third = (add(out, record(job_id)) for job_id in ("101", "102", "103"))
    slurm.job("101", "COMPLETED", first)
    slurm.job("102", "RUNNING", second)
    slurm.job("103", "PENDING", third)
    assert cancel(out)["cancelled"] == ["102", "103"]
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["102", "103"]]
    assert "cancelled job 103, which was pending" in capsys.readouterr().out
    slurm.job("102", "CANCELLED", second)
    slurm.job("103", "CANCELLED", third)
    assert cancel(out)["cancelled"] == []
    assert len(slurm.calls("scancel")) == 1
    slurm.job("103", "RUNNING", third)
    slurm.answer("scancel", 1, error="scancel: error: Kill job error on job id 103: Access/permission denied\n")
    with pytest.raises(InputError, match="permission denied"):
        cancel(out)


def test_an_array_is_cancelled_whole_and_its_task_alone(slurm: FakeSlurm, tmp_path: Path) -> None:
    folder = add(tmp_path / "runs", record("7", **{"3": "seed-3", "4": "seed-4"}))
    slurm.job("7", "PENDING", folder, ArrayJobId="7", ArrayTaskId="3-4%1")
    slurm.job("7_4", "PENDING", folder, ArrayJobId="7", ArrayTaskId="4")
    assert cancel(tmp_path / "runs")["cancelled"] == ["7"]
    assert cancel(tmp_path / "runs" / "seed-4")["cancelled"] == ["7_4"]


def test_a_task_of_an_array_and_a_step_of_a_pipeline_are_found_from_the_run(tmp_path: Path) -> None:
    add(tmp_path / "runs", record("7", **{"3": "seed-3", "4": "seed-4"}))
    add(tmp_path / "pipe", record("8", "prepare"))
    folder = add(
        tmp_path / "pipe", JobRecord("9", "", "train", ("train",), {"": "run"}, "slurm-%j.out", (), "", "2031")
    )
    (task,) = jobs_of(tmp_path / "runs" / "seed-4")
    assert task.job_id == "7_4"
    assert task.runs == [(tmp_path / "runs" / "seed-4").resolve()]
    (step,) = jobs_of(tmp_path / "pipe" / "run")
    assert (step.job_id, step.outputs) == ("9", [folder / "slurm-9.out"])
    assert [job.job_id for job in jobs_of(tmp_path / "pipe")] == ["8", "9"]
    assert jobs_of(tmp_path / "pipe" / "data") == []


def test_a_folder_named_jobs_above_that_is_not_ours_is_passed_over(tmp_path: Path) -> None:
    other = tmp_path / "jobs" / "1"
    other.mkdir(parents=True)
    (other / "job.json").write_text('{"title": "baker"}')
    assert jobs_of(tmp_path / "run") == []
    with pytest.raises(InputError, match="not written by `llara-dist submit`"):
        jobs_of(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_job_above_that_is_another_users_is_passed_over(tmp_path: Path) -> None:
    other = tmp_path / "jobs" / "12345"
    other.mkdir(parents=True)
    other.chmod(0)
    assert jobs_of(tmp_path / "run") == []


@pytest.mark.parametrize("method", ["stat", "read_bytes"])
def test_what_cannot_be_looked_at_far_above_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    other = add(tmp_path, record("7"))

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, method, refuse)
    assert jobs_of(tmp_path / "run" / "deep") == []
    assert other.is_relative_to(tmp_path)


def test_job_folders_are_numbered_and_given_once(tmp_path: Path) -> None:
    one, two = next_folders(tmp_path / "run", 2)
    assert (one.name, two.name) == ("1", "2")
    make_folder(one)
    with pytest.raises(InputError, match="another submission is under way"):
        make_folder(one)
    assert next_folders(tmp_path / "run", 1) == [two]
    remove_folder(one)
    assert not (tmp_path / "run").exists()


def test_logs_show_the_end_of_the_newest_output(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match="no job was submitted"):
        logs(out)
    folder = add(out, record("101"))
    with pytest.raises(InputError, match="job 101 has not started"):
        logs(out)
    (folder / "slurm-101.out").write_bytes(b"one\ntwo\n\xff three\n")
    logs(out, lines=2)
    assert capsys.readouterr().out == f"==> {folder / 'slurm-101.out'} <==\ntwo\n� three\n"
    with pytest.raises(InputError, match="no rank 17"):
        logs(out, rank=17)
    (out / "logs").mkdir()
    (out / "logs" / "rank-00017.log").write_text("of rank 17\n")
    logs(out, rank=17, lines=0)
    assert capsys.readouterr().out.endswith("of rank 17\n")
    add(tmp_path / "pipe", record("7", **{"": "../run"}))
    logs(tmp_path / "pipe", rank=17, lines=0)
    assert capsys.readouterr().out.endswith("of rank 17\n")
    with pytest.raises(InputError, match="--lines -1"):
        logs(out, lines=-1)


def test_following_prints_everything_until_the_job_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster_jobs, "LOOK_S", 0.01)
    monkeypatch.setattr(cluster_jobs, "ASK_S", 0.01)
    path = tmp_path / "out"
    path.write_text("before\n")
    over = threading.Event()

    def write() -> None:
        for line in range(20):
            with open(path, "a") as file:
                file.write(f"line {line}\n")
            time.sleep(0.005)
        over.set()

    writer = threading.Thread(target=write)
    place = print_end(path, 0)
    writer.start()
    follow_file(path, place, lambda: not over.is_set())
    writer.join()
    assert capsys.readouterr().out == path.read_text()
