"""Which settings are tried, in which order, and which are kept: decides, measures nothing itself.

First the token budget: the largest row that fits, then the fastest of those up to it. Then one setting at a time
against the best so far (coordinate search). Last the budget again, where settings have changed.

Two settings are timed in turn, window by window, so that what slows the machine down slows both. The new one is kept
where the median of the windows' ratios exceeds `WORTH` and all of them but one exceed 1. That is a sign test: of two
equal settings it keeps the new one in less than a tenth of all cases, however loud the noise. A setting whose results
differ is refused before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from llara_dist.autotune.clock import OutOfTime
from llara_dist.config import KernelsConfig

WORTH = 1.03
"""a setting must be so much faster than the best so far to replace it; a tie keeps what there was"""
ROUNDS = 7
"""pairs of windows at most; fewer where the outcome is clear"""
CLEAR = 5
"""pairs that are enough where all of them exceed `WORTH`"""
GRAIN = 256
"""tokens: budgets are found to a multiple of it"""
COMPILE_S = 40.0
"""seconds that must be left for torch.compile to be tried, beside the loading (assumed)"""
RECOMPUTE = "activation_checkpointing"
BUDGET = "token budget"


@dataclass(frozen=True)
class Setting:
    """What is tuned.

    Attributes:
        tokens: `data.max_tokens_per_microbatch`.
        recompute: `model.activation_checkpointing`.
        kernels: by name, without `auto`.
    """

    tokens: int
    recompute: bool | int
    kernels: KernelsConfig

    def value(self, name: str) -> Any:
        """What a question's field is set to."""
        return self.recompute if name == RECOMPUTE else getattr(self.kernels, name)

    def having(self, name: str, value: Any) -> Setting:
        """The same with one field of the model's or the kernels' changed."""
        if name == RECOMPUTE:
            return dataclasses.replace(self, recompute=value)
        return dataclasses.replace(self, kernels=dataclasses.replace(self.kernels, **{name: value}))

    def of_tokens(self, tokens: int) -> Setting:
        """The same with another budget."""
        return dataclasses.replace(self, tokens=tokens)

    @property
    def variant(self) -> Setting:
        """What one loaded model stands for: the setting without its budget."""
        return self.of_tokens(0)


class Bench(Protocol):
    """What measures. Anything may raise; a DoesNotFitError says that memory was short, and has been cleaned up."""

    def prepare(self, setting: Setting) -> None:
        """Load the model of a setting, unless it is there."""

    def release(self, setting: Setting) -> None:
        """Drop the model of a setting."""

    def difference(self, setting: Setting) -> str:
        """How the results differ from those of the first setting that was asked for; "" = by rounding only."""
        ...

    def fits(self, setting: Setting) -> bool:
        """Whether the largest row of a setting's budget can be computed in a training run."""
        ...

    def speed(self, setting: Setting) -> float:
        """Tokens per second, forward and backward, of one window; what is slow the first time is not in it."""
        ...

    def peak_bytes(self, setting: Setting) -> int | None:
        """What `fits` found a setting to need."""
        ...

    def seconds_of_trial(self) -> float:
        """What loading and comparing one more model will take, from what it took before."""
        ...


class DoesNotFitError(RuntimeError):
    """The device's memory was too small."""


@dataclass(frozen=True)
class Question:
    """A field, and values to try beside the one it has.

    Attributes:
        name: `activation_checkpointing`, or a field of KernelsConfig.
        values: in the order in which they are tried.
    """

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Trial:
    """One line of what was tried.

    Attributes:
        what: "kernels.lora=fused".
        tokens: the budget it was measured with.
        tokens_per_s: of its median window; None where it was not timed.
        ratio: of its speed to the start's; None where it was not timed.
        peak_bytes: of device memory; None where that is not known.
        verdict: kept, not kept and why.
    """

    what: str
    tokens: int
    tokens_per_s: float | None
    ratio: float | None
    peak_bytes: int | None
    verdict: str


@dataclass
class Found:
    """What a search came to; filled while it runs, so that it holds the best so far at any time.

    Attributes:
        best: fits, and is the fastest that was seen.
        largest: tokens of the largest row that was seen to fit with the start's other settings; 0 = not looked for.
        ratio: speed of `best` to the start's.
        trials: in order.
        untried: for lack of time.
        settled: fields that the run is to be given: those of which another value was timed, and what `best` needs to
            fit.
    """

    best: Setting
    largest: int = 0
    ratio: float = 1.0
    trials: list[Trial] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)

    @property
    def has_start(self) -> bool:
        """Whether so much as the start was measured."""
        return bool(self.trials)


def search(
    bench: Bench,
    found: Found,
    low: int,
    high: int,
    guess: int,
    questions: Sequence[Question],
    left: Callable[[], float],
) -> None:
    """The fastest settings, in the time that there is.

    Args:
        bench: measures.
        found: holds the run's own settings; what is found goes into it, without trials if the time was up before the
            start was measured.
        low: the smallest budget that is of use, the longest sample's tokens.
        high: the largest that is of use, a rank's whole share of a step.
        guess: budget that is expected to be the largest that fits.
        questions: beside the budget.
        left: seconds; when they are up, `bench` raises OutOfTime.

    Raises:
        DoesNotFitError: not even the longest sample alone fits.
        KeyboardInterrupt: Ctrl-C; what was found until then stays in `found`.
        Exception: what the start itself raised.
    """
    start = found.best
    pending = [BUDGET, *(f"{label(q.name)}={v}" for q in questions for v in q.values)]
    try:
        _begin(bench, found, low, high, guess)
        pending.pop(0)
        for question in questions:
            for value in question.values:
                if found.best.value(question.name) == value:
                    pending.pop(0)
                    continue
                compiling = COMPILE_S if (question.name, value) == ("compile", True) else 0.0
                if left() < bench.seconds_of_trial() + compiling:
                    found.untried.append(pending.pop(0))
                    continue
                _try(bench, found, question.name, value, low)
                pending.pop(0)
        if found.best.variant != start.variant:
            pending = [f"{BUDGET}, with the settings found"]
            _tune_budget(bench, found, low, largest_that_fits(_fits_with(bench, found.best), low, high, found.largest))
    except OutOfTime:
        found.untried += pending
    except KeyboardInterrupt:
        found.untried += pending
        raise
    except Exception as error:  # a GPU that an invalid access has stopped fails in all that follows, the clean-up too
        if not found.has_start:
            raise
        found.untried += pending[1:]
        found.trials.append(Trial(pending[0], found.best.tokens, None, None, None, f"failed: {first_line(error)}"))


def _fits_with(bench: Bench, setting: Setting) -> Callable[[int], bool]:
    return lambda tokens: bench.fits(setting.of_tokens(tokens))


def label(name: str) -> str:
    """A question's field as a run's settings name it."""
    return f"model.{name}" if name == RECOMPUTE else f"kernels.{name}"


def _begin(bench: Bench, found: Found, low: int, high: int, guess: int) -> None:
    """Measure the start, then find its budget."""
    start = found.best
    bench.prepare(start)
    own_fits = bench.fits(start)
    found.largest = largest_that_fits(_fits_with(bench, start), low, high, guess)
    if own_fits:
        found.largest = max(found.largest, min(start.tokens, high))
    if not found.largest:
        raise DoesNotFitError
    best = start if own_fits else start.of_tokens(found.largest)
    bench.difference(best)
    said = "the run's own" if own_fits else f"the run's own {start.tokens} tokens do not fit"
    found.best = best
    found.trials.append(Trial("start", best.tokens, bench.speed(best), 1.0, bench.peak_bytes(best), said))
    _tune_budget(bench, found, low, found.largest)


def largest_that_fits(fits: Callable[[int], bool], low: int, high: int, guess: int) -> int:
    """The largest budget that fits, to `GRAIN` or an eighth of it: by doubling or halving, then by bisection.

    What is returned was seen to fit, and nothing at or below it was seen not to.

    Args:
        fits: tries a budget.
        low: the smallest of use.
        high: the largest of use.
        guess: where to begin.

    Returns:
        Tokens; 0 where not even `low` fits.
    """
    high = max(low, high)
    tried = min(max(guess, low), high)
    good, bad = 0, high + 1
    while True:  # until both are known, or an end is reached
        if fits(tried):
            good = tried
            if bad <= high or good == high:
                break
            tried = min(2 * tried, high)
        else:
            bad = tried
            if good or bad == low:
                break
            tried = max(tried // 2, low)
    while good and bad <= high and bad - good > max(GRAIN, good // 8):
        middle = (good + bad) // 2
        middle = middle - middle % GRAIN if middle - middle % GRAIN > good else middle
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def budgets(low: int, largest: int, own: int) -> list[int]:
    """Budgets worth timing, increasing: powers of two, the run's own and the largest."""
    powers = (2**power for power in range(low.bit_length() - 1, largest.bit_length() + 1))
    return sorted({*(power for power in powers if low <= power <= largest), min(own, largest), largest})


def _tune_budget(bench: Bench, found: Found, low: int, largest: int) -> None:
    """Time a window of each budget; what seems fastest must then win against the one that there is."""
    champion = found.best
    here = min(champion.tokens, largest)
    rates: dict[int, float] = {}
    for tokens in budgets(low, largest, champion.tokens):
        setting = champion.of_tokens(tokens)
        if tokens != here and not bench.fits(setting):
            continue
        rates[tokens] = bench.speed(setting)
    for tokens, rate in rates.items():
        ratio, peak = found.ratio * rate / rates[here], bench.peak_bytes(champion.of_tokens(tokens))
        found.trials.append(Trial(BUDGET, tokens, rate, ratio, peak, "one window"))
    fastest = champion.of_tokens(max(rates, key=lambda tokens: rates[tokens]))
    if fastest.tokens != here:
        seen = _duel(bench, found, champion, fastest, BUDGET)
        if seen.is_worth_it:
            found.best, found.ratio = fastest, found.ratio * seen.ratio


def _try(bench: Bench, found: Found, name: str, value: Any, low: int) -> None:
    """One value of a field against the best so far; what it raises is its verdict."""
    champion = found.best
    challenger = champion.having(name, value)
    what = f"{label(name)}={value}"

    def note(verdict: str) -> None:
        found.trials.append(Trial(what, champion.tokens, None, None, None, verdict))

    try:
        bench.prepare(champion)
        bench.prepare(challenger)
        difference = bench.difference(challenger)
        if difference:
            note(f"refused: {difference}")
            return
        tokens = champion.tokens
        while not all(bench.fits(setting.of_tokens(tokens)) for setting in (champion, challenger)):
            if tokens <= low:
                raise DoesNotFitError
            tokens = max(tokens // 2, low)
        seen = _duel(bench, found, champion.of_tokens(tokens), challenger.of_tokens(tokens), what)
        found.settled.add(name)
        if seen.is_worth_it:
            bench.release(champion)
            if not bench.fits(challenger):
                held = largest_that_fits(_fits_with(bench, challenger), low, champion.tokens, tokens)
                challenger = challenger.of_tokens(held)
            if challenger.tokens:
                found.best, found.ratio = challenger, found.ratio * seen.ratio
    except DoesNotFitError:
        note("not timed: memory does not hold it beside the best so far")
    except Exception as error:  # whatever a package does, the search goes on without it
        note(f"failed: {first_line(error)}")
    finally:
        if found.best.variant != challenger.variant:
            bench.release(challenger)


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _duel(bench: Bench, found: Found, champion: Setting, challenger: Setting, what: str) -> Comparison:
    """Time a challenger against the champion, each with its own budget, and note the trial."""
    seen = compare(bench.speed, champion, challenger)
    verdict = "kept" if seen.is_worth_it else "slower" if seen.ratio * WORTH < 1 else "not kept: a tie, or noise"
    peak = bench.peak_bytes(challenger)
    found.trials.append(Trial(what, challenger.tokens, seen.speed, found.ratio * seen.ratio, peak, verdict))
    return seen


@dataclass(frozen=True)
class Comparison:
    """What pairs of windows showed.

    Attributes:
        ratios: speed of the challenger to the champion's, pair by pair.
        speed: the challenger's in its median window.
    """

    ratios: tuple[float, ...]
    speed: float

    @property
    def ratio(self) -> float:
        """Of the median pair."""
        return median(self.ratios)

    @property
    def is_worth_it(self) -> bool:
        """Whether the challenger is faster, beyond noise and by more than a tie."""
        return self.ratio > WORTH and sum(ratio <= 1.0 for ratio in self.ratios) <= 1

    @property
    def is_clear(self) -> bool:
        """Whether more pairs would not change the outcome, or hardly."""
        is_lost = sum(ratio <= 1.0 for ratio in self.ratios) > 1
        return is_lost or (len(self.ratios) >= CLEAR and min(self.ratios) > WORTH)


def compare(speed: Callable[[Setting], float], champion: Setting, challenger: Setting) -> Comparison:
    """Time two settings in turn.

    Args:
        speed: of one window of a setting, tokens per second.
        champion: what there is.
        challenger: what may replace it.
    """
    ratios: tuple[float, ...] = ()
    own: list[float] = []
    for turn in range(ROUNDS):
        order = (champion, challenger) if turn % 2 == 0 else (challenger, champion)
        seen = {setting: speed(setting) for setting in order}
        own.append(seen[challenger])
        ratios = (*ratios, seen[challenger] / seen[champion])
        if len(ratios) > 2 and Comparison(ratios, 0.0).is_clear:
            break
    return Comparison(ratios, median(own))
