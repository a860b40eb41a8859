"""What is tuned: a token budget, what is recomputed, and kernels; and which of their values are asked about."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from llara_dist.config import KernelsConfig

RECOMPUTE = "activation_checkpointing"


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


@dataclass(frozen=True)
class Question:
    """A field, and values to try beside the one it has.

    Attributes:
        name: `activation_checkpointing`, or a field of KernelsConfig.
        values: in the order in which they are tried.
    """

    name: str
    values: tuple[Any, ...]


def label(name: str, value: Any) -> str:
    """A question's field and one of its values as they stand on a command line: "kernels.compile=true"."""
    section = "model" if name == RECOMPUTE else "kernels"
    return f"{section}.{name}={str(value).lower() if isinstance(value, bool) else value}"
