"""What a cluster wants of every job, said once: ~/.config/llara-dist/site.yaml. Stdlib and YAML only."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from llara_dist.errors import InputError

VARIABLE = "LLARA_DIST_SITE"
"""Environment variable that names another site file."""
DEFAULT = Path("~/.config/llara-dist/site.yaml")

GpuOption = Literal["gpus-per-node", "gres", "none"]


@dataclass(frozen=True)
class Container:
    """What the program runs in: a command put before it, or an image that Slurm's pyxis plugin starts; or neither.

    Attributes:
        command: words put before the program, e.g. apptainer, exec, --nv, /data/image.sif.
        image: srun's --container-image.
        mounts: srun's --container-mounts, each "host path:path in the container".
    """

    command: tuple[str, ...] = ()
    image: str = ""
    mounts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.command and (self.image or self.mounts):
            raise InputError("container: command and image are two ways of the same; give one")
        if self.mounts and not self.image:
            raise InputError("container.mounts needs container.image")


@dataclass(frozen=True)
class Site:
    """A site file; every field may be left out.

    Attributes:
        partition: where jobs go unless their options say otherwise; "" = Slurm's default. So the next three.
        account: to charge.
        qos: quality of service.
        constraint: features of the nodes.
        sbatch: further options of sbatch, e.g. "--exclusive".
        srun: further options of srun, e.g. "--mpi=none".
        setup: shell lines that every task runs before the program, e.g. "module load cuda".
        environment: variables set for every task.
        container: what the program runs in.
        python: interpreter of the tasks; by default the one that submits.
        gpus: how GPUs are asked for: --gpus-per-node, --gres=gpu:N, or none where Slurm knows of no GPUs.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    container: Container = field(default_factory=Container)
    python: str = sys.executable
    gpus: GpuOption = "gpus-per-node"

    def to_yaml(self) -> str:
        """The text of a site file that reads as this site."""
        values = dataclasses.asdict(self)
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        container = {
            name: list(value) if isinstance(value, tuple) else value for name, value in values["container"].items()
        }
        return yaml.safe_dump({**values, **lists, "container": container}, sort_keys=False, allow_unicode=True)


def read_site(path: Path | None = None) -> Site:
    """Read a site file.

    Args:
        path: the file; None = $LLARA_DIST_SITE, else ~/.config/llara-dist/site.yaml, which need not be there.

    Raises:
        InputError: a file that was named is missing; no YAML mapping; an unknown field, or one of the wrong kind.
    """
    named = os.environ.get(VARIABLE) or None
    chosen = Path(path or named or DEFAULT).expanduser()
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None and named is None:
            return Site()
        source = "" if path is not None else f" ({VARIABLE} names it)"
        raise InputError(f"{chosen}: not found{source}; expected a site file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"{chosen}: cannot be read ({reason}); expected a site file") from None
    return parse_site(text, str(chosen))


def parse_site(text: str, shown: str) -> Site:
    """A site from a file's text; `shown` names the file in messages.

    Raises:
        InputError: no YAML mapping; an unknown field, or one of the wrong kind.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{shown}: {place}not YAML ({problem})") from None
    try:
        given = _convert({} if values is None else values, _FIELDS, "")
        return Site(**given)
    except InputError as error:
        raise InputError(f"{shown}: {error}") from None


def _convert(values: Any, kinds: Mapping[str, Callable[[Any, str], Any]], where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('.') or 'the file'} must be a mapping of fields, found {values!r:.60}")
    for name in values:
        if name not in kinds:
            raise InputError(f"unknown field {where}{name}; known are {', '.join(kinds)}")
    return {name: kinds[name](value, where + name) for name, value in values.items() if value is not None}


def _text(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{where} must be text, found {value!r:.60}; put it in quotes")
    text = str(value)
    if "\0" in text:
        raise InputError(f"{where} holds a zero byte, which no command line can")
    return text


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where} must be a list of texts, found {value!r:.60}; write [...]")
    return tuple(_text(entry, f"{where}[{place}]") for place, entry in enumerate(value))


def _environment(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a mapping of variables, found {value!r:.60}")
    for name in value:
        if not isinstance(name, str):  # YAML's NO, ON and Y are truth values
            raise InputError(f"{where}: {name!r} is no name of a variable; put it in quotes")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"{where}: {name!r} is no name of a variable")
    return {name: _text(entry, f"{where}.{name}") for name, entry in value.items()}


def _container(value: Any, where: str) -> Container:
    return Container(**_convert(value, {"command": _texts, "image": _text, "mounts": _texts}, f"{where}."))


def _gpus(value: Any, where: str) -> GpuOption:
    if value not in get_args(GpuOption):
        raise InputError(f"{where} must be one of {', '.join(get_args(GpuOption))}, found {value!r:.60}")
    return cast(GpuOption, value)


_FIELDS: dict[str, Callable[[Any, str], Any]] = {
    "partition": _text,
    "account": _text,
    "qos": _text,
    "constraint": _text,
    "sbatch": _texts,
    "srun": _texts,
    "setup": _texts,
    "environment": _environment,
    "container": _container,
    "python": _text,
    "gpus": _gpus,
}
