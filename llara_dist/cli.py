"""The one command line, `llara-dist …`: parses, calls, prints; no logic."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llara_dist import __version__
from llara_dist.commands import COMMANDS, GROUPS, POSITIONAL
from llara_dist.console import table
from llara_dist.distributed import end_process, read_world
from llara_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_RANK_LOST,
    EXIT_REQUEUE,
    FindingsError,
    InputError,
    RankLostError,
    RequeueError,
    RunFailedError,
)


def overview() -> str:
    """What `llara-dist --help` prints."""
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: llara-dist COMMAND [options]\n\n"
        "Tune large language models as sequential recommenders, on one process or a cluster.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\nEvery command has --help with an example, and --json prints one JSON object as its last line."
    )


def find_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the arguments into a command's name and its own arguments.

    Raises:
        InputError: no such command; lists what there is.
    """
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, list(arguments[words:])
    if arguments[0] in GROUPS:
        known = ", ".join(name for name in COMMANDS if name.startswith(arguments[0] + " "))
        raise InputError(f"{arguments[0]}: expected one of: {known}")
    raise InputError(f"unknown command {arguments[0]!r}; `llara-dist --help` lists the commands")


def normalise(name: str, arguments: list[str], switches: Collection[str] = ()) -> list[str]:
    """Accept --max-tokens for --max_tokens, a bare first argument where a command has one, switches without a value.

    Args:
        name: of the command.
        arguments: as given.
        switches: options of the command that mean true where no value follows.
    """
    spelled: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        spelled.append(
            option.replace("-", "_").replace("__", "--", 1) + equals + value if option[:2] == "--" else argument
        )
    words: list[str] = []
    for word in spelled:
        if words and words[-1] in switches and word in ("true", "false"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    words = [f"{word}=true" if word in switches else word for word in words]
    leading = {"--json", *switches}
    first = next((place for place, word in enumerate(words) if word.partition("=")[0] not in leading), None)
    if name in POSITIONAL and first is not None and not words[first].startswith("-"):
        words.insert(first, f"--{POSITIONAL[name]}")
    return words


def switches_of(function: Callable[..., Any]) -> set[str]:
    """The options of a function's own yes-or-no parameters."""
    parameters = inspect.signature(function).parameters.values()
    return {f"--{each.name}" for each in parameters if each.annotation in (bool, "bool")}


def usage(name: str, takes_run: bool) -> str | None:
    """A command's usage line; None = argparse's own, with every option.

    Of a run's settings there are some sixty: they would stand before the first word of explanation.
    """
    if takes_run:
        return f"llara-dist {name} [--config FILE]... [options]"
    handed_on = COMMANDS[name].hands_on
    return f"llara-dist {name} [options] {{{','.join(handed_on)}}} [options of that command]" if handed_on else None


def run_command(name: str, arguments: list[str]) -> None:
    """Parse the arguments by the function's signature and docstring, call it, and print its result if asked.

    Raises:
        InputError: an option is unknown or has a bad value.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from llara_dist.cluster.batch_script import array_variants
    from llara_dist.run_options import add_run_options, message_of, run_of

    command = COMMANDS[name]
    module, _, attribute = command.function.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    takes_run = "config" in inspect.signature(function).parameters
    parser = ArgumentParser(
        prog=f"llara-dist {name}",
        usage=usage(name, takes_run),
        description=command.summary,
        epilog=f"example: {command.example}",
        exit_on_error=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    own = next((place for place, word in enumerate(arguments) if word in command.hands_on), len(arguments))
    arguments, handed_on = arguments[:own], arguments[own:]
    if takes_run:
        add_run_options(parser, skip={"out"} if command.out else ())
        if command.out:
            parser.add_argument("--out", type=Path, required=True, help=command.out)
    if name == "train":
        parser.add_argument("--debug", action="store_true", help="one process, few steps, everything shown and checked")
        parser.add_argument("--profile", action="store_true", help="torch profiler trace of three steps in OUT/profile")
    else:
        # What is no option: the run's settings, which are options of their own, what is handed on, an array's runs.
        no_options: set[str | int] = {
            *(["config", "runs"] if takes_run else []),
            *(["arguments"] if command.hands_on else []),
        }
        parser.add_function_arguments(function, as_group=False, skip=no_options)

    def parse(words: list[str]) -> dict[str, Any]:
        try:
            given = dict(vars(parser.instantiate(parser.parse_args(words))))
        except ArgumentError as error:
            raise InputError(f"llara-dist {name}: {message_of(error)}; see --help") from None
        if takes_run:
            config = run_of(given)
            given = {key: value for key, value in given.items() if not hasattr(config, key)} | {"config": config}
        return given

    words = normalise(name, arguments, () if name == "train" else switches_of(function))
    variants = array_variants(words) if name == "submit" else {}
    given = parse(next(iter(variants.values()), words))
    if variants:
        given["runs"] = {index: parse(variant)["config"] for index, variant in variants.items()}
    if command.hands_on:
        given["arguments"] = handed_on
    as_json = given.pop("json")
    try:
        result = function(**given)
    except InputError as error:
        if as_json and error.result is not None and read_world().is_main:
            print(json.dumps(error.result), flush=True)
        raise
    if as_json and read_world().is_main:
        print(json.dumps(result), flush=True)


def report(error: InputError, what: str = "error") -> None:
    """Print what ended the command, several findings as a table: once a node where every rank found the same."""
    try:
        local_rank = read_world().local_rank
    except InputError:
        local_rank = 0
    if local_rank == 0 or not error.everywhere:
        if isinstance(error, FindingsError) and len(error.errors) > 1 and not error.shown:
            rows = ([finding.check, finding.found, finding.remedy] for finding in error.errors)
            table("", ["check", "found", "what to do"], rows, stderr=True)
        print(f"{what}: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command.

    Exit codes: 0; 2 bad input, one line on stderr; 1 the run failed where no restart helps; 70 another rank died or
    hung; 75 stopped on request after a checkpoint, start it again; 130 interrupted.
    """
    # DeepSpeed's launcher puts --local_rank=N before the arguments; the environment says it as well.
    given = [
        word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank=")
    ]
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if given else 2)
    if given[0] in GROUPS and given[1:2] in ([], ["-h"], ["--help"]):
        names = [name for name in COMMANDS if name.startswith(given[0] + " ")]
        print(f"llara-dist {given[0]}: {GROUPS[given[0]]}\n")
        print("\n".join(f"  llara-dist {name}  {COMMANDS[name].summary}" for name in names))
        sys.exit(0 if given[1:] else 2)
    if given[0] == "--version":
        print(__version__)
        sys.exit(0)
    try:
        run_command(*find_command(given))
    except InputError as error:
        report(error)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:
        report(InputError(f"{error.filename or given[0]}: {error.strerror or error}", everywhere=False))
        sys.exit(EXIT_BAD_INPUT)
    except RequeueError as stop:
        report(InputError(str(stop)), "stopped")
        sys.exit(EXIT_REQUEUE)
    except RankLostError as error:
        report(InputError(str(error), everywhere=False))
        sys.stdout.flush()
        os._exit(EXIT_RANK_LOST)  # an exit in order would wait for the rank that is gone
    except RunFailedError as error:
        report(InputError(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run_process(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process of its own."""
    code: str | int | None = None
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    end_process(code or 0)


if __name__ == "__main__":
    run_process()
