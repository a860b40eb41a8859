"""A run's settings on a command line and in a file: the options of `train`, read alike wherever a run is described."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llara_dist.config import RunConfig
from llara_dist.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_run_options(parser: ArgumentParser, skip: Iterable[str] = ()) -> None:
    """Give a parser every setting of a run as an option; --config is a YAML file of them.

    Args:
        parser: jsonargparse's.
        skip: settings that are no options here.
    """
    from jsonargparse import ActionConfigFile

    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; options after it override it")
    parser.add_class_arguments(RunConfig, as_group=True, skip=set(skip))


def run_of(values: Mapping[str, Any]) -> RunConfig:
    """The run among what a parser with a run's options instantiated; what was skipped has its default."""
    fields = dataclasses.fields(RunConfig)
    return RunConfig(**{field.name: values[field.name] for field in fields if field.name in values})


def message_of(error: ArgumentError) -> str:
    """What a parser found, in one line."""
    return " ".join(str(error.message).split())


def parse_run(words: list[str]) -> RunConfig:
    """A run's settings from --config files and options.

    Raises:
        InputError: an unknown option or a bad value.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_run_options(parser)
    try:
        return run_of(vars(parser.instantiate(parser.parse_args(words))))
    except ArgumentError as error:
        raise InputError(message_of(error)) from None


def read_run(path: Path) -> RunConfig:
    """A run's settings from a YAML or JSON file, with the types of `train`'s options: 8e-4, a string to YAML 1.1, is a
    number there.

    Args:
        path: the file, or a run's folder.

    Raises:
        InputError: the file cannot be read, or holds something else than settings of a run.
    """
    import yaml
    from jsonargparse import ArgumentParser

    path = path / "config.json" if path.is_dir() else path
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; see launch/configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path}: not YAML or JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no settings of a run")
    default = RunConfig()
    for name, value in values.items():
        if dataclasses.is_dataclass(getattr(default, str(name), None)) and not isinstance(value, dict):
            raise InputError(f"{path}: {name} must hold settings, found {value!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, as_group=True)  # a file names no further files
    try:
        return run_of(vars(parser.instantiate(parser.parse_object(values))))
    except ArgumentError as error:
        raise InputError(f"{path}: {message_of(error)}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
