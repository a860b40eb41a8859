"""A hub model's tokenizer is that of the revision that the weights are of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import write_llama, write_tokenizer

# In a process of its own: the hub's libraries read where the cache is when they are imported.
READ = """
import sys
from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
for place, revision in (("some/llama", "old"), ("some/llama", "new"), (sys.argv[1], None), (sys.argv[2], None)):
    print(tokenizer_hash(load_tokenizer(place, revision)))
"""


def test_the_revision_chooses_the_tokenizer(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--llama"
    snapshots = [repository / "snapshots" / (number * 40) for number in "01"]
    (repository / "refs").mkdir(parents=True)
    for name, snapshot, titles in zip(("old", "new"), snapshots, (["The Old Man"], ["Brave New World"]), strict=True):
        write_tokenizer(snapshot, titles * 9, 300)
        write_llama(snapshot, vocabulary=300)
        (repository / "refs" / name).write_text(snapshot.name)
    done = subprocess.run(
        [sys.executable, "-c", READ, *snapshots],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    old, new, first, second = done.stdout.split()
    assert old != new
    assert (old, new) == (first, second)
