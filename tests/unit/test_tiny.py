"""A tiny Llama is made the same from the same arguments, and the shipped one reads, matches and copies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llara_dist.data.synthetic import synthetic_world, words
from llara_dist.data.wording import load_templates
from llara_dist.errors import InputError
from llara_dist.model.catalogues import LATENT_DIM, Lesson, RandomCatalogues
from llara_dist.model.pretraining import lesson_of, orthogonalise, pad_rows, random_projections
from llara_dist.model.tiny import tiny_base, tiny_llama

SMALL: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 2, "head_dim": 16, "steps": 10, "tokens_per_step": 300}


@pytest.fixture(scope="module")
def base() -> tuple[LlamaForCausalLM, Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base())
    return LlamaForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32).eval(), tokenizer


def made(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_ten_steps_are_the_same_twice_and_lower_the_loss(tmp_path: Path) -> None:
    for name in ("one", "two"):
        result = tiny_llama(tmp_path / name, catalogues=50, **SMALL)
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {file.name for file in (tmp_path / "one").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "pretraining.json",
    }
    curve = json.loads((tmp_path / "one" / "pretraining.json").read_text())["curve"]
    losses = [value for record in curve for name, value in record.items() if name in ("text_loss", "hybrid_loss")]
    assert losses[-1] < losses[0]
    assert result["last"]["step"] == 10
    other = tiny_llama(tmp_path / "three", catalogues=50, seed=2, **SMALL)
    assert other["parameters"] == result["parameters"]
    assert not torch.equal(made(tmp_path / "three")["model.norm.weight"], one["model.norm.weight"])


def test_a_data_set_is_shown_as_text_only_with_its_own_tokenizer(tmp_path: Path, inputs: Path) -> None:
    result = tiny_llama(tmp_path / "out", data=inputs / "data", **{**SMALL, "steps": 20})
    assert result["data"] == json.loads((inputs / "data" / "dataset.json").read_text())["hash"]
    curve = json.loads((tmp_path / "out" / "pretraining.json").read_text())["curve"]
    assert not [name for record in curve for name in record if name.startswith("hybrid_")]
    assert curve[-1]["text_loss"] < curve[0]["text_loss"]


def test_going_on_starts_from_the_earlier_weights(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "one", catalogues=50, save_as="float32", **SMALL)
    on = tiny_llama(tmp_path / "two", start=tmp_path / "one", catalogues=50, **{**SMALL, "steps": 1, "hidden": 999})
    assert on["hidden"] == SMALL["hidden"]
    assert on["start"]["steps"] == SMALL["steps"]
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = float((one[name] - two[name].float()).norm() / one[name].norm())
    assert 0.0 < moved < 0.05
    with pytest.raises(InputError, match="tiny-llama"):
        tiny_llama(tmp_path / "three", start=tmp_path, catalogues=50, **SMALL)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "--data"),
        ({"catalogues": 0}, "--catalogues"),
        ({"catalogues": 1, "head_dim": 15}, "head_dim"),
        ({"catalogues": 1, "max_candidates": 3}, "--max_candidates"),
        ({"catalogues": 1, "hybrid_share": 1.5}, "--hybrid_share"),
    ],
)
def test_bad_arguments_leave_nothing(tmp_path: Path, arguments: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        tiny_llama(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_lessons_grow_with_the_level(base: tuple[LlamaForCausalLM, Any]) -> None:
    source = RandomCatalogues(base[1], 7, 1)
    rng = np.random.default_rng(0)
    first = [lesson_of(rng, 0.0, source, 1500, 0.7)[0] for _ in range(50)]
    last = [lesson_of(rng, 1.0, source, 1500, 0.7)[0] for _ in range(50)]
    assert {lesson.num_candidates for lesson in first} == {4}
    assert max(lesson.num_candidates for lesson in last) == 20
    assert max(lesson.num_history for lesson in last) == 10
    assert not any(lesson.hybrid for lesson in (lesson_of(rng, 1.0, source, 1500, 0.0)[0] for _ in range(20)))


def test_a_catalogue_is_a_function_of_its_number(base: tuple[LlamaForCausalLM, Any]) -> None:
    lesson = Lesson(5, 3, 4, True, 0.0)
    one, same = (RandomCatalogues(base[1], 7, 1).draw(np.random.default_rng(1), lesson) for _ in range(2))
    other = RandomCatalogues(base[1], 7, 1).draw(np.random.default_rng(2), lesson)
    assert one.encoder.shown == same.encoder.shown
    assert one.latents is not None
    assert one.latents.shape == (5, 7, LATENT_DIM)
    # One catalogue only: whatever is drawn, a word is a genre everywhere or a name everywhere.
    drawn = one.encoder.shown + other.encoder.shown
    assert not {title.split()[0] for title in drawn} & {title.split()[1] for title in drawn}


@pytest.mark.parametrize("hybrid", [False, True])
def test_padded_rows_are_the_prompts(base: tuple[LlamaForCausalLM, Any], hybrid: bool) -> None:
    tokenizer = base[1]
    drawn = RandomCatalogues(tokenizer, 7, 100).draw(np.random.default_rng(1), Lesson(6, 4, 5, hybrid, 0.0))
    templates = np.arange(6) % len(load_templates("game"))
    rows = pad_rows(drawn, templates, hybrid, False)
    repeated = pad_rows(drawn, templates, hybrid, True)
    for row in range(6):
        shown = [drawn.encoder.shown[item] for item in drawn.candidates[row]]
        history = drawn.history[drawn.history_offsets[row] : drawn.history_offsets[row + 1]]
        keep = ~rows.slots[row]
        text = tokenizer.decode(rows.tokens[row][keep & ~rows.answers[row]], skip_special_tokens=True)
        assert text == drawn.encoder.text(history, drawn.candidates[row], int(templates[row]))
        answer = tokenizer.decode(rows.tokens[row][rows.answers[row]])
        assert answer == f" {shown[drawn.targets[row]]}</s>"
        assert tokenizer.decode(repeated.tokens[row][repeated.answers[row]]) == f" {', '.join(shown)}</s>"
        assert int(rows.slots[row].sum()) == (len(history) + 5 if hybrid else 0)
        before = rows.tokens[row][rows.readouts[row] - (4 if hybrid else 3) + 1]
        assert tokenizer.decode(before).split() == [title.split()[0] for title in shown]


def test_projections_differ_by_row_and_keep_their_size() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 5, LATENT_DIM, generator=generator).expand(3, -1, -1)
    out = random_projections(latents, 32, 0.1, generator)
    rms = out.square().mean((1, 2)).sqrt()
    assert out.shape == (3, 5, 32)
    assert not torch.allclose(out[0], out[1])
    assert bool(((rms > 0.1 / 2.5) & (rms < 0.1 * 2.5)).all())


@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.4


def test_the_shipped_base_is_small_and_holds_every_word(base: tuple[LlamaForCausalLM, Any]) -> None:
    assert sum(file.stat().st_size for file in tiny_base().iterdir()) <= 4_000_000
    _, tokenizer = base
    assert all(len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1 for word in words().all)
    recorded = json.loads((tiny_base() / "pretraining.json").read_text())
    assert recorded["catalogues"] > 0
    assert recorded["data"] is None


@torch.inference_mode()
def answers_of(base: tuple[LlamaForCausalLM, Any], hybrid: bool, rows: int) -> tuple[float, float]:
    """Greedy answers on catalogues of a seed never trained on: (share that is a shown title, share that is right)."""
    model, tokenizer = base
    drawn = RandomCatalogues(tokenizer, 99, 10_000).draw(np.random.default_rng(5), Lesson(rows, 8, 10, hybrid, 0.0))
    padded = pad_rows(drawn, np.arange(rows) % 3, hybrid, False)
    table: Any = model.get_input_embeddings()
    slots = torch.zeros(0)
    if drawn.latents is not None:
        rms = float(table.weight.square().mean().sqrt())
        generator = torch.Generator().manual_seed(1)
        slots = random_projections(torch.from_numpy(drawn.latents), table.weight.shape[1], rms, generator).flatten(0, 1)
    valid = right = used = 0
    for row in range(rows):
        count = int(padded.slots[row].sum())
        inputs = table(padded.tokens[row][: int(padded.answers[row].nonzero()[0])])
        if hybrid:
            inputs[padded.slots[row][: len(inputs)]] = slots[padded.slot_items[used : used + count]]
            used += count
        answer: list[int] = []
        while len(answer) < 6 and (not answer or answer[-1] != tokenizer.eos_token_id):
            answer.append(int(model(inputs_embeds=inputs[None]).logits[0, -1].argmax()))
            inputs = torch.cat([inputs, table(torch.tensor(answer[-1:]))])
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        shown = [drawn.encoder.shown[item] for item in drawn.candidates[row]]
        valid += text in shown
        right += text == shown[drawn.targets[row]]
    return valid / rows, right / rows


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_shipped_base_matches_and_copies_in_unseen_catalogues(
    base: tuple[LlamaForCausalLM, Any], hybrid: bool
) -> None:
    valid, right = answers_of(base, hybrid, 150)
    assert valid > 0.85
    # One in ten by chance: a standard error of 0.025 at 150 rows.
    assert right > 0.25


def test_the_quickstart_world_is_none_of_the_pretraining_catalogues(base: tuple[LlamaForCausalLM, Any]) -> None:
    drawn = RandomCatalogues(base[1], 1, 10**6).draw(np.random.default_rng(0), Lesson(200, 10, 20, False, 0.0))
    mine = set(synthetic_world().titles)
    shared = [title for title in drawn.encoder.shown if title in mine]
    # Titles are drawn from 325 names × 371 words: what is shared is shared by chance.
    assert len(shared) < 0.02 * len(drawn.encoder.shown)
