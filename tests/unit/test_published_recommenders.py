import json
from pathlib import Path

import numpy as np
import pytest
import torch

from llara_dist.data.llara_folders import read_llara
from llara_dist.errors import InputError
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.recommenders.published import load_published
from llara_dist.recommenders.ranking import rank_targets, ranking_scores
from llara_dist.recommenders.windows import history_tensors

NAMES = ["SASRec_movielens", "SASRec_steam", "GRU_movielens", "Caser_movielens"]


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_reproduce_their_recorded_examples(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden" / "recommenders.json").read_text())[name]
    model = load_published(shared / "data" / "recommenders" / f"{name}.npz")
    for example in golden["examples"]:
        history = example["history"]
        row = torch.tensor([history + [model.num_items] * (model.max_history - len(history))])
        with torch.no_grad():
            scores = model.scores(row, torch.tensor([len(history)]))[0]
        top = scores.topk(10)
        assert top.indices.tolist() == example["top10"]
        assert top.values.tolist() == pytest.approx(example["top10_logits"], abs=6e-5)
        assert int((scores > scores[example["target"]]).sum()) == example["rank_of_target"]


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_reproduce_their_recorded_full_ranking(shared: Path, name: str) -> None:
    golden = json.loads((shared / "golden" / "recommenders.json").read_text())[name]
    data_set = name.split("_")[1]
    domain = {"movielens": "movie", "steam": "game"}[data_set]
    raw = shared / "data" / f"llara-{data_set}"
    _, splits, _ = read_llara(raw, domain, min_history=3, max_history=10)
    rows = splits["test"]
    assert len(rows) == golden["n"]
    model = load_published(shared / "data" / "recommenders" / f"{name}.npz")
    histories, lengths = history_tensors(rows.offsets, rows.items, model.max_history, model.num_items)
    with torch.no_grad():
        scores = model.scores(histories, lengths).numpy()
    ranks = rank_targets(scores, rows.targets.astype(np.int64))
    assert not ranks.tied.any()
    assert ranking_scores(ranks, [1, 5, 10, 20], [10]) == pytest.approx(golden["full_ranking"], abs=1e-12)


def test_item_table_of_a_published_file_leaves_the_padding_row_out(shared: Path) -> None:
    table = load_item_table(shared / "data" / "recommenders" / "SASRec_movielens.npz")
    assert (table.num_items, table.dim, table.dataset_hash) == (1682, 64, None)
    assert table.weight.dtype == torch.float32


def test_files_that_are_not_published_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        load_published(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match=r"text\.npz: not an \.npz of plain arrays"):
        load_published(tmp_path / "text.npz")
    np.savez(tmp_path / "object.npz", a=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="plain arrays"):
        load_published(tmp_path / "object.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(InputError, match="no known recommender"):
        load_published(tmp_path / "other.npz")
    shapes = {"item_embeddings.weight": (5, 4), "gru.weight_ih_l0": (12, 4)}
    np.savez(tmp_path / "short.npz", **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(InputError, match=r"do not fit PublishedGRU: .*Missing key"):
        load_published(tmp_path / "short.npz")
