"""Hostfiles are read as DeepSpeed reads them, and what it lets pass in silence is refused with the line's number."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llara_dist.cluster.hostfile import choose, read_hostfile
from llara_dist.errors import InputError
from tests.runs import ROOT

HOSTS = {"node-a": (0, 1, 2), "node-b": (0, 1, 2), "node-c": (0, 1, 2)}
FILTERS = st.lists(
    st.tuples(st.sampled_from(sorted(HOSTS)), st.sets(st.integers(0, 2))).map(
        lambda part: part[0] + (":" + ",".join(map(str, part[1])) if part[1] else "")
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda part: part.partition(":")[0],
).map("@".join)


def test_comments_blank_lines_and_order(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# a cluster\n\nnode-b slots=2\n  10.0.0.7\tslots=1  # the old one\n")
    assert list(read_hostfile(path).items()) == [("node-b", (0, 1)), ("10.0.0.7", (0,))]


def test_the_example_is_a_hostfile() -> None:
    assert set(read_hostfile(ROOT / "launch" / "hostfile.example").values()) == {tuple(range(8))}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-a slots=8\nnode-b 8\n", "line 2: 'node-b 8': expected `HOST slots=N`"),
        ("node-a slots=8 max_slots=9\n", "line 1: 'node-a slots=8 max_slots=9': expected"),
        ("-oProxyCommand=x slots=8\n", "line 1: '-oProxyCommand=x slots=8': expected"),
        ("a;b slots=1\n", "line 1: 'a;b slots=1': expected"),
        ("node-a slots=8\nnode-a slots=8\n", "line 2: node-a is there already"),
        ("node-a slots=0\n", "line 1: node-a has no slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(InputError, match=f"^{path}") as raised:
        read_hostfile(path)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory; --hostfile names"):
        read_hostfile(tmp_path / "hosts")


@given(FILTERS, st.booleans())
def test_include_and_exclude_mean_what_they_mean_to_deepspeed(text: str, including: bool) -> None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    include, exclude = (text, "") if including else ("", text)
    theirs = parse_inclusion_exclusion({host: len(slots) for host, slots in HOSTS.items()}, include, exclude)
    expected = {host: tuple(slots) for host, slots in theirs.items()}
    if not expected or len({len(slots) for slots in expected.values()}) > 1:
        with pytest.raises(InputError, match=r"no host is left|different numbers of slots"):
            choose(HOSTS, include, exclude)
    else:
        assert list(choose(HOSTS, include, exclude).items()) == list(expected.items())


def test_the_first_hosts_and_slots() -> None:
    assert choose(HOSTS, num_nodes=2, num_gpus=1) == {"node-a": (0,), "node-b": (0,)}
    assert choose({"a": (0, 1), "b": (0,)}, num_gpus=1) == {"a": (0,), "b": (0,)}
    assert choose(HOSTS) == HOSTS


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include": "node-a", "exclude": "node-b"}, "use one of the three"),
        ({"include": "node-a", "num_nodes": 1}, "use one of the three"),
        ({"include": "node-x"}, "--include node-x: node-x is not in the hostfile"),
        ({"exclude": "node-a:3"}, "--exclude node-a:3: node-a has slots 0 to 2, not 3"),
        ({"include": "node-a:"}, "node-a has slots 0 to 2, not none"),
        ({"exclude": "node-a@node-b@node-c"}, "no host is left"),
        ({"num_nodes": 4}, "--num_nodes 4: the hostfile names 3 hosts"),
        ({"num_nodes": 0}, "--num_nodes 0: "),
        ({"num_gpus": 4}, "--num_gpus 4: node-a has 3 slots"),
        ({"exclude": "node-a:0"}, r"different numbers of slots \(node-a 2, node-b 3, node-c 3\)"),
    ],
)
def test_a_choice_that_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        choose(HOSTS, **options)
