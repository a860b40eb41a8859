"""A view of a run as a person reads it: a few lines, then its ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from llara_dist.supervision.diagnosis import ranges
from llara_dist.supervision.progress import Phase
from llara_dist.supervision.step_clock import StepCost
from llara_dist.training.pace import duration
from llara_dist.watching.look import View
from llara_dist.watching.marks import Judged, Mark

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SHOWN = 40
"""ranks of a run that is shown rank by rank; of a larger one a summary and the ranks that stand out"""
ODD = 6
"""of these at most by mark"""
_WIDE = 110
_WIDE_COLUMNS = (
    *("rank", "host", "pid", "step", "mb", "phase", "wait s", "compute s", "exchange s", "samples/s", "MiB", "seen"),
    "",
)
_NARROW_COLUMNS = ("rank", "host", "step", "phase", "wait s", "compute s", "MiB", "seen", "")
_COLOURS = {
    **dict.fromkeys((Mark.FAILED, Mark.DEAD, Mark.SILENT, Mark.STUCK), "bold red"),
    **dict.fromkeys((Mark.SLOW, Mark.WAITS), "yellow"),
    Mark.STOPPED: "dim",
    Mark.NONE: "",
}


def draw(view: View, width: int, every_rank: bool = False) -> RenderableType:
    """The whole screen.

    Args:
        view: of the run.
        width: columns of the terminal.
        every_rank: show every rank, however many there are.
    """
    from rich.console import Group
    from rich.text import Text

    lines = headline(view)
    parts: list[RenderableType] = [Text(lines[0], "bold"), Text(lines[1], "dim"), *map(Text, lines[2:])]
    if not view.ranks:
        return Group(*parts)
    shown = list(view.ranks)
    if not every_rank and len(shown) > SHOWN:
        parts += [Text(phases(view.ranks)), summary_table(view.ranks)]
        shown = [each for mark in Mark if mark for each in [r for r in view.ranks if r.mark is mark][:ODD]]
    if shown:
        parts.append(ranks_table(shown, width))
    parts += [Text(line, no_wrap=True, overflow="ellipsis") for line in others(view.ranks, shown)]
    return Group(*parts, *map(Text, reasons(shown)))


def headline(view: View) -> list[str]:
    """The run in a few lines; what is known of it, so short that 80 columns hold it."""
    lines = [f"{view.run}  {view.state}", "no job has taken it yet"]
    if view.lock is not None:
        job, host = view.lock.job, _short(view.lock.process.host)
        name = f"job {job.name} (restart {job.restart})" if job.name else "without a job id"
        lines[1] = f"{name}, {host}, pid {view.lock.process.pid}, since {view.lock.taken_at[:19].replace('T', ' ')}"
    row, pace, total = view.row, view.pace, view.total_steps
    if row is not None:
        told = [f"step {view.done:,}/{total:,} ({view.done / total:.1%})" if total else f"step {view.done:,}"]
        told.append(f"epoch {row['epoch']}" if "epoch" in row else "")
        told.append(f"loss {'not finite' if row.get('loss') is None else format(row['loss'], '.4f')}")
        if "p" in row and "hybrid_share" in row:
            told.append(f"p {row['p']:.3f} (realised {row['hybrid_share']:.3f})")
        told.append(f"skipped {row['skipped_steps']}" if row.get("skipped_steps") else "")
        lines.append(_joined(told))
    if pace is not None:
        memory = max((each.record.memory_mib or 0.0 for each in view.ranks), default=0.0)
        told = [f"{pace.tokens_per_s:,.0f} tokens/s", f"{pace.samples_per_s:,.1f} samples/s"]
        told += [f"wait {pace.wait_share:.1%}", "" if pace.mfu is None else f"MFU {pace.mfu:.1%}"]
        told.append(f"{memory:,.0f} MiB" if memory else "")
        told.append("" if view.is_over or not total else f"ETA {duration(pace.left_s(view.done, total))}")
        lines.append(_joined(told))
    told = ["nothing saved yet" if view.saved is None else f"saved: step {view.saved:,}"]
    for name, scores in (("validated", view.validation), ("best", view.best)):
        if scores is not None and "hit_ratio" in scores:
            told.append(f"{name}: step {scores['step']:,}, HR@1 {scores['hit_ratio']:.4f}")
    lines.append(_joined(told))
    if view.missing and view.ranks:
        lines.append(f"nothing heard yet of ranks {ranges(view.missing)}")
    return lines


def _joined(parts: Sequence[str]) -> str:
    return "  ".join(part for part in parts if part)


def _short(host: str) -> str:
    """A host's name without its domain."""
    return host if host[:1].isdigit() else host.partition(".")[0]


def phases(ranks: Sequence[Judged]) -> str:
    """How many ranks there are, on how many hosts, and in which phases."""
    hosts = len({each.record.process.host for each in ranks})
    counts = Counter(str(each.record.progress.phase) for each in ranks)
    steps = sorted({each.record.progress.step for each in ranks})
    where = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    told = ", ".join(f"{phase} {count:,}" for phase, count in counts.most_common())
    return f"\n{len(ranks):,} ranks on {hosts:,} host{'s' if hosts > 1 else ''} in {where}: {told}"


def others(ranks: Sequence[Judged], shown: Sequence[Judged]) -> list[str]:
    """By mark, the ranks that stand out and are not shown."""
    there = {each.record.rank for each in shown}
    hidden = {mark: [r.record.rank for r in ranks if r.mark is mark and r.record.rank not in there] for mark in Mark}
    return [f"{mark}: {len(left):,} more, ranks {ranges(left)}" for mark, left in hidden.items() if mark and left]


def reasons(ranks: Sequence[Judged]) -> list[str]:
    """Why ranks failed, in their own words."""
    return [f"rank {each.record.rank} failed: {each.record.ended}" for each in ranks if each.mark is Mark.FAILED]


def summary_table(ranks: Sequence[Judged]) -> Table:
    """Lowest, median and highest of what the ranks say of themselves."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("of a rank", "lowest", "rank", "median", "highest", "rank"):
        table.add_column(name, justify="left" if name == "of a rank" else "right")
    measures: list[tuple[str, Callable[[StepCost], float]]] = [
        ("data wait, s a step", lambda cost: cost.wait_s),
        ("compute, s a step", lambda cost: cost.compute_s),
        ("exchange, s a step", lambda cost: cost.exchange_s),
        ("samples/s", lambda cost: cost.samples_per_s),
    ]
    found = {
        name: [(measure(each.record.cost), each.record.rank) for each in ranks if each.record.cost is not None]
        for name, measure in measures
    }
    found["memory, MiB"] = [(r.memory_mib, r.rank) for each in ranks if (r := each.record).memory_mib is not None]
    for name, values in found.items():
        if values:
            (low, first), (high, last) = min(values), max(values)
            shown = "{:,.0f}" if name == "memory, MiB" else "{:,.3f}"
            middle = median(value for value, _ in values)
            table.add_row(name, shown.format(low), str(first), shown.format(middle), shown.format(high), str(last))
    return table


def ranks_table(ranks: Sequence[Judged], width: int) -> Table:
    """Rank by rank; a narrow terminal gets fewer columns, and none of them cut but the host's."""
    from rich.table import Table

    wide = width >= _WIDE
    columns = _WIDE_COLUMNS if wide else _NARROW_COLUMNS
    rows = [_cells(each) for each in ranks]
    table = Table(box=None, pad_edge=False, padding=(0, 2 if wide else 1, 0, 0), header_style="dim")
    for name in columns:
        justify = "left" if name in ("host", "phase", "") else "right"
        least = max(len(name), *(len(row[name]) for row in rows)) if name != "host" else 4
        table.add_column(name, justify=justify, min_width=least, no_wrap=True, overflow="ellipsis")
    for each, row in zip(ranks, rows, strict=True):
        table.add_row(*(row[name] for name in columns), style=_COLOURS[each.mark])
    return table


def _cells(each: Judged) -> dict[str, str]:
    """What is said of a rank, by column."""
    record, cost, progress = each.record, each.record.cost, each.record.progress
    in_microbatch = progress.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.REDUCE, Phase.STEP)
    still = f"{each.seen.still_s:.0f} s"
    return {
        "rank": str(record.rank),
        "host": _short(record.process.host),
        "pid": str(record.process.pid),
        "step": f"{progress.step:,}" if progress.step >= 0 else "–",
        "mb": str(progress.microbatch) if in_microbatch else "–",
        "phase": str(progress.phase),
        "wait s": "–" if cost is None else f"{cost.wait_s:.3f}",
        "compute s": "–" if cost is None else f"{cost.compute_s:.3f}",
        "exchange s": "–" if cost is None else f"{cost.exchange_s:.3f}",
        "samples/s": "–" if cost is None else f"{cost.samples_per_s:,.1f}",
        "MiB": "–" if record.memory_mib is None else f"{record.memory_mib:,.0f}",
        "seen": "ended" if record.ended is not None else f"{still} ago" if each.seen.moved else f"> {still}",
        "": each.short,
    }
