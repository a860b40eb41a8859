"""Questions with a time limit: answers, refusals, crashes, hangs."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from llara_dist.doctor.bounded import ProbeError, ask, call
from llara_dist.errors import InputError

# Functions that `call` runs in a process of their own.


def sleep(seconds: float) -> None:
    subprocess.run(["sleep", str(seconds)])


def die() -> None:
    os.kill(os.getpid(), 11)


def refuse() -> None:
    raise InputError("file: wrong; correct it")


def break_down() -> None:
    raise ZeroDivisionError("by zero\nand more")


def chatter() -> dict[str, str | None]:
    print("a library talks")
    os.system("echo and so do its children")
    return {"rank": os.environ.get("RANK")}


def test_a_function_is_called_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert call(chatter, 60.0) == {"rank": None}
    assert call(chatter, 60.0, alone=False) == {"rank": "3"}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (die, "died: killed: Segmentation fault"),
        (refuse, "^file: wrong; correct it$"),
        (break_down, "^ZeroDivisionError: by zero$"),
    ],
)
def test_what_breaks_is_said(function, says: str) -> None:
    with pytest.raises(ProbeError, match=says) as caught:
        call(function, 60.0)
    assert not caught.value.everywhere


def test_what_hangs_is_ended_with_its_children() -> None:
    seconds = 3600 + os.getpid() / 1e6  # no other test's
    start = time.monotonic()
    with pytest.raises(ProbeError, match="no answer within 3 s"):
        call(sleep, 3.0, seconds=seconds)
    assert time.monotonic() - start < 60
    deadline = time.monotonic() + 30
    while str(seconds) in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, "its child is left behind"
        time.sleep(0.1)


def test_a_program_that_is_not_there() -> None:
    assert ask(["llara-dist-nothing"], 1.0) is None
    answer = ask(["sh", "-c", "echo no >&2; exit 3"], 30.0)
    assert answer is not None
    assert (answer.code, answer.last_error) == (3, "no")
