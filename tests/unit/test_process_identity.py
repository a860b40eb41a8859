"""A process is known again, and not mistaken for a later one with its number."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

from llara_dist.supervision.process_identity import process_state, this_process


def test_running_ended_and_unreaped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = dataclasses.replace(this_process(), pid=child.pid, started=process_state(child.pid)[1])
    assert this_process().is_running() is True
    assert identity.is_running() is True
    assert dataclasses.replace(identity, started=identity.started - 1).is_running() is False  # its number was reused
    child.kill()
    while process_state(child.pid)[0] != "Z":  # ended, and its parent has not asked for it yet
        pass
    assert identity.is_running() is False
    child.communicate()
    assert identity.is_running() is False


def test_of_another_host_nothing_is_known() -> None:
    assert dataclasses.replace(this_process(), machine="another").is_running() is None
    assert dataclasses.replace(this_process(), machine="").is_running() is None
