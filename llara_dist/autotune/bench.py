"""What a search asks of whatever measures."""

from __future__ import annotations

from typing import Protocol

from llara_dist.autotune.settings import Setting


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
