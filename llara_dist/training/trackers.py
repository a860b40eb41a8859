"""Weights & Biases and MLflow, where a run asks for them: the rows of metrics.jsonl and validation.jsonl, rank 0 only.

Each tracker has a thread of its own that opens it, sends, and tries again: a server that is slow or away costs the
steps nothing. Which run it is and up to which steps it took rows stays in OUT/tracking.json, so that a resumed run goes
on in the same one: rows that it has are not handed over again, those that it missed are. Keys, addresses and offline
modes are the libraries' own environment (WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI, …): none of it is kept here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from llara_dist.config import RunConfig, TrackingConfig, to_dict
from llara_dist.console import warn
from llara_dist.errors import Finding, FindingsError
from llara_dist.integrity import write_json

STATE = "tracking.json"
CLOSE_S = 10.0
"""longest that the end of a run waits for a tracker"""
_RETRY_S = 30.0
_WAITING = 10_000
_CAUGHT_UP = _WAITING // 2
_AT_ONCE = 40
_LOG_IN = "set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE=offline"
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_PRIVATE = re.compile(r"(?<=://)[^/@\s]+@|\?\S*")

Row = tuple[str, int, dict[str, float]]
"""(kind, step, numbers by name, each name with its kind as prefix)"""


class Ending(StrEnum):
    """How a run ended, as MLflow calls it; killed: it was asked to stop, and goes on when started again."""

    FINISHED = "FINISHED"
    KILLED = "KILLED"
    FAILED = "FAILED"


class Tracker(Protocol):
    """An open run of a tracking service; its calls may block and raise whatever the library raises."""

    def send(self, rows: list[Row]) -> None:
        """Log rows, steps ascending."""
        ...

    def close(self, ending: Ending) -> None:
        """Nothing more comes."""
        ...


def check_tracking(settings: TrackingConfig, is_main: bool = True) -> None:
    """The packages of the trackers that are asked for are installed, and W&B has credentials where it needs them.

    Args:
        settings: what is asked for.
        is_main: whether this process is the one that opens them; credentials are looked for on it alone.

    Raises:
        FindingsError: something is missing.
    """
    findings = [
        Finding(
            "tracking",
            f"tracking.{name}={wanted}: {name} is not installed",
            f"pip install {package}, or leave tracking.{name} empty",
        )
        for name, package in _PACKAGES.items()
        if (wanted := getattr(settings, name)) and importlib.util.find_spec(name) is None
    ]
    if settings.wandb and is_main and not findings and (missing := _wandb_lacks()):
        found = f"tracking.wandb={settings.wandb}: {missing}"
        findings.append(Finding("tracking", found, _LOG_IN, everywhere=False))
    if findings:
        raise FindingsError(findings, "tracking")


def _wandb_lacks() -> str:
    """What W&B lacks to take a run, "" = nothing that can be told before it is opened in the background."""
    try:
        return "" if _has_wandb_credentials() else "W&B has no API key"
    except Exception as error:  # it may pass: then the run would have stood still for nothing
        malformed = type(error).__name__ == "AuthenticationError"
        return without_secrets(" ".join(str(error).split())[:300]) if malformed else ""


def _has_wandb_credentials() -> bool:
    """Whether W&B has credentials or its mode needs none; nobody is asked for them, and no server.

    On a terminal `wandb.init` would ask for a key, from a thread that outlives the run.
    """
    import wandb  # pyright: ignore[reportMissingImports] (optional)

    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    return mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False, verify=False)


class Memory:
    """OUT/tracking.json: by tracker, which run of which project it is, and up to which steps it was told.

    Args:
        out: the run's folder.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / STATE
        self._lock = threading.Lock()
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = None
        self._values: dict[str, Any] = known if isinstance(known, dict) else {}

    def of(self, name: str, project: str) -> dict[str, Any]:
        """`project`, `id` and `told` of a tracker; the latter two empty where its project was another one."""
        blank = {"project": project, "id": "", "told": {}}
        known = self._values.get(name)
        if not isinstance(known, dict) or known.get("project") != project:
            return blank
        return blank | {key: value for key, value in known.items() if type(value) is type(blank.get(key))}

    def keep(self, name: str, project: str, changes: Mapping[str, Any]) -> None:
        """Remember, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            self._values[name] = self.of(name, project) | dict(changes)
            write_json(self._path, self._values)


class Background:
    """Hands rows to a tracker from a thread, which opens it, and again after an outage; says once that there is one.

    Args:
        name: of the tracker, as messages say it.
        begin: opens it.
        told: by kind of row, the last step that it was told before this start.
        keep: given it anew as {"told": …} each time that the tracker took rows; may raise OSError.
    """

    def __init__(
        self,
        name: str,
        begin: Callable[[], Tracker],
        told: Mapping[str, int],
        keep: Callable[[dict[str, Any]], None] = lambda changes: None,
    ) -> None:
        self._name, self._begin, self._before, self._keep = name, begin, dict(told), keep
        self._told = dict(told)
        self._ending = Ending.FINISHED
        self._rows: queue.Queue[Row | None] = queue.Queue(_WAITING)
        self._lost = 0
        self._closing = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def log(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Hand a row over, unless the tracker has it from before a restart; never waits.

        Args:
            kind: train or validation; the names' prefix.
            step: of the row.
            numbers: by name.
        """
        if step <= self._before.get(kind, -1):
            return
        try:
            self._rows.put_nowait((kind, step, {f"{kind}/{name}": float(value) for name, value in numbers.items()}))
        except queue.Full:
            self._lost += 1

    def close(self, ending: Ending = Ending.FINISHED) -> None:
        """Wait, for CLOSE_S at most, until everything is handed over.

        Args:
            ending: of the run.
        """
        self._ending = ending
        self._closing.set()
        try:
            self._rows.put_nowait(None)
        except queue.Full:
            self._lost += 1
        self._thread.join(CLOSE_S)
        lost = self._lost + self._rows.qsize()
        if self._thread.is_alive() or lost:
            warn(f"{self._name}: it did not take all of the run's rows in time; metrics.jsonl holds every one")

    def _run(self) -> None:
        tracker: Tracker | None = None
        rows, ended = self._take()
        while rows or not ended:
            try:
                tracker = tracker or self._begin()
                tracker.send(rows)
            except Exception as error:  # whatever a service's library raises, it is no reason to lose a run
                self._complain(error)
                if self._closing.wait(_RETRY_S):
                    self._lost += len(rows)
                    return
                continue
            self._told |= {kind: step for kind, step, _ in rows}
            with contextlib.suppress(OSError):  # then a restart hands them over again
                self._keep({"told": dict(self._told)})
            rows, ended = ([], True) if ended else self._take()
        if tracker is not None:
            try:
                tracker.close(self._ending)
            except Exception as error:
                self._complain(error)

    def _take(self) -> tuple[list[Row], bool]:
        """Some rows, as soon as there are any, and whether they are the last."""
        taken = [self._rows.get()]
        while len(taken) < _AT_ONCE and not self._rows.empty():
            taken.append(self._rows.get())
        rows = [row for row in taken if row is not None]
        return rows, len(rows) < len(taken)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            reason = without_secrets(" ".join(str(error).split())[:300])
            warn(f"{self._name}: {type(error).__name__}: {reason}; the run goes on, and it is tried again")
        self._complained = True


class WandbRun:
    """A run of Weights & Biases; the library keeps what a server cannot take in OUT/wandb.

    Args:
        settings: project and name.
        out: the run's folder.
        run_id: the same for every start.
        config: of the run, without secrets.
    """

    def __init__(self, settings: TrackingConfig, out: Path, run_id: str, config: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports] (optional)

        if not _has_wandb_credentials():
            raise ConnectionError(f"no API key: {_LOG_IN}")
        # Its console capture would take file descriptors 1 and 2 from the rank's log, its account of the machine holds
        # the command line, and who leaves Python waits for an attempt to begin.
        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, init_timeout=CLOSE_S
        )
        if hasattr(quiet, "finish_timeout"):
            quiet.finish_timeout = CLOSE_S
        self._run = wandb.init(
            project=settings.wandb,
            name=settings.name or out.name,
            id=run_id,
            resume="allow",
            dir=str(out),
            config=config,
            settings=quiet,
        )

    def send(self, rows: list[Row]) -> None:
        """Log rows; the library queues them."""
        for _, step, numbers in rows:
            self._run.log(numbers, step=step)

    def close(self, ending: Ending) -> None:
        """Upload what is left."""
        self._run.finish(exit_code=0 if ending is Ending.FINISHED else 1)


class MlflowRun:
    """A run of an MLflow experiment.

    Args:
        settings: experiment and name.
        out: the run's folder.
        run_id: of an earlier start; "" = none.
        config: of the run, without secrets.
        keep: told the id of a new run.
    """

    def __init__(
        self, settings: TrackingConfig, out: Path, run_id: str, config: dict[str, Any], keep: Callable[[str], None]
    ) -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports] (optional)
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports] (optional)

        self._client = MlflowClient()
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(settings.mlflow)
            place = self._client.create_experiment(settings.mlflow) if experiment is None else experiment.experiment_id
            run_id = self._client.create_run(place, run_name=settings.name or out.name).info.run_id
            keep(run_id)
            self._client.log_batch(run_id, params=[Param(name, value) for name, value in _flat(config).items()])
        self._run_id = run_id

    def send(self, rows: list[Row]) -> None:
        """Log rows in one request."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports] (optional)

        now = round(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for _, step, numbers in rows for name, value in numbers.items()]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, ending: Ending) -> None:
        """Say that the run has ended, and how."""
        self._client.set_terminated(self._run_id, status=str(ending))


def open_trackers(config: RunConfig, logged: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Background]:
    """The trackers that a run asks for; opened in the background, which begins with the rows that they missed.

    Args:
        config: the run.
        logged: by kind, the rows of earlier starts that the run goes on from.
    """
    settings, out, public = config.tracking, config.out, without_secrets(to_dict(config))
    memory = Memory(out)

    def begin_wandb() -> Tracker:
        known = memory.of("wandb", settings.wandb)
        if not known["id"]:
            memory.keep("wandb", settings.wandb, {"id": secrets.token_hex(4)})
        return WandbRun(settings, out, memory.of("wandb", settings.wandb)["id"], public)

    def begin_mlflow() -> Tracker:
        known = memory.of("mlflow", settings.mlflow)
        keep = partial(memory.keep, "mlflow", settings.mlflow)
        return MlflowRun(settings, out, known["id"], public, lambda id: keep({"id": id}))

    asked: dict[str, tuple[str, Callable[[], Tracker]]] = {
        "wandb": (settings.wandb, begin_wandb),
        "mlflow": (settings.mlflow, begin_mlflow),
    }
    opened = []
    for name, (project, begin) in asked.items():
        if project:
            told = memory.of(name, project)["told"]
            tracker = Background(name, begin, told, partial(memory.keep, name, project))
            missed = _missed(logged, told)
            if len(missed) > _CAUGHT_UP:
                warn(f"{name}: of {len(missed)} rows that it missed it gets the newest {_CAUGHT_UP}")
            for kind, row in missed[-_CAUGHT_UP:]:
                tracker.log(kind, row["step"], numbers_of(row))
            opened.append(tracker)
    return opened


def _missed(
    logged: Mapping[str, Sequence[Mapping[str, Any]]], told: Mapping[str, int]
) -> list[tuple[str, Mapping[str, Any]]]:
    """Rows with their kinds, in the order in which they were logged: what is validated after n steps before step n."""
    missed = [(kind, row) for kind, rows in logged.items() for row in rows if row["step"] > told.get(kind, -1)]
    return sorted(missed, key=lambda each: (each[1]["step"], each[0] == "train"))


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a log's row is a number, by name; without its step."""
    return {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}


def without_secrets(value: Any) -> Any:
    """The same value with user, password and query taken out of every URL in it."""
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    if isinstance(value, str) and "://" in value:
        return _PRIVATE.sub("", value)
    return value


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, str]:
    """Nested settings by their dotted names."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) else {f"{where}{name}": str(value)}
    return flat
