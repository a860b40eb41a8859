"""What doctor makes of many nodes: what they must have in common, and how it is told."""

from __future__ import annotations

import json

import pytest

from llara_dist.doctor import agreement
from llara_dist.doctor.report import ALL, Entry, merged, show, summary
from llara_dist.errors import Finding

GO = {"token": "/runs/.token", "problem": ""}


def rank(host: str, local_rank: int, **changes: object) -> dict:
    code = {"version": "1", "commit": "a" * 40}
    return {"host": host, "local_rank": local_rank, "code": code, "versions": {"torch": "2.13.0"}, **changes}


def gave(chip: str = "", **changes: object) -> dict:
    right = {"seconds": 0.1, "right": True}
    return {"clock": 100.0, "seen_after_s": 0.1, "gpus": 2 if chip else 0, "gpu": chip, "gloo": right, **changes}


RANKS = {0: rank("a", 0), 1: rank("a", 1), 2: rank("b", 0), 3: rank("b", 1)}
TRIED = {number: gave(f"GPU-{number}") for number in RANKS}


def problems(ranks: dict | None = None, tried: dict | None = None, go: dict | None = None) -> list[Finding]:
    found = agreement.check_all({**RANKS, **(ranks or {})}, {**TRIED, **(tried or {})}, go or GO)
    return [finding for finding in found if finding.severity not in ("passed", "skipped")]


def test_nodes_that_agree_pass() -> None:
    assert problems() == []
    found = {finding.check: finding.found for finding in agreement.check_all(RANKS, TRIED, GO)}
    assert found["ranks"] == "4 on 2 nodes"
    assert found["places"] == "2 ranks on each, 2 GPUs visible"
    assert found["all-reduce"].startswith("gloo, 4 ranks: right")


@pytest.mark.parametrize(
    ("ranks", "tried", "go", "severity", "says"),
    [
        (
            {2: rank("b", 0, code={"version": "1", "commit": "b" * 40})},
            {},
            GO,
            "error",
            "commit differs: aaaaaaaaaaaa on a; bbbbbbbbbbbb on b",
        ),
        ({2: rank("b", 0, versions={"torch": "2.12.0"})}, {}, GO, "error", "torch differs: 2.13.0 on a; 2.12.0 on b"),
        ({}, {2: gave("GPU-2", clock=160.0)}, GO, "warning", "b is 60 s ahead of a"),
        ({}, {2: gave("GPU-2", seen_after_s=None)}, GO, "error", "b: a file that rank 0 wrote to /runs is not seen"),
        ({}, {2: gave("GPU-2", seen_after_s=9.0)}, GO, "warning", "b last, after 9.0 s"),
        ({}, {}, {"token": "", "problem": "/runs: Read-only file system"}, "error", "Read-only"),
        ({}, {3: gave("GPU-2")}, GO, "error", "b: 2 ranks share 1 GPUs"),
        ({}, {3: gave("none of its own")}, GO, "error", "b: 2 ranks share 1 GPUs"),
        ({}, {2: gave("GPU-2", gpus=8), 3: gave("GPU-3", gpus=8)}, GO, "warning", "GPUs a node differ"),
        ({}, {2: gave(), 3: gave()}, GO, "error", "GPUs a node differ"),
        ({3: rank("c", 0)}, {}, GO, "warning", "ranks a node differ"),
        ({3: rank("b", 0)}, {}, GO, "error", "several ranks have local rank 0"),
        ({}, {1: gave("GPU-1", gloo={"problem": "timed out"})}, GO, "error", "rank 1 on a: timed out"),
        ({}, {1: gave("GPU-1", gloo={"seconds": 0.1, "right": False})}, GO, "error", "a wrong sum"),
    ],
)
def test_nodes_that_do_not_agree(ranks: dict, tried: dict, go: dict, severity: str, says: str) -> None:
    found = problems(ranks, tried, go)
    assert [finding.severity for finding in found] == [severity]
    assert says in found[0].found


def test_a_rank_that_fell_silent_is_named() -> None:
    found = agreement.check_all(RANKS, {number: TRIED[number] for number in (0, 1, 2)}, GO)
    assert "rank 3 on b fell silent" in next(finding.found for finding in found if finding.severity == "error")


def on(host: str, finding: Finding) -> Entry:
    return Entry("folders", host, finding)


HOSTS = [f"node-{number:02}" for number in range(64)]


def test_what_all_nodes_found_is_said_once() -> None:
    full = Finding("disk", "full", "free some")
    (entry,) = merged([on(host, full) for host in HOSTS], HOSTS)
    assert entry.finding.found == "full [all 64 nodes]"
    (entry,) = merged([on(host, full) for host in HOSTS[:6]], HOSTS)
    assert entry.finding.found == "full [node-00, node-01, node-02, node-03 and 2 more]"


def test_what_passed_everywhere_alike_needs_no_names() -> None:
    entries = [on(host, Finding("disk", "roomy", severity="passed")) for host in HOSTS]
    assert merged(entries, HOSTS) == entries[:1]
    (entry,) = merged(entries[:2], HOSTS)
    assert entry.finding.found == "roomy [node-00, node-01]"


def test_what_passed_in_other_words_is_said_once() -> None:
    entries = [on(host, Finding("disk", f"{n} GiB free", severity="passed")) for n, host in enumerate(HOSTS)]
    (entry,) = merged(entries, HOSTS)
    assert entry.finding.found == "0 GiB free [node-00; 63 others alike]"


def test_of_many_different_warnings_some_are_shown_and_the_rest_counted() -> None:
    entries = [on(host, Finding("disk", f"{n} MB/s", "", "warning")) for n, host in enumerate(HOSTS)]
    shown = [entry.finding.found for entry in merged(entries, HOSTS)]
    assert len(shown) == 4
    assert shown[0] == "0 MB/s [node-00]"
    assert "60 more nodes" in shown[-1]


def test_a_single_node_is_not_named() -> None:
    entries = [on("here", Finding("disk", "full")), Entry("all", ALL, Finding("ranks", "1"))]
    assert merged(entries, ["here"]) == entries


def test_entries_travel_as_json() -> None:
    entry = on("node-01", Finding("disk", "full", "free some", "warning", False))
    assert Entry.from_json(json.loads(json.dumps(entry.to_json()))) == entry


def test_the_last_line_counts() -> None:
    two = [on("a", Finding("x", "y")), on("a", Finding("x", "y", "", "warning")), on("a", Finding("x", "y"))]
    assert summary(two) == "2 errors, 1 warning"
    assert summary([]) == "0 errors, 0 warnings"


@pytest.mark.parametrize("width", [80, 120])
def test_a_topic_fits_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    words = "a folder with a long name " * 6
    show("folders", [Finding("run folder", words + "/p" * 90, "choose another folder " * 5, "warning")])
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert lines[0].rstrip() == "folders"
    assert lines[1].startswith("warning  run folder       a folder")
    assert any("→ choose another folder" in line for line in lines)
    assert "/p" * 90 in "".join(line.strip() for line in lines)
