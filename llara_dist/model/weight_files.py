"""A model folder's safetensors files: what each tensor is, known from the headers; its values, memory-mapped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llara_dist.config import ModelConfig
from llara_dist.errors import InputError

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """One tensor as its file's header describes it.

    Attributes:
        file: which file holds it.
        shape: its lengths.
        dtype: safetensors' name: F32, F16, BF16, U8, …
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFiles:
    """Every tensor of a model by name; no value is read until it is mapped.

    Args:
        config: which model; downloaded first where `path` is a hub id.

    Attributes:
        path: what the config names, for messages.
        tensors: by name, in the files' order.

    Raises:
        InputError: a file is missing or damaged, two files hold one tensor, or the index names one that is not there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.path = config.path
        self.tensors: dict[str, Stored] = {}
        for name in weight_file_names(config):
            file = model_file(config, name)
            with _opened(file) as content:
                for tensor in content.offset_keys():
                    if tensor in self.tensors:
                        raise InputError(f"{file}: holds {tensor}, which {self.tensors[tensor].file.name} holds too")
                    header = content.get_slice(tensor)
                    self.tensors[tensor] = Stored(file, tuple(header.get_shape()), str(header.get_dtype()))
        index = find_model_file(config, INDEX)
        for tensor, name in _weight_map(index).items() if index is not None else ():
            if tensor not in self.tensors:
                raise InputError(f"{self.path}: {INDEX} says that {name} holds {tensor}, it does not; fetch it again")

    @contextlib.contextmanager
    def mapped(self, names: list[str]) -> Iterator[list[Tensor]]:
        """The values of some tensors, for as long as the block lasts, as views of memory-mapped files.

        Nothing is copied. The pages that were touched are given back when the block ends and the last view is gone,
        so a copy is what must be kept.
        """
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for file in {self.tensors[name].file for name in names}:
                opened[file] = stack.enter_context(_opened(file))
            yield [opened[self.tensors[name].file].get_tensor(name) for name in names]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        content = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a whole safetensors file ({error}); fetch it again") from None
    with content as handle:
        yield handle


def weight_file_names(config: ModelConfig) -> list[str]:
    """The names of the weight files that transformers loads: one, or those that the index lists."""
    index = find_model_file(config, INDEX)
    return ["model.safetensors"] if index is None else sorted(set(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds which tensor, as the index says."""
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index}: not an index of safetensors files ({type(error).__name__}); fetch it again"
        ) from None


def model_file(config: ModelConfig, name: str) -> Path:
    """A file of the model, downloaded first where `path` is a hub id.

    Raises:
        InputError: it has none of that name.
    """
    found = find_model_file(config, name)
    if found is None:
        raise InputError(f"model.path={config.path}: has no {name}; weights in other formats are not loaded")
    return found


def find_model_file(config: ModelConfig, name: str) -> Path | None:
    """A file of the model, downloaded first where `path` is a hub id; None where the model has none of that name."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(config.path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found)
