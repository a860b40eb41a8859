"""Jobs of a real Slurm that are an array's, and jobs of which a rank ends before the run begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llara_dist.cluster.requeues import read_requeues
from tests.cluster.slurm import Slurm
from tests.runs import ROOT

pytestmark = [pytest.mark.long]

# In the place of Python: a run of one rank that saves when it is told to and ends at once when it is started again.
RUN = """\
#!/bin/bash
trap 'exit 75' USR1
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
touch "$STARTED/$SLURM_PROCID.$SLURM_ARRAY_TASK_ID"
while :; do sleep 0.1; done
"""
Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: Slurm, tmp_path: Path) -> Submit:
    """Submit launch/train.sbatch from the checkout with a site file."""

    def give(site: dict[str, object], *options: str, config: Path, out: Path) -> str:
        number = len(list(tmp_path.glob("site-*.yaml")))
        path = tmp_path / f"site-{number}.yaml"
        path.write_text(yaml.safe_dump(site))
        place = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=20", f"--output={tmp_path}/%A_%a.out", *options)
        words = ("sbatch", "--parsable", *place, "launch/train.sbatch", str(config), "--out", str(out))
        environment = {"LLARA_DIST_PYTHON": sys.executable, "LLARA_DIST_SITE": str(path)}
        return slurm.check("bash", "-c", 'cd "$0" && "$@"', str(ROOT), *words, env=environment).strip()

    return give


@pytest.fixture
def run(tmp_path: Path) -> dict[str, object]:
    """The site whose interpreter is `RUN`."""
    (tmp_path / "started").mkdir()
    program = tmp_path / "run"
    program.write_text(RUN)
    program.chmod(0o755)
    return {"python": str(program), "environment": {"STARTED": str(tmp_path / "started")}}


def said(tmp_path: Path, job: str) -> str:
    (path,) = tmp_path.glob(f"{job}_*.out")
    return path.read_text()


def test_of_an_array_one_task_is_requeued_also_the_last(
    slurm: Slurm, submit: Submit, run: dict[str, object], tmp_path: Path
) -> None:
    job = submit(run, "--array=0-2", config=tmp_path, out=tmp_path / "out")
    slurm.wait(lambda: len(list((tmp_path / "started").iterdir())) == 3, 60, "all tasks run")
    slurm.check("scancel", f"{job}_0")
    assert slurm.end(f"{job}_0") == "CANCELLED"
    slurm.check("scancel", "--batch", "--signal=USR1", f"{job}_2")
    assert slurm.end(f"{job}_2") == "COMPLETED", slurm.report()
    tasks = [slurm.job(f"{job}_{task}") for task in range(3)]
    assert [task["JobState"] for task in tasks] == ["CANCELLED", "RUNNING", "COMPLETED"]
    assert [task["Restarts"] for task in tasks] == ["0", "0", "1"]
    # By itself, not by the site's RequeueExit.
    assert [requeue.why for requeue in read_requeues(tmp_path / "out")] == ["stopped"]
    slurm.check("scancel", job)
    slurm.end(f"{job}_1")


def test_a_rank_that_ends_before_the_run_begins_ends_the_wait_of_the_others(
    slurm: Slurm, submit: Submit, run: dict[str, object], inputs: Path, tmp_path: Path
) -> None:
    """Two jobs at once, since each waits for other ranks that may fail in the same way."""
    two = ("--nodes=2", "--ntasks-per-node=1")
    run["setup"] = ['[ "$SLURM_PROCID.${SLURM_RESTART_COUNT:-0}" != 1.0 ] || exit 7']
    of_its_own = submit(run, *two, config=tmp_path, out=tmp_path / "a")
    slurm.wait(lambda: slurm.state(of_its_own) == "RUNNING", 60, "it runs")
    lost = slurm.check("scontrol", "show", "hostnames", slurm.job(of_its_own)["NodeList"]).split()[1]

    config = tmp_path / "config.yaml"
    settings = {
        "model": {"path": str(inputs / "llm")},
        "recommender": {"path": str(inputs / "rec")},
        "data": {"shards": str(inputs / "shards"), "global_batch_samples": 7, "max_tokens_per_microbatch": 600},
        "device": "cpu",
    }
    config.write_text(yaml.safe_dump(settings))
    shards = inputs / "shards"
    slurm.hosts["n2"].check(f"mount -t tmpfs none {shards}")
    try:
        place = (*two, "--nodelist=n1,n2")
        bad_input = submit({}, *place, config=config, out=tmp_path / "b")
        assert slurm.end(bad_input, 120) == "FAILED"
    finally:
        slurm.hosts["n2"].check(f"umount {shards}")
    assert (slurm.job(bad_input)["ExitCode"], slurm.job(bad_input)["Restarts"]) == ("2:0", "0")
    assert f"rank 1 on n2 ended before the run began: {shards}" in said(tmp_path, bad_input)
    assert read_requeues(tmp_path / "b") == []

    assert slurm.end(of_its_own, 120) == "COMPLETED", said(tmp_path, of_its_own)
    assert slurm.job(of_its_own)["Restarts"] == "1"
    assert slurm.job(of_its_own)["ExcNodeList"] == lost
    (requeue,) = read_requeues(tmp_path / "a")
    assert (requeue.why, requeue.blamed, requeue.excluded) == ("lost", (lost,), (lost,))


def test_a_run_that_dies_without_a_word_is_not_started_again(
    slurm: Slurm, submit: Submit, run: dict[str, object], tmp_path: Path
) -> None:
    Path(str(run["python"])).write_text("#!/bin/bash\nkill -9 $$\n")
    job = submit(run, config=tmp_path, out=tmp_path / "out")
    assert slurm.end(job) == "FAILED"
    assert slurm.job(job)["Restarts"] == "0"
    assert "not requeued: no rank got as far as to say anything" in said(tmp_path, job)
