"""All nodes of a job at once: who is there, whether they run the same code, see the same folder and can add numbers.

The ranks exchange what they found through torch's key-value store, since it works where collectives do not and tells
who did not come. It runs in a process beside each rank, so that nothing here can hang the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from llara_dist.distributed import World, pick_device, slurm_master
from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.network import reduce_numbers
from llara_dist.doctor.storage import PREFIX
from llara_dist.doctor.verdicts import error
from llara_dist.errors import Finding, InputError

ARRIVING_S = 180.0
"""how long the ranks wait for each other: nodes are examined at different speeds"""
SEEING_S = 20.0
"""how long a file may take to be seen by other nodes before it counts as not seen"""
REDUCING_S = 60.0
ENDING_S = 10.0


def meet(
    rank: int, local_rank: int, size: int, out: str, report: Sequence[Mapping[str, Any]], arriving_s: float
) -> dict[str, Any]:
    """Exchange what was found with the other ranks; called on each in a process of its own that knows the launcher.

    Args:
        rank: of this process.
        local_rank: on its node.
        size: number of ranks.
        out: the run's folder.
        report: this node's findings, given by its first rank.
        arriving_s: how long the ranks wait for each other.

    Returns:
        errors: how many were found on all nodes and between them; of rank 0 also `ranks`, what each gave, and `found`,
        the findings about all nodes.
    """
    from llara_dist.doctor.agreement import check_all

    store = _open_store(rank, size, arriving_s)
    _put(store, f"rank/{rank}", {**_this_rank(local_rank), "report": list(report)})
    if rank == 0:
        ranks = _collect(store, "rank", range(size), arriving_s)
        missing = sorted(set(range(size)) - ranks.keys())
        token = {"token": "", "problem": ""} if missing else _write_token(out)
        _put(store, "go", {"missing": missing, **token})
    go = _get(store, "go", 2 * arriving_s)
    if go["missing"]:
        raise ProbeError(f"rank {_listed(go['missing'])} of {size} did not come within {arriving_s:.0f} s")
    # GPUs are not touched before: a node that is still being examined would find them in use.
    mine: dict[str, Any] = {"clock": time.time(), **_own_gpu(local_rank)}
    if local_rank == 0:
        mine["seen_after_s"] = _wait_for_file(Path(go["token"])) if go["token"] else None
    for backend in ["gloo", *(["nccl"] if mine["gpus"] else [])]:
        mine[backend] = _within(REDUCING_S, lambda backend=backend: _reduce(store, backend, rank, local_rank, size))
    _put(store, f"tried/{rank}", mine)
    if rank != 0:
        verdict = _get(store, "verdict", 2 * REDUCING_S + SEEING_S + ENDING_S)
        _put(store, f"gone/{rank}", True)
        return verdict
    tried = _collect(store, "tried", range(size), SEEING_S + 2 * REDUCING_S)
    if go["token"]:
        Path(go["token"]).unlink(missing_ok=True)
    found = check_all(ranks, tried, go)
    errors = sum(entry["severity"] == "error" for each in ranks.values() for entry in each["report"])
    errors += sum(finding.severity == "error" for finding in found)
    _put(store, "verdict", {"errors": errors})
    _collect(store, "gone", range(1, size), ENDING_S)  # the store may be this process's
    return {
        "errors": errors,
        "ranks": [ranks[each] for each in range(size)],
        "found": [[finding.check, finding.found, finding.remedy, finding.severity] for finding in found],
    }


def _open_store(rank: int, size: int, limit_s: float) -> Any:
    """The store that the launcher's variables lead to; unlike `torch.distributed.rendezvous` it waits for nobody."""
    from torch.distributed import FileStore, PrefixStore, TCPStore

    limit = timedelta(seconds=limit_s)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    method = os.environ.get("LLARA_DIST_INIT_METHOD", "")
    if method.startswith("file://"):
        return PrefixStore(f"doctor/{restart}", FileStore(method.removeprefix("file://"), size))
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "29500")
    if address is None and (master := slurm_master()) is not None:
        address, port = master
    if address is None:
        raise ProbeError(f"{size} ranks, but MASTER_ADDR is not set; start through srun, torchrun or deepspeed")
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's own process holds the store
    try:
        store = TCPStore(address, int(port), is_master=rank == 0 and not agents, timeout=limit, wait_for_workers=False)
    except Exception as raised:  # torch's own classes
        first = str(raised).strip().splitlines()[0]
        remedy = (
            "rank 0 must run there and have examined its node (--quick is sooner); firewalls must let this port through"
        )
        raise ProbeError(
            f"rank {rank} on {socket.gethostname()} cannot reach {address}:{port} ({first}); {remedy}"
        ) from None
    return PrefixStore(f"doctor/{restart}", store)


def _put(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def _get(store: Any, key: str, limit_s: float) -> Any:
    try:
        store.wait([key], timedelta(seconds=limit_s))
    except Exception:  # a timeout; or the process that holds the store is gone
        raise ProbeError(f"rank 0 gave no answer within {limit_s:.0f} s; see what it prints") from None
    return json.loads(store.get(key))


def _collect(store: Any, name: str, ranks: Sequence[int], limit_s: float) -> dict[int, Any]:
    """What ranks put under a name, by rank; those that did not in time are left out."""
    end, found = time.monotonic() + limit_s, {}
    for rank in ranks:
        key = f"{name}/{rank}"
        with contextlib.suppress(Exception):  # a timeout
            store.wait([key], timedelta(seconds=max(0.1, end - time.monotonic())))
            found[rank] = json.loads(store.get(key))
    return found


def _this_rank(local_rank: int) -> dict[str, Any]:
    from llara_dist.ds_config import CHECKOUT
    from llara_dist.training.checkpoints.provenance import code_version
    from llara_dist.training.preflight.versions import installed_versions

    first = local_rank == 0
    return {
        "host": socket.gethostname(),
        "local_rank": local_rank,
        "code": code_version(CHECKOUT) if first else {},
        "versions": installed_versions() if first else {},
    }


def _own_gpu(local_rank: int) -> dict[str, Any]:
    """How many GPUs this rank sees, and which chip it computes on ("" without one)."""
    import torch

    if not torch.cuda.is_available():
        return {"gpus": 0, "gpu": ""}
    try:
        device = pick_device("cuda", World(local_rank=local_rank, size=local_rank + 1))
        chip = str(torch.cuda.get_device_properties(device).uuid)
    except InputError:
        chip = "none of its own"
    return {"gpus": torch.cuda.device_count(), "gpu": chip}


def _write_token(out: str) -> dict[str, Any]:
    """A file in the run's folder, or the nearest that is there, for the other nodes to see."""
    from llara_dist.training.preflight.resources import nearest_existing

    token = nearest_existing(Path(out)) / f"{PREFIX}{secrets.token_hex(8)}"
    try:
        token.write_text("seen\n")
    except OSError as problem:
        return {"token": "", "problem": f"{token.parent}: {problem.strerror}"}
    return {"token": str(token), "problem": ""}


def _wait_for_file(path: Path) -> float | None:
    """Seconds until a file is seen, None if it is not."""
    start = time.monotonic()
    while time.monotonic() - start < SEEING_S:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # has NFS ask its server again
            if path.read_text():
                return time.monotonic() - start
        time.sleep(0.1)
    return None


def _reduce(store: Any, backend: str, rank: int, local_rank: int, size: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    world = World(rank, local_rank, size)
    device = pick_device("cuda" if backend == "nccl" else "cpu", world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    named = dist.PrefixStore(backend, store)
    limit = timedelta(seconds=10 * REDUCING_S)  # else NCCL's watchdog would end the process
    dist.init_process_group(backend, store=named, rank=rank, world_size=size, timeout=limit)
    seconds, right = reduce_numbers(device, rank, size)
    dist.destroy_process_group()
    return {"seconds": seconds, "right": right}


def _within(limit_s: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, or {"problem": …}; a backend that hangs is left behind in its thread."""
    result: dict[str, Any] = {"problem": f"no answer within {limit_s:.0f} s"}

    def run() -> None:
        try:
            done = work()
            result.clear()
            result.update(done)
        except Exception as raised:  # whatever the backend raises
            result["problem"] = str(raised).strip().splitlines()[0]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return dict(result)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def examine(
    world: World, out: Path, report: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Meet the other ranks.

    Args:
        world: where this process stands.
        out: the run's folder.
        report: this node's findings, given by its first rank.

    Returns:
        What `meet` returned, None where it failed; the findings about all nodes (of rank 0), or why it failed.
    """
    limit = 3 * ARRIVING_S + SEEING_S + 2 * REDUCING_S
    try:
        met = call(
            meet,
            limit,
            alone=False,
            rank=world.rank,
            local_rank=world.local_rank,
            size=world.size,
            out=str(out.absolute()),
            report=report,
            arriving_s=ARRIVING_S,
        )
    except ProbeError as problem:
        found, _, remedy = str(problem).rpartition("; ")
        remedy = remedy if found else "see what the other ranks print, and that the launcher started all of them"
        return None, [error("meeting", found or str(problem), remedy)]
    return met, [Finding(*entry) for entry in met.get("found", [])]
