"""A step of a cluster run computed again in one process is the one that the ranks computed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llara_dist.cli import main
from llara_dist.config import CheckpointConfig, KernelsConfig, LoraConfig
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_file
from llara_dist.replay.command import debug
from llara_dist.supervision.restarts import STARTS, read_starts
from llara_dist.training.checkpoints.checkpoint import ADAPTER, MARKER
from llara_dist.training.metrics_log import read_metrics
from llara_dist.tuning import train
from tests.distributed.ranks import run_ranks
from tests.distributed.replays import train_and_keep_batches
from tests.runs import run_config

STEPS, CHANGED = 9, 6
"""of the run, and after how many of them it goes on with one rank less and another budget"""


@dataclasses.dataclass(frozen=True)
class Past:
    """A run of two ranks, then one, with dropout; and what its ranks had."""

    out: Path
    folder: Path

    def kept(self, step: int) -> Path:
        """Where the ranks of the start that logged a step kept what they had."""
        return self.folder / ("kept-two" if step < CHANGED else "kept-one")


@pytest.fixture(scope="module")
def past(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Past:
    folder = tmp_path_factory.mktemp("replayed")
    config = dataclasses.replace(
        run_config(inputs, folder / "run", "zero1", max_steps=STEPS, max_tokens_per_microbatch=500),
        lora=LoraConfig(dropout=0.1),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=9),
    )
    run_ranks(train_and_keep_batches, 2, folder / "two", config, folder / "kept-two")
    # As if the job had ended there.
    shutil.rmtree(folder / "run" / "checkpoints" / f"step-{STEPS:08d}")
    again = dataclasses.replace(
        config, resume="auto", data=dataclasses.replace(config.data, max_tokens_per_microbatch=700)
    )
    run_ranks(train_and_keep_batches, 1, folder / "one", again, folder / "kept-one")
    assert [(start.first_step, start.nodes) for start in read_starts(folder / "run")] == [(0, (2,)), (CHANGED, (1,))]
    return Past(folder / "run", folder)


def logged(past: Past, step: int) -> dict[str, Any]:
    return next(row for row in read_metrics(past.out / "metrics.jsonl") if row["step"] == step)


def same_as_kept(past: Past, report: dict[str, Any], step: int, rank: int) -> None:
    """The report's batches and losses are those that the rank had."""
    losses = json.loads((past.kept(step) / f"step-{step}-rank-{rank}.json").read_text())
    mine = [each for each in report["microbatches"] if each["rank"] == rank]
    assert len(mine) == len(losses)
    for turn, (each, loss) in enumerate(zip(mine, losses, strict=True)):
        theirs = load_file(past.kept(step) / f"step-{step}-rank-{rank}-{turn}.safetensors")
        ours = load_file(Path(report["folder"]) / f"rank-{rank:05d}-{turn:03d}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
        assert each["loss_sum"] == pytest.approx(loss, rel=1e-5)


def test_a_rank_between_two_checkpoints(past: Past) -> None:
    """Step 3's checkpoint, one step of both ranks, then rank 1's own part of step 4."""
    report = debug(past.out, step=4, rank=1)
    assert report["checkpoint"].endswith("step-00000003")
    assert report["weights_of_step"] == 4
    assert report["replayed"]["steps"] == 1
    assert report["replayed"]["largest_difference"] < 1e-5
    same_as_kept(past, report, step=4, rank=1)
    assert not report["is_whole_step"]
    assert {each["rank"] for each in report["microbatches"]} == {1}


@pytest.mark.parametrize(("step", "replayed"), [(3, 0), (5, 2), (6, 0), (8, 2), (0, 0), (1, 1)])
def test_all_ranks_give_the_loss_and_gradient_norm_that_were_logged(past: Past, step: int, replayed: int) -> None:
    """At a checkpoint, after one, from the initial weights, and after the run went on with one rank less."""
    report = debug(past.out, step=step, rank="all")
    assert report["replayed"]["steps"] == replayed
    ranks = 2 if step < CHANGED else 1
    assert report["nodes"] == [ranks]
    assert report["max_tokens_per_microbatch"] == (500 if step < CHANGED else 700)
    assert report["is_whole_step"]
    assert report["loss"] == pytest.approx(logged(past, step)["loss"], rel=1e-5)
    assert report["grad_norm"] == pytest.approx(logged(past, step)["grad_norm"], rel=1e-5)
    for rank in range(ranks):
        same_as_kept(past, report, step, rank)


def test_replay_across_the_change_of_world(past: Past) -> None:
    """From step 3's checkpoint on: steps of two ranks, then of one."""
    report = debug(past.out, step=7, rank="all", checkpoint="step-00000003")
    assert report["replayed"]["steps"] == 4
    assert report["loss"] == pytest.approx(logged(past, 7)["loss"], rel=1e-5)
    assert report["grad_norm"] == pytest.approx(logged(past, 7)["grad_norm"], rel=1e-5)


def test_dropout_is_that_of_the_rank(past: Past) -> None:
    """The same samples shared out over another number of ranks get other masks; only the loss tells."""
    as_it_was = debug(past.out, step=3, rank="all")
    otherwise = debug(past.out, step=3, rank="all", world=3)
    keys = [sorted(s["key"] for each in r["microbatches"] for s in each["samples"]) for r in (as_it_was, otherwise)]
    assert keys[0] == keys[1]
    assert otherwise["nodes"] == [3]
    assert otherwise["loss"] != pytest.approx(as_it_was["loss"], rel=1e-5)


@pytest.mark.parametrize("other", [{"lora": "peft"}, {"last_layer": "all"}, {"layers": "liger"}])
def test_dropout_is_drawn_by_what_the_start_recorded(past: Past, tmp_path: Path, other: dict[str, str]) -> None:
    """Another implementation than the run had draws other masks where it draws any; only the loss tells."""
    run = shutil.copytree(past.out, tmp_path / "run")
    starts = [dataclasses.asdict(start) for start in read_starts(run)]
    assert [start["kernels"]["lora"] for start in starts] == ["fused", "fused"]
    changed = [{**start, "kernels": start["kernels"] | other} for start in starts]
    (run / STARTS).write_text("".join(json.dumps(start) + "\n" for start in changed))
    report = debug(run, step=3, rank="all")
    same = report["grad_norm"] == pytest.approx(logged(past, 3)["grad_norm"], rel=1e-5)
    assert same == ("layers" in other), (report["loss"], report["grad_norm"], logged(past, 3))


def test_gradients_of_samples_and_the_checkpoint_alone(past: Past) -> None:
    report = debug(past.out, step=4, rank=0, micro_batch=0, from_checkpoint_only=True, per_sample_gradients=True)
    assert report["replayed"]["steps"] == 0
    assert report["weights_of_step"] == 3
    (each,) = report["microbatches"]
    assert all(sample["is_finite"] and sample["grad_norm"] > 0 for sample in each["samples"])
    norms = [sample["grad_norm"] for sample in each["samples"]]
    assert max(norms) / len(norms) < each["grad_norm"] <= sum(norms) * (1 + 1e-5)
    total = sum(sample["loss"] * sample["answer_tokens"] for sample in each["samples"])
    assert total == pytest.approx(each["loss_sum"], rel=1e-5)


def test_the_run_is_left_alone(past: Past) -> None:
    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(past.out.rglob("*")) if path.is_file()}

    before = content()
    debug(past.out, step=4, rank="all", out=past.out.parent / "elsewhere")
    assert content() == before
    assert sorted(path.name for path in (past.out.parent / "elsewhere" / "report-step-00000004").iterdir())[-2:] == [
        "report.json",
        "samples.txt",
    ]


def test_what_is_no_report_is_not_replaced(past: Past, tmp_path: Path) -> None:
    folder = tmp_path / "report-step-00000004"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="is no report of `llara-dist debug`; choose another --out"):
        debug(past.out, step=4, out=tmp_path)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"mine"


def test_where_a_sample_occurs(past: Past) -> None:
    report = debug(past.out, step=4, rank=1, from_checkpoint_only=True)
    sample = report["microbatches"][0]["samples"][0]
    found = debug(past.out, sample=sample["key"])["occurrences"]
    (here,) = [each for each in found if each["step"] == 4]
    assert (here["rank"], here["microbatch"], here["form"]) == (1, 0, sample["form"])
    done = {(each["step"], each["rank"], each["microbatch"]) for each in found if each["step"] < STEPS}
    had = set()
    for step in range(STEPS):
        for path in past.kept(step).glob(f"step-{step}-*.safetensors"):
            if sample["key"] in load_file(path)["keys"].tolist():
                had.add(tuple(int(part) for part in re.findall(r"\d+", path.stem)))
    assert done == had


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command ends, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["debug", *arguments])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "9"), "--step 9: .* has the steps 0 to 8"),
        (("--step", "-1"), "--step -1: .* has the steps 0 to 8"),
        (("--step", "4", "--rank", "2"), "--rank 2: step 4 had the ranks 0 to 1 .the start of"),
        (("--step", "7", "--rank", "1"), "--rank 1: step 7 had the ranks 0 to 0"),
        (("--step", "4", "--micro-batch", "99"), "--micro_batch 99: rank 0 has 0 to"),
        (("--step", "4", "--rank", "all", "--micro_batch", "0"), "give the number of one as --rank"),
        (("--step", "4", "--checkpoint", "step-00000004"), "--checkpoint step-00000004: not in .*step-00000003, "),
        (("--step", "4", "--world", "0"), "--world 0: ranks of the run"),
        (("--step", "4", "--sample", "1"), "give either --step N or --sample KEY"),
        ((), "give either --step N or --sample KEY"),
        (("--sample", "123456"), "--sample 123456: no training sample of .* has this key"),
        (("--step", "4", "--device", "cuda"), "torch sees no CUDA device"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    past: Past, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    line = refused(capsys, "--run", str(past.out), *arguments)
    assert line.startswith("error: ")
    assert re.search(message, line), line


def tear_starts(run: Path) -> None:
    (run / STARTS).write_text("torn")
    shutil.rmtree(run / "checkpoints")


def exchange_shards(run: Path) -> None:
    values = json.loads((run / "config.json").read_text())
    values["seed"] += 1  # another plan, as of other shards
    (run / "config.json").write_text(json.dumps(values))


def mark_as_foreign(run: Path) -> None:
    (run.parent / "run-debug").mkdir()
    (run.parent / "run-debug" / "thesis.tex").touch()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda run: (run / "config.json").unlink(), (), "config.json: not found; expected the settings of a run"),
        (lambda run: (run / "config.json").write_text("{}}"), (), "config.json: not JSON"),
        (lambda run: (run / "config.json").write_text('{"sed": 1}'), (), "config.json: no settings of a run"),
        (tear_starts, (), "neither starts.jsonl nor a checkpoint says on how many ranks step 4 ran; give --world"),
        (exchange_shards, (), "its inputs are not those of the run any more: plan was .*, now .*seed was 0, now 1"),
        (exchange_shards, ("--sample", "1"), "its inputs are not those of the run any more: plan was .*, now"),
        (mark_as_foreign, (), "run-debug: exists and was not made by --debug"),
        (lambda run: shutil.rmtree(run / "checkpoints"), ("--checkpoint", "latest"), "no complete checkpoint"),
        (lambda run: None, ("--out", "RUN/replay"), "lies in the run's own folder"),
    ],
)
def test_folders_that_are_no_run_any_more(
    past: Past,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    run = shutil.copytree(past.out, tmp_path / "run")
    change(run)
    given = [argument.replace("RUN", str(run)) for argument in arguments]
    step = [] if "--sample" in given else ["--step", "4"]
    assert re.search(message, refused(capsys, "--run", str(run), *step, *given))


def test_a_run_of_before_starts_told_their_ranks(past: Past, tmp_path: Path) -> None:
    """Its checkpoints tell; and from a damaged one an older one is taken."""
    run = shutil.copytree(past.out, tmp_path / "run")
    starts = [json.loads(line) for line in (run / STARTS).read_text().splitlines()]
    # What computed is kept: this run's adapters were fused, an older version's cannot have been.
    old = [{name: start[name] for name in ("job", "restart", "first_step", "time", "kernels")} for start in starts]
    (run / STARTS).write_text("".join(json.dumps(start) + "\n" for start in old))
    (run / "checkpoints" / "step-00000003" / "projector.safetensors").write_bytes(b"damaged")
    report = debug(run, step=4, rank="all")
    assert report["checkpoint"] is None
    assert report["nodes"] == [2]
    assert report["loss"] == pytest.approx(logged(past, 4)["loss"], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("last_layer", ["all", "answers"])
def test_dropout_is_that_of_the_run_where_auto_comes_to_another_implementation_here(
    inputs: Path, tmp_path: Path, last_layer: Any
) -> None:
    """Under ZeRO-3 PEFT computes the adapters, in one process of stage 0 the fused op would."""
    run = tmp_path / "run"
    config = dataclasses.replace(
        run_config(inputs, run, "zero3", max_steps=2, max_tokens_per_microbatch=500),
        lora=LoraConfig(dropout=0.1),
        kernels=KernelsConfig(last_layer=last_layer),
    )
    run_ranks(train, 2, tmp_path / "ranks", config)
    (start,) = read_starts(run)
    assert start.kernels["lora"] == "peft"
    past = Past(run, tmp_path)

    def require_the_same() -> None:
        report = debug(run, step=1, rank="all")
        assert report["replayed"]["steps"] == 1
        assert report["loss"] == pytest.approx(logged(past, 1)["loss"], rel=1e-5)
        assert report["grad_norm"] == pytest.approx(logged(past, 1)["grad_norm"], rel=1e-5)

    require_the_same()
    if last_layer == "all":  # and of before kernels could be chosen: nothing tells of any
        (run / STARTS).write_text(json.dumps({**dataclasses.asdict(start), "kernels": {}}) + "\n")
        settings = json.loads((run / "config.json").read_text())
        del settings["kernels"]
        (run / "config.json").write_text(json.dumps(settings))
        require_the_same()


def test_weights_that_are_not_finite_are_named(past: Past, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(past.out, tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-00000003"
    adapter = load_file(checkpoint / ADAPTER)
    name = next(name for name in adapter if "layers.1.self_attn.v_proj.lora_B" in name)
    save_file(adapter | {name: adapter[name].fill_(torch.inf)}, checkpoint / ADAPTER)
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["sha256"][ADAPTER] = sha256_file(checkpoint / ADAPTER)
    (checkpoint / MARKER).write_text(json.dumps(marker))
    main(["debug", "--run", str(run), "--step", "3", "--rank", "all", "--json"])
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["loss"] is None
    assert report["grad_norm"] is None
    assert all("layers.1.self_attn.v_proj" in each["problem"] for each in report["microbatches"])
    assert "NaN" not in out.splitlines()[-1]
    # Step 4 begins with step 3, in which nothing can be updated.
    assert debug(run, step=4)["replayed"]["skipped"] == [3]


def test_the_command_shows_samples_and_ends_with_json(past: Past, capsys: pytest.CaptureFixture[str]) -> None:
    main(["debug", "--run", str(past.out), "--step", "3", "--rank", "all", "--json"])
    *shown, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["logged"]["loss"] == logged(past, 3)["loss"]
    text = "\n".join(shown)
    assert "predicts '</s>'" in text
    assert "⟨item " in (Path(json.loads(last)["folder"]) / "samples.txt").read_text()
    assert "relative difference" in text
