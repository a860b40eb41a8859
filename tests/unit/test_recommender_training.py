import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llara_dist.data.candidates import draw_candidates
from llara_dist.data.dataset import Rows, load_dataset, row_exclusions, write_dataset
from llara_dist.data.log import Log
from llara_dist.errors import InputError
from llara_dist.recommenders.evaluation import evaluate, load_recommender, rank_rows
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.recommenders.training import train

NUM_ITEMS = 40
FAST = {"epochs": 12, "dim": 16, "heads": 2, "lr": 5e-3, "positions": "all"}


def rows_of(histories: list[list[int]], targets: list[int], first_key: int) -> Rows:
    offsets = np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)
    return Rows(
        keys=np.arange(first_key, first_key + len(targets), dtype=np.uint64),
        users=np.full(len(targets), -1, np.int32),
        offsets=offsets,
        items=np.array([item for history in histories for item in history], np.int32),
        targets=np.array(targets, np.int32),
    )


def write(out: Path, splits: dict[str, Rows], seed: int) -> None:
    none = np.zeros(0, np.int32)
    candidates = {}
    for split in ("val", "test"):
        rows = splits[split]
        offsets, items = row_exclusions(rows, np.zeros(1, np.int64), none, 0, len(rows))
        candidates[split] = draw_candidates(rows.keys, rows.targets, offsets, items, NUM_ITEMS, 10, seed, 0)
    write_dataset(
        out,
        name="walks",
        log=Log(none, none, none.astype(np.int64), [f"Item {item}" for item in range(NUM_ITEMS)], "game"),
        splits=splits,
        candidates=candidates,
        recipe={},
        max_history=10,
        min_history=3,
        counts={},
        audit={},
        notes=[],
    )


def make_dataset(out: Path, seed: int = 0) -> Path:
    """A world that a recommender can learn: each item is followed by the next one or the one after it."""
    generator = np.random.default_rng(seed)
    splits, first_key = {}, 0
    for split, count in (("train", 600), ("val", 60), ("test", 60)):
        steps = generator.integers(1, 3, size=(count, 11))
        walks = (generator.integers(NUM_ITEMS, size=(count, 1)) + np.cumsum(steps, axis=1)) % NUM_ITEMS
        lengths = generator.integers(3, 11, size=count)
        histories = [walk[10 - length : 10].tolist() for walk, length in zip(walks, lengths, strict=True)]
        splits[split] = rows_of(histories, walks[:, 10].tolist(), first_key)
        first_key += count
    write(out, splits, seed)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("walks") / "data")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rec") / "rec"
    train(data, out, **FAST)
    return out


def test_it_learns_and_scores_itself(data: Path, trained: Path) -> None:
    info = json.loads((trained / "recommender.json").read_text())
    assert info["curve"][-1]["loss"] < info["curve"][0]["loss"]
    scores = info["scores"]["test"]
    assert scores["rows"] == 60
    assert scores["candidates"]["hr@1"] > 0.6  # chance is 0.1
    low, high = scores["candidates"]["hr@1_interval"]
    assert low < scores["candidates"]["hr@1"] < high
    assert 0.3 < scores["full"]["hr@1"] < 0.7  # two items may follow each, equally often
    assert set(scores["full"]) == {f"hr@{k}" for k in (1, 5, 10, 20)} | {f"ndcg@{k}" for k in (5, 10, 20)}


def test_evaluate_gives_the_stored_scores(data: Path, trained: Path) -> None:
    info = json.loads((trained / "recommender.json").read_text())
    for split in ("val", "test"):
        assert {"model": "sasrec", "split": split, **info["scores"][split]} == evaluate(data, trained, split)


def test_ranks_by_row_do_not_depend_on_the_batch_size(data: Path, trained: Path) -> None:
    dataset = load_dataset(data)
    recommender, _ = load_recommender(trained, dataset)
    whole, parts = (rank_rows(recommender, dataset, "test", batch_size=size) for size in (1024, 7))
    assert np.array_equal(whole.full.above, parts.full.above)
    assert np.array_equal(whole.candidate_hits(), parts.candidate_hits())
    assert np.array_equal(whole.keys, dataset.test.keys)
    assert rank_rows(recommender, dataset, "train").candidates is None


def test_the_item_table_is_the_recommenders_own(data: Path, trained: Path) -> None:
    table = load_item_table(trained)
    recommender, _ = load_recommender(trained)
    assert torch.equal(table.weight, recommender.item_vectors())
    assert table.weight.shape == (NUM_ITEMS, 16)
    assert table.dataset_hash == load_dataset(data).hash


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(data: Path, trained: Path, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    train(data, tmp_path / "again", **FAST)
    assert torch.equal(state, torch.random.get_rng_state())
    for file in ("item_table.safetensors", "weights.safetensors", "recommender.json"):
        assert (trained / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    train(data, tmp_path / "other", **(FAST | {"epochs": 1, "seed": 1}))
    assert (trained / "weights.safetensors").read_bytes() != (tmp_path / "other" / "weights.safetensors").read_bytes()


def test_training_stops_early_and_keeps_the_best_epoch(data: Path, tmp_path: Path) -> None:
    info = train(data, tmp_path / "rec", epochs=200, patience_epochs=2, dim=16, lr=2e-2, dropout=0.0, weight_decay=0.0)
    losses = [epoch["val_loss"] for epoch in info["curve"]]
    assert len(losses) < 200
    assert info["best_epoch"] == len(losses) - 3 == int(np.argmin(losses))
    dataset = load_dataset(data)
    recommender, _ = load_recommender(tmp_path / "rec", dataset)
    assert rank_rows(recommender, dataset, "val").losses.mean() == pytest.approx(min(losses))


def test_targets_of_validation_and_test_do_not_reach_training(data: Path, tmp_path: Path) -> None:
    dataset = load_dataset(data)
    rng = np.random.default_rng(3)
    splits = {"train": dataset.train}
    for split in ("val", "test"):
        rows = dataset.rows(split)
        targets = rng.integers(NUM_ITEMS, size=len(rows)).astype(np.int32)
        splits[split] = Rows(rows.keys, rows.users, rows.offsets, rows.items, targets)
    scrambled = tmp_path / "scrambled"
    write(scrambled, splits, seed=0)
    one = {"epochs": 1, "dim": 16}
    train(data, tmp_path / "a", **one)
    train(scrambled, tmp_path / "b", **one)
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()


def test_a_recommender_of_another_data_set_is_refused(trained: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"trained on data set .*, but .* is .*; train a recommender"):
        evaluate(other, trained, "test")


def test_published_weights_of_another_catalogue_are_refused(data: Path, shared: Path) -> None:
    with pytest.raises(InputError, match=r"knows 1682 items, .* has 40"):
        evaluate(data, shared / "data" / "recommenders" / "SASRec_movielens.npz", "test")


def test_a_damaged_folder_is_refused(trained: Path, tmp_path: Path) -> None:
    for file in trained.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    table = tmp_path / "item_table.safetensors"
    table.write_bytes(table.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"item_table\.safetensors: sha256 differs"):
        load_item_table(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights\.safetensors: not found"):
        load_recommender(tmp_path)
    with pytest.raises(InputError, match="recommender folder"):
        load_item_table(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"epochs": 0}, "--epochs 0"),
        ({"heads": 3}, "must divide"),
        ({"dropout": 1.0}, "--dropout"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": 1e30}, "choose a smaller"),
    ],
)
def test_bad_arguments_leave_nothing_behind(data: Path, tmp_path: Path, bad: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(data, tmp_path / "rec", **({"epochs": 1} | bad))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(data: Path, trained: Path) -> None:
    before = (trained / "weights.safetensors").read_bytes()
    with pytest.raises(InputError, match="exists already"):
        train(data, trained, epochs=1)
    assert (trained / "weights.safetensors").read_bytes() == before
