"""Which ranks still answer, seen from one of them, through files and what its own host knows."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from llara_dist.supervision.diagnosis import Diagnosis, Watched, diagnose
from llara_dist.supervision.rank_status import KILLED, RankRecord, read_status, write_status
from llara_dist.supervision.shared_place import ranks_of_this_host, read_shared_place, shared_place_path


def speak_for_the_killed(out: Path, token: str) -> None:
    """Write the last place of this host's killed ranks, whose processes and memory no other host sees.

    Args:
        out: the run's folder.
        token: of the start.

    Raises:
        OSError: a status file cannot be written.
    """
    for rank in ranks_of_this_host(token):
        record = read_status(out, rank, token)
        place = read_shared_place(token, rank)
        if record is None or place is None or record.ended is not None or record.process.is_running() is not False:
            continue
        write_status(out, dataclasses.replace(record, progress=place, ended=KILLED))
        shared_place_path(token, rank).unlink(missing_ok=True)


def call_roll(out: Path, own: RankRecord, silence_s: float) -> Diagnosis:
    """Watch every other rank until its heartbeat has moved, it is known to have ended, or it was silent for too long.

    Each file is read until it is settled: twice where all is well.

    Args:
        out: the run's folder.
        own: this rank's record, as it is now.
        silence_s: how long a rank may give no sign of life.
    """
    began = time.monotonic()
    first: dict[int, int] = {}
    watched = {own.rank: Watched(own, moved=True, running=True)}
    unsettled = set(range(own.world_size)) - {own.rank}
    while unsettled and time.monotonic() < began + silence_s:
        for rank in sorted(unsettled):
            record = read_status(out, rank, own.token)
            if record is None:
                continue
            moved = record.heartbeat != first.setdefault(rank, record.heartbeat)
            running = record.process.is_running()
            if running is False or (running and not moved):  # killed, suspended, or stuck: here its place is known
                place = read_shared_place(own.token, rank)
                if place is None:  # another rank may just have put it into the file and taken the page away
                    record = read_status(out, rank, own.token) or record
                else:
                    record = dataclasses.replace(record, progress=place)
            watched[rank] = Watched(record, moved, running)
            if watched[rank].is_settled:
                unsettled.discard(rank)
        time.sleep(min(silence_s / 20, 1.0))
    speak_for_the_killed(out, own.token)  # once more: a process that is being killed lives on for a moment
    return diagnose(watched, own.world_size, time.monotonic() - began)
