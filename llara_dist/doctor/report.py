"""What a person sees: the findings by topic, in plain words, each with what to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llara_dist.errors import Finding

SHOWN = {
    "passed": ("ok", "green"),
    "skipped": ("–", "dim"),
    "warning": ("warning", "yellow"),
    "error": ("ERROR", "red"),
}
"""word and colour of each severity"""
NAMED = 4
"""hosts, and different wordings of one finding, that are shown; --json has all"""
ALL = ""
"""stands for every node where a finding is about all of them"""


@dataclass(frozen=True)
class Entry:
    """A finding, where it belongs and where it was made.

    Attributes:
        topic: under which it is shown.
        host: that it is about; `ALL` = the job as a whole.
        finding: what was found.
    """

    topic: str
    host: str
    finding: Finding

    def to_json(self) -> dict[str, Any]:
        """For --json, and for other ranks."""
        return {"topic": self.topic, "host": self.host, **asdict(self.finding)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Entry:
        """What `to_json` gave."""
        rest = {name: field for name, field in value.items() if name not in ("topic", "host")}
        return cls(value["topic"], value["host"], Finding(**rest))


def summary(entries: Sequence[Entry]) -> str:
    """The last line."""
    counts = {severity: sum(entry.finding.severity == severity for entry in entries) for severity in SHOWN}
    errors, warnings = counts["error"], counts["warning"]
    return f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"


def merged(entries: Sequence[Entry], hosts: Sequence[str]) -> list[Entry]:
    """What several nodes found, said once.

    What is equal on several nodes becomes one finding that names them; what passed everywhere in other words each time
    (free memory, speed) becomes the first node's; of other findings of one check the first few stay.

    Args:
        entries: of all nodes.
        hosts: all nodes.
    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.topic, entry.finding.check, entry.finding.severity), []).append(entry)
    return [each for group in groups.values() for each in _merged_group(group, hosts)]


def _merged_group(group: Sequence[Entry], hosts: Sequence[str]) -> list[Entry]:
    words: dict[tuple[str, str], list[Entry]] = {}
    for entry in group:
        words.setdefault((entry.finding.found, entry.finding.remedy), []).append(entry)
    where = {entry.host for entry in group}
    if where == {ALL} or len(hosts) < 2:
        return list(group)
    told = list(words.values())
    if group[0].finding.severity in ("passed", "skipped") and len(told) > 1:
        note = f"{group[0].host}; {len(where) - 1} other{'s' * (len(where) > 2)} alike"
        return [_on(told[0][0], note)] if len(where) > 1 else list(group)
    if group[0].finding.severity in ("passed", "skipped") and len(where) == len(hosts):
        return [told[0][0]]
    shown = [_on(same[0], _names([entry.host for entry in same], hosts)) for same in told[:NAMED]]
    left = {entry.host for same in told[NAMED:] for entry in same}
    if left:
        shown[-1] = _on(shown[-1], f"like this on {len(left)} more nodes, see --json")
    return shown


def _on(entry: Entry, note: str) -> Entry:
    finding = entry.finding
    noted = Finding(finding.check, f"{finding.found} [{note}]", finding.remedy, finding.severity, finding.everywhere)
    return Entry(entry.topic, entry.host, noted)


def _names(found: Sequence[str], hosts: Sequence[str]) -> str:
    if len(set(found)) == len(hosts):
        return f"all {len(hosts)} nodes"
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ", ".join(found[:NAMED]) + more


def show(topic: str, findings: Iterable[Finding]) -> None:
    """Print a topic: severity, check, what was found, and below it what to do."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=topic, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    drawn.add_column(width=7, no_wrap=True)
    drawn.add_column(width=15)
    drawn.add_column(overflow="fold")
    for finding in findings:
        word, style = SHOWN[finding.severity]
        drawn.add_row(Text(word, style), finding.check, finding.found)
        if finding.remedy and finding.severity in ("warning", "error"):
            drawn.add_row("", "", Text(f"→ {finding.remedy}", style))
    console = Console(markup=False, highlight=False)
    console.print(drawn)
    console.print()
