"""A request to stop sets a flag and ends nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from llara_dist.errors import EXIT_REQUEUE
from llara_dist.supervision.stop_signals import ONE_INTERRUPT_S, STOP_SIGNALS, StopSignals
from tests.runs import ROOT


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_remembered_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopSignals() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        for each in STOP_SIGNALS:
            os.kill(os.getpid(), each)
        assert stop.requested == number.name
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_an_interrupt_that_a_launcher_forwards_is_one_and_a_second_one_ends_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with StopSignals(speaks=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        now += ONE_INTERRUPT_S / 2
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        assert capfd.readouterr().err.count("Ctrl-C again ends at once") == 1
        now += ONE_INTERRUPT_S
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def run_signalled(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program, send SIGTERM twice and SIGUSR1 once it says "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = ""
    try:
        while "ready" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess([], process.returncode, said + rest)


def test_a_process_told_to_stop_finishes_its_step() -> None:
    ended = run_signalled(f"""
        import sys, time
        from llara_dist.supervision.stop_signals import StopSignals
        with StopSignals() as stop:
            for step in range(10**6):
                begun = step
                if step == 3:
                    print("ready")
                    while stop.requested is None:  # in mid-step
                        time.sleep(0.01)
                done = step
                if stop.requested:
                    break
            stop.ignore()
        print(stop.requested, begun, done)
        sys.exit({EXIT_REQUEUE})
    """)
    # Signals that are pending together are delivered in the order of their numbers.
    assert ended.stdout.split("\n")[1] in ("SIGTERM 3 3", "SIGUSR1 3 3")
    assert ended.returncode == EXIT_REQUEUE


def test_a_process_about_to_exit_keeps_its_exit_code() -> None:
    ended = run_signalled(f"""
        import sys, time
        from llara_dist.supervision.stop_signals import StopSignals
        with StopSignals() as stop:
            stop.ignore()
        print("ready")
        time.sleep(1)
        sys.exit({EXIT_REQUEUE})
    """)
    assert ended.returncode == EXIT_REQUEUE
