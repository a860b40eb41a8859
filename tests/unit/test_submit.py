"""`llara-dist submit`: what is written, what sbatch is asked, and what is left when Slurm refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

from llara_dist import cli
from llara_dist.cluster import records
from llara_dist.cluster.records import JobRecord, jobs_of, read_record
from llara_dist.cluster.slurm import parse_accounting, parse_jobs
from llara_dist.config import run_config_from_dict
from llara_dist.errors import FindingsError, InputError
from tests.unit.fake_slurm import FakeSlurm

RUN = ["--model.path", "llm", "--data.shards", "shards", "--recommender.path", "rec", "--check", "false"]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLARA_DIST_SITE", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/mine")
    monkeypatch.setenv("RANK", "3")
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def submit(*arguments: str) -> None:
    cli.run_command("submit", [*RUN, *arguments])


def test_a_run_is_looked_at_written_down_and_queued(slurm: FakeSlurm, tmp_path: Path) -> None:
    out = tmp_path / "a b'\"$(touch x)%j"
    submit("--out", str(out), "--seed", "5", "--nodes", "2", "--gpus_per_node", "8", "--time", "12:00:00")
    folder = out / "jobs" / "1"
    looked, queued = slurm.calls("sbatch")
    assert "--test-only" in looked["arguments"]
    assert looked["script"] == (folder / "job.sbatch").read_text()
    assert queued["arguments"][0] == "--parsable"
    assert queued["arguments"][-1] == str(folder / "job.sbatch")
    assert f"--chdir={folder}" in queued["arguments"]
    assert "--time=12:00:00" in queued["arguments"]
    # Another job's variables must not reach this one; where Slurm's configuration lies must.
    assert not {"SLURM_JOB_ID", "RANK"} & set(queued["environment"])
    assert queued["environment"]["SLURM_CONF"] == "/etc/mine"
    record = read_record(folder)
    assert (record.job_id, record.cluster, record.step) == ("101", "fake", "train")
    assert record.command == ("train", "--config", str(folder / "run.yaml"), "--resume", "auto")
    config = run_config_from_dict(yaml.safe_load((folder / "run.yaml").read_text()))
    assert (config.seed, config.out, config.resume) == (5, out, "auto")
    assert json.loads(config.deepspeed.read_text()) == json.loads(Path("ds_configs/zero0.json").read_text())


def test_settings_of_the_file_and_options_are_merged(slurm: FakeSlurm, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nlora: {rank: 4}\n")
    submit("--config", str(file), "--lora.alpha", "7", "--out", str(tmp_path / "run"))
    file.write_text("seed: 4\n")
    kept = yaml.safe_load((tmp_path / "run/jobs/1/run.yaml").read_text())
    assert (kept["seed"], kept["lora"]["rank"], kept["lora"]["alpha"]) == (3, 4, 7)


def test_dry_run_writes_nothing_and_asks_slurm(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.answer("sbatch --test-only", error="sbatch: Job 9 to start at 2030-01-01T00:00:00\n")
    submit("--out", str(tmp_path / "run"), "--dry_run")
    shown = capsys.readouterr().out
    assert "#SBATCH --nodes=1" in shown
    assert "Job 9 to start at" in shown
    assert not (tmp_path / "run").exists()
    assert len(slurm.calls("sbatch")) == 1


def test_without_slurm_a_dry_run_still_shows_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    submit("--out", str(tmp_path / "run"), "--dry_run")
    assert "llara_dist.cluster.in_job train" in capsys.readouterr().out
    with pytest.raises(InputError, match="no Slurm here: scontrol not found"):
        submit("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["sbatch --test-only", "sbatch"])
def test_when_slurm_refuses_nothing_is_left(slurm: FakeSlurm, tmp_path: Path, kind: str) -> None:
    slurm.answer(kind, 1, error="sbatch: error: invalid partition specified: x\nallocation failure: no\n")
    with pytest.raises(InputError, match=r"^sbatch: .*invalid partition specified: x; allocation failure: no$"):
        submit("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def full_disk(folder: Path, record: JobRecord) -> None:
    """Stands for `write_record` on a disk that has no room left for the job's id."""
    if record.job_id:
        raise OSError(28, "No space left on device")


def test_a_job_that_cannot_be_recorded_is_cancelled(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "write_record", full_disk)
    with pytest.raises(OSError, match="No space left"):
        submit("--out", str(tmp_path / "run"))
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["101"]]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [InputError("sbatch: no answer within 120 s"), KeyboardInterrupt()])
def test_a_job_that_slurm_took_without_saying_so_is_cancelled(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def timed_out(*arguments: object) -> str:
        raise error

    folder = tmp_path / "run" / "jobs" / "1"
    slurm.answer("squeue", output=f"55|{tmp_path}\n101|{folder}\n")
    monkeypatch.setattr("llara_dist.cluster.slurm.submit", timed_out)
    with pytest.raises(type(error)):
        submit("--out", str(tmp_path / "run"))
    assert [call["arguments"] for call in slurm.calls("scancel")] == [["101"]]
    assert not folder.exists()


def test_the_words_of_the_first_error_are_said(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "write_record", full_disk)
    slurm.answer("scancel", code=1, error="scancel: error: controller busy")
    with pytest.raises(OSError, match="No space left"):
        submit("--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_site_file_that_a_job_keeps_is_for_nobody_else(slurm: FakeSlurm, tmp_path: Path) -> None:
    submit("--out", str(tmp_path / "run"))
    assert (tmp_path / "run" / "jobs" / "1" / "site.yaml").stat().st_mode & 0o777 == 0o600


def test_every_run_of_an_array_that_differs_is_checked(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(FindingsError) as caught:
        submit("--out", str(tmp_path / "{index}"), "--array", "0-1", "--check", "true", "--model.path", "/none/{index}")
    assert any("/none/0" in finding.found for finding in caught.value.errors)


def test_a_run_with_a_job_is_not_submitted_twice(slurm: FakeSlurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    submit("--out", str(out))
    slurm.job("101", "PENDING", out / "jobs" / "1")
    with pytest.raises(InputError, match=r"job 101 \(train\) is pending; .*`llara-dist cancel"):
        submit("--out", str(out))
    slurm.job("101", "CANCELLED", out / "jobs" / "1")
    submit("--out", str(out))
    # An id that Slurm has given to somebody else's job since is not this run's.
    slurm.job("101", "RUNNING", tmp_path / "other")
    slurm.job("102", "COMPLETED", out / "jobs" / "2")
    submit("--out", str(out))
    assert [job.record.job_id for job in jobs_of(out)] == ["101", "102", "103"]


def test_a_job_whose_id_was_never_recorded_is_found(slurm: FakeSlurm, tmp_path: Path) -> None:
    out = tmp_path / "run"
    submit("--out", str(out))
    folder = out / "jobs" / "1"
    record = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps({**record, "job_id": ""}))
    slurm.answer("squeue", output=f"55|{tmp_path}\n101|{folder}\n")
    slurm.job("101", "RUNNING", folder)
    with pytest.raises(InputError, match="job 101"):
        submit("--out", str(out))


def test_an_array_gives_every_index_its_settings_and_folder(slurm: FakeSlurm, tmp_path: Path) -> None:
    submit("--out", f"{tmp_path}/runs/seed-{{index}}", "--seed", "{index}", "--array", "3-4%1")
    folder = tmp_path / "runs" / "jobs" / "1"
    assert [yaml.safe_load((folder / f"run-{index}.yaml").read_text())["seed"] for index in (3, 4)] == [3, 4]
    last = shlex.split((folder / "job.sbatch").read_text().splitlines()[-1])
    assert f"{folder}/run-$SLURM_ARRAY_TASK_ID.yaml" in last
    assert "--array=3-4%1" in slurm.calls("sbatch")[-1]["arguments"]
    (job,) = jobs_of(tmp_path / "runs" / "seed-4")
    assert job.job_id == "101_4"
    assert job.outputs == [folder / "slurm-101_4.out"]
    slurm.job("101_4", "RUNNING", folder)
    with pytest.raises(InputError, match="101_4"):
        submit("--out", str(tmp_path / "runs" / "seed-4"))


def test_an_array_in_one_folder_is_refused(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--array 0-1: one folder, one run: put \{index\} into --out"):
        submit("--out", str(tmp_path / "run"), "--array", "0-1")


def test_a_folder_that_holds_a_run_is_gone_on_from_only_if_asked(slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="holds a run already; choose another --out, or go on with --resume auto"):
        submit("--out", str(tmp_path / "run"))
    submit("--out", str(tmp_path / "run"), "--resume", "auto")


def test_what_preflight_finds_is_said_before_anything_is_queued(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(FindingsError) as caught:
        submit("--out", str(tmp_path / "run"), "--check", "true", "--device", "cuda", "--nodes", "999")
    checks = {finding.check for finding in caught.value.errors}
    assert {"model", "shards", "item table", "ranks"} <= checks
    assert "device" not in checks  # this machine's GPUs say nothing of the cluster's
    assert slurm.calls("sbatch") == []


def test_bad_options_of_the_job_are_named(slurm: FakeSlurm, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="time=noon"):
        submit("--out", str(tmp_path / "run"), "--time", "noon")
    with pytest.raises(InputError, match=r"llara-dist submit: .*lora\.ranks"):
        submit("--out", str(tmp_path / "run"), "--lora.ranks", "4")


def test_arrays_and_folders_in_the_controllers_answer() -> None:
    folder = Path("/runs/a JobState=FAILED b")
    answer = (
        f"JobId=13 ArrayJobId=13 ArrayTaskId=1-3%1 JobName=x JobState=PENDING Reason=JobArrayTaskLimit "
        f"Restarts=0 NodeList=(null) ExitCode=0:0 Command=x WorkDir={folder} StdErr=y\n"
        f"JobId=14 ArrayJobId=13 ArrayTaskId=0 JobName=x JobState=RUNNING Reason=None Restarts=2 "
        f"NodeList=n[1-2] ExitCode=0:0 Command=x WorkDir={folder} StdErr=y\n"
        f"JobId=15 JobName=x JobState=RUNNING Reason=None WorkDir=/elsewhere StdErr=y\n"
    )
    waiting, running = parse_jobs(answer, folder)
    assert (waiting.job_id, waiting.state, waiting.reason, waiting.nodes) == (
        "13_[1-3]",
        "PENDING",
        "JobArrayTaskLimit",
        "",
    )
    assert (running.job_id, running.state, running.restarts, running.nodes) == (
        "13_0",
        "RUNNING",
        2,
        "n[1-2]",
    )


def test_accounting_knows_jobs_that_the_controller_forgot() -> None:
    answer = "13|CANCELLED by 0|0:15|n1|/runs/a|b\n14|COMPLETED|0:0|n2|/elsewhere\n"
    (state,) = parse_accounting(answer, Path("/runs/a|b"))
    assert (state.job_id, state.state, state.is_over) == ("13", "CANCELLED", True)
