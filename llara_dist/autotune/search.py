"""Which settings are tried, in which order, and which are kept: decides, measures nothing itself.

First the token budget: the largest row that fits, then the fastest of those up to it. Then one setting at a time
against the best so far (coordinate search). Last the budget again, where settings have changed. A setting whose results
differ is refused before it is timed; what is timed is kept where `comparison.py` finds it faster beyond noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llara_dist.autotune.bench import Bench, DoesNotFitError
from llara_dist.autotune.budget import budgets, largest_that_fits
from llara_dist.autotune.clock import OutOfTime
from llara_dist.autotune.comparison import WORTH, Comparison, compare
from llara_dist.autotune.found import Found, Trial
from llara_dist.autotune.settings import Question, Setting, label

COMPILE_S = 40.0
"""seconds that must be left for torch.compile to be tried, beside the loading (assumed)"""
BUDGET = "token budget"


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
    pending = [BUDGET, *(label(q.name, v) for q in questions for v in q.values)]
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
    what = label(name, value)

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
