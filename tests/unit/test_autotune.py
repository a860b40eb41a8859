"""`llara-dist tune`: what the search decides with a bench that measures nothing; the clock; what differs too much."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.autotune.agreement import describe_difference
from llara_dist.autotune.bench import DoesNotFitError
from llara_dist.autotune.budget import GRAIN, budgets, largest_that_fits
from llara_dist.autotune.clock import Clock, OutOfTime
from llara_dist.autotune.comparison import WORTH, compare
from llara_dist.autotune.found import Found
from llara_dist.autotune.models import is_out_of_memory
from llara_dist.autotune.questions import fewer_recomputed
from llara_dist.autotune.search import search
from llara_dist.autotune.settings import RECOMPUTE, Question, Setting, label
from llara_dist.autotune.written import file_text, settings_found
from llara_dist.config import KernelsConfig

KERNELS = KernelsConfig("sdpa", "eager", "peft", "torch", "all", False)
START = Setting(8192, False, KERNELS)
LOW, HIGH = 330, 330 * 128
QUESTIONS = [
    Question("attention", ("flash3", "varlen")),
    Question("lora", ("fused",)),
    Question("compile", (True,)),
]


@dataclass
class FakeBench:
    """A machine of stated speeds and memory, whose time passes as it is used."""

    rate: Callable[[Setting], float] = lambda setting: 1000.0
    need: Callable[[Setting], int] = lambda setting: setting.tokens
    memory: int = 1 << 30
    broken: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    is_dead: bool = False
    """from the first failure on: everything fails"""
    seconds: float = 1e9
    model_bytes: int = 0
    now: float = 0.0
    loaded: set[Setting] = field(default_factory=set)
    peak: int = 0
    log: list[tuple[str, Setting]] = field(default_factory=list)

    def spend(self, seconds: float) -> None:
        self.now = min(self.now + seconds, self.seconds)
        if self.now >= self.seconds:
            raise OutOfTime

    def left(self) -> float:
        return self.seconds - self.now

    def prepare(self, setting: Setting) -> None:
        if setting.variant not in self.loaded:
            self.spend(5.0)
            if self.model_bytes * (len(self.loaded) + 1) > self.memory:
                raise DoesNotFitError
            self.loaded.add(setting.variant)

    def release(self, setting: Setting) -> None:
        if self.is_dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.loaded.discard(setting.variant)

    def difference(self, setting: Setting) -> str:
        assert setting.variant in self.loaded
        self.spend(0.1)
        if any(value in vars(setting.kernels).values() for value in self.broken):
            self.is_dead = self.is_dead or "fused" in self.broken
            raise ImportError("no kernel image\nis available")
        return "the loss is 9" if any(value in vars(setting.kernels).values() for value in self.wrong) else ""

    def fits(self, setting: Setting) -> bool:
        assert setting.variant in self.loaded
        self.spend(0.1)
        self.log.append(("fits", setting))
        return self.model_bytes * len(self.loaded) + self.need(setting) <= self.memory

    def speed(self, setting: Setting) -> float:
        assert setting.variant in self.loaded
        self.spend(0.5)
        self.log.append(("speed", setting))
        return self.rate(setting)

    def peak_bytes(self, setting: Setting) -> int:
        return self.need(setting)

    def seconds_of_trial(self) -> float:
        return 15.0


def run(bench: FakeBench, start: Setting = START, questions: list[Question] = QUESTIONS, guess: int = HIGH) -> Found:
    found = Found(start)
    search(bench, found, LOW, HIGH, guess, questions, bench.left)
    return found


def verdicts(found: Found) -> dict[str, str]:
    return {trial.what: trial.verdict for trial in found.trials}


def test_what_is_faster_is_kept_and_what_ties_is_not() -> None:
    speeds = {"flash3": 1.02, "varlen": 1.2, "fused": 1.5}

    def rate(setting: Setting) -> float:
        ratio = 1.0
        for value in vars(setting.kernels).values():
            ratio *= speeds.get(value, 1.0)
        return 1000.0 * ratio * (0.5 if setting.kernels.compile else 1.0)

    bench = FakeBench(rate)
    found = run(bench)
    assert found.best == Setting(8192, False, KernelsConfig("varlen", "eager", "fused", "torch", "all", False))
    assert found.ratio == pytest.approx(1.8)
    said = verdicts(found)
    assert said["kernels.attention=flash3"].startswith("not kept: a tie")
    assert said["kernels.attention=varlen"] == said["kernels.lora=fused"] == "kept"
    assert said["kernels.compile=true"] == "slower"
    assert found.untried == []
    assert bench.loaded == {found.best.variant}  # nothing that lost stays in memory
    # Named is what the default would not come to here; where the run names what the default comes to, it is let go.
    default = dataclasses.replace(KERNELS, lora="fused", last_layer="answers")
    assert settings_found(found, KernelsConfig(lora="peft", compile=True), default) == {
        "data": {"max_tokens_per_microbatch": 8192},
        "kernels": {"attention": "varlen", "lora": "auto", "compile": False},
    }
    assert settings_found(found, KernelsConfig(), found.best.kernels).keys() == {"data"}


def test_a_choice_that_breaks_or_differs_is_told_and_the_search_goes_on() -> None:
    fast = FakeBench(lambda s: 9000.0 if s.kernels != KERNELS else 1000.0, broken=("flash3",), wrong=("varlen",))
    found = run(fast)
    said = verdicts(found)
    assert said["kernels.attention=flash3"] == "failed: ImportError: no kernel image"
    assert said["kernels.attention=varlen"] == "refused: the loss is 9"
    assert found.best.kernels.attention == "sdpa"
    assert found.best.kernels.lora == "fused"
    settings = settings_found(found, KernelsConfig(), dataclasses.replace(KERNELS, attention="flash3"))
    assert "attention" not in settings["kernels"]  # nothing was found out about it
    text = file_text(found, settings, {"device": "a GPU"}, ["a note"])
    assert yaml.safe_load(text) == settings
    assert "# kernels.attention=flash3 | 8192 | - | - | - | failed: ImportError: no kernel image\n" in text


def test_what_was_found_before_the_device_broke_is_kept() -> None:
    found = run(FakeBench(lambda s: 1500.0 if s.kernels.attention == "varlen" else 1000.0, broken=("fused",)))
    assert found.best.kernels == dataclasses.replace(KERNELS, attention="varlen")
    assert found.untried == ["kernels.compile=true"]
    assert found.trials[-1].what == "kernels.lora=fused"
    assert found.trials[-1].verdict == "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    with pytest.raises(ImportError):  # where the start itself breaks there is nothing to keep
        run(FakeBench(broken=("eager",)))


def test_budgets_follow_what_is_fast_within_what_fits() -> None:
    grows = run(FakeBench(lambda s: s.tokens**0.5, memory=30_000), questions=[])
    assert grows.largest == grows.best.tokens
    assert 30_000 * 7 // 8 <= grows.largest <= 30_000
    caches = run(FakeBench(lambda s: 1000.0 if s.tokens > 2048 else 2000.0), questions=[])
    assert caches.best.tokens in (512, 1024, 2048)
    falls = run(FakeBench(lambda s: 1e6 / s.tokens), questions=[])
    assert falls.best.tokens == 512  # the next power of two is below the longest sample
    small = run(FakeBench(memory=5000), questions=[])
    assert small.trials[0].verdict == "the run's own 8192 tokens do not fit"
    assert small.best.tokens == small.largest <= 5000
    with pytest.raises(DoesNotFitError):
        run(FakeBench(memory=LOW - 1))


def test_what_needs_more_memory_gets_the_budget_that_it_fits_with() -> None:
    start = Setting(8192, True, KERNELS)
    bench = FakeBench(
        lambda s: 1000.0 if s.recompute else 1300.0,
        lambda s: s.tokens * (1 if s.recompute else 4),
        memory=20_000,
        model_bytes=4000,
    )
    found = run(bench, start, [Question(RECOMPUTE, (False,))])
    assert found.best.recompute is False
    assert 4 * found.best.tokens + bench.model_bytes <= bench.memory
    assert settings_found(found, KERNELS, KERNELS)["model"] == {"activation_checkpointing": False}
    # Where two models never fit side by side nothing is kept that was not compared.
    bench = FakeBench(lambda s: 1000.0 if s.recompute else 1300.0, memory=20_000, model_bytes=11_000)
    found = run(bench, start, [Question(RECOMPUTE, (False,))])
    assert found.best.recompute is True
    assert "memory does not hold it" in verdicts(found)["model.activation_checkpointing=false"]


@given(seconds=st.floats(0.01, 120.0))
def test_whenever_the_time_is_up_the_best_so_far_fits_and_the_rest_is_named(seconds: float) -> None:
    speeds = {"flash3": 1.5, "fused": 1.5}
    bench = FakeBench(
        lambda s: 1000.0 * speeds.get(s.kernels.attention, 1.0) * speeds.get(s.kernels.lora, 1.0),
        lambda s: s.tokens * (2 if s.kernels.attention == "flash3" else 1),
        memory=10_000,
        seconds=seconds,
    )
    found = run(bench)
    if not found.has_start:
        assert found.untried[0] == "token budget"
        return
    assert ("fits", found.best) in bench.log
    assert bench.need(found.best) <= bench.memory
    tried = set(verdicts(found)) | set(found.untried)
    assert {label(q.name, value) for q in QUESTIONS for value in q.values} <= tried


@given(limit=st.integers(0, 50_000), guess=st.integers(1, 60_000), flaky=st.integers(0, 2**16))
def test_the_largest_that_fits_was_seen_to_fit_and_nothing_below_it_was_not(limit: int, guess: int, flaky: int) -> None:
    seen: dict[int, bool] = {}
    draw = random.Random(flaky)

    def fits(tokens: int, steady: bool) -> bool:
        seen[tokens] = tokens <= limit and (steady or draw.random() > 0.3)
        return seen[tokens]

    largest = largest_that_fits(lambda tokens: fits(tokens, steady=True), LOW, HIGH, guess)
    assert len(seen) <= 20
    if limit < LOW:
        assert largest == 0
    else:
        assert seen[largest]
        assert largest == HIGH or largest >= limit - max(GRAIN, largest // 8)
    seen.clear()
    largest = largest_that_fits(lambda tokens: fits(tokens, steady=False), LOW, HIGH, guess)
    assert not largest or seen[largest]
    assert all(tokens > largest for tokens, did in seen.items() if not did)


def test_fewer_layers_may_be_recomputed() -> None:
    assert [fewer_recomputed(layers) for layers in (False, 0, True, 1, 12)] == [(), (), (False,), (False,), (False, 6)]


def test_budgets_worth_timing() -> None:
    assert budgets(330, 5000, 3000) == [512, 1024, 2048, 3000, 4096, 5000]
    assert budgets(512, 512, 8192) == [512]


def test_noise_keeps_nothing_and_hides_no_large_gain() -> None:
    draw = random.Random(0)
    champion, challenger = START, START.of_tokens(4096)

    def kept(gain: float) -> int:
        def speed(setting: Setting) -> float:
            return (gain if setting == challenger else 1.0) * draw.lognormvariate(0.0, 0.2)

        return sum(compare(speed, champion, challenger).is_worth_it for _ in range(500))

    assert kept(1.0) < 0.1 * 500
    assert kept(2.0) > 0.9 * 500
    exact = compare(lambda s: WORTH * 0.999 if s == challenger else 1.0, champion, challenger)
    assert not exact.is_worth_it


def test_the_time_limit_breaks_off_what_runs() -> None:
    clock = Clock(0.2)
    with pytest.raises(OutOfTime), clock.limit(), contextlib.suppress(Exception):  # it is no error that one may handle
        time.sleep(30)
    assert clock.passed() < 20
    with pytest.raises(OutOfTime), clock.limit():
        pytest.fail("there is no time left")


def test_a_difference_is_told_where_it_is_more_than_rounding() -> None:
    loss, gradients = 2.0, {"a": torch.ones(100), "b": torch.zeros(3)}

    def against(other: float, changed: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> str:
        return describe_difference((loss, gradients), (other, changed), dtype)

    assert against(2.0 + 1e-6, {"a": torch.ones(100) * (1 + 1e-5), "b": torch.zeros(3)}) == ""
    assert against(2.01, gradients) == "the loss is 2.01, the start's 2"
    assert against(float("nan"), gradients).startswith("the loss is nan")
    assert against(2.0, {"a": torch.ones(100) * 1.5, "b": torch.zeros(3)}) == (
        "the gradient differs from the start's by 50.0%"
    )
    assert "differs" in against(2.0, {"a": torch.full((100,), float("nan")), "b": torch.zeros(3)})
    assert against(2.0, {"a": torch.ones(100)}) == "other parameters have gradients than at the start"
    assert against(2.01, {"a": torch.ones(100) * 1.02, "b": torch.zeros(3)}, torch.bfloat16) == ""


def test_which_errors_say_that_memory_ran_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
