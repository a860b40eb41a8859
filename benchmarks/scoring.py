"""Candidates' likelihoods from one shared prompt against one sequence a candidate, on the same model in one run.

    PYTHONPATH=. python benchmarks/scoring.py [--device cuda] [--out RESULT.json]

Ours reads each prompt once and scores its 20 candidates behind it in one sequence (llara_dist/evaluation/scoring.py).
The other way gives every candidate a sequence of its own, prompt and answer, written with care: rows of similar length
padded to the longest on the right, the head at the answers' positions only, batches as large as --tokens allows. Both
start from the same samples, hybrid, and give float64 log-likelihoods, which must agree (float32: within 1e-4) before
any time counts. They take turns, row batch by row batch; medians over the rounds, ratios within a round. The result is
written after every round: a run that is broken off leaves the rounds that it measured.

The model has random NF4 weights: Llama-2-7B's shape on a GPU, a small one on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms.inputs import SHAPES, make_inputs, write_random_nf4
from benchmarks.arms.setup import set_trained
from benchmarks.record import machine, say, spread
from llara_dist.config import LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.data.samples import Sample
from llara_dist.data.tokenizer import load_tokenizer
from llara_dist.evaluation.answers import answer_tokens
from llara_dist.evaluation.language_model import hidden_states, token_embeddings, vocabulary_logits
from llara_dist.evaluation.prompts import read_prompts
from llara_dist.evaluation.scoring import score_candidates
from llara_dist.integrity import json_text, write_json
from llara_dist.model.hybrid import HybridLlama, build_hybrid_llama
from llara_dist.recommenders.item_table import load_item_table
from llara_dist.stream.batch import collate
from llara_dist.stream.reader import ShardSet

TARGET = 5.0
"""how many times as fast we want to be"""
TOLERANCE = {"cpu": 1e-4, "cuda": 0.5}
"""largest difference of log-likelihoods, nats: float32; bfloat16, whose products differ by 2^-8 from way to way"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="of the random Llama; 7b on a GPU, else small")
    parser.add_argument("--inputs", type=Path, help="folder that benchmarks/arms/inputs.py made; else they are made")
    parser.add_argument("--rows", type=int, help="prompts scored at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="most positions of the other way's batch")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = options.device == "cuda"
    options.shape = None if options.inputs else options.shape or ("7b" if cuda else "small")
    rows = options.rows or (16 if cuda else 4)
    tokens = options.tokens or (16384 if cuda else 4096)
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        model, batches, answers = prepare(Path(name), options, rows)
        result = {
            "what": "benchmarks/scoring.py",
            **machine(options.device, options.threads),
            "model": {"shape": options.shape, "hidden_size": model.llm.config.hidden_size},
            "rows_at_once": rows,
            "candidates_a_row": len(batches[0][0].candidates),
            "tokens_of_a_prompt": round(statistics.mean(s.answer_start for batch in batches for s in batch), 1),
            "tolerance_nats": TOLERANCE[options.device],
            "target": TARGET,
        }
        for measured in measure(model, batches, answers, tokens):
            result |= measured
            result["met"] = result["ours_is_faster_by"]["median"] >= TARGET
            result["seconds"] = round(time.perf_counter() - begun, 1)
            if options.out:
                write_json(options.out, result)
    print(json_text(result), end="")
    difference, tolerance = result["largest_difference_nats"], result["tolerance_nats"]
    if not difference <= tolerance:
        raise SystemExit(f"log-likelihoods differ by {difference} nats, more than {tolerance}")


def prepare(
    folder: Path, options: argparse.Namespace, rows: int
) -> tuple[HybridLlama, list[list[Sample]], list[np.ndarray]]:
    """A tuned model in evaluation mode, a batch of test rows for each round and one to warm up, answers by item."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if options.inputs:
        folder = options.inputs
    else:
        make_inputs(folder)
        write_random_nf4(folder / "model", options.shape, folder / "tokenizer", device)
    model = build_hybrid_llama(
        ModelConfig(path=str(folder / "model"), bits=4),
        LoraConfig(),
        ProjectorConfig(),
        load_item_table(folder / "recommender").weight,
        device,
        seed=0,
    ).eval()
    set_trained([*model.lora_parameters().items(), *model.projector_parameters().items()])
    test = ShardSet.open(folder / "shards", "test")
    samples = test.read(np.arange(min(rows * (options.rounds + 1), len(test) // rows * rows)))
    titles = load_titles(folder / "data")
    answers = answer_tokens(load_tokenizer(folder / "tokenizer"), titles)
    return model, [samples[first : first + rows] for first in range(0, len(samples), rows)], answers


def load_titles(data: Path) -> list[str]:
    """By item id, of a data set folder."""
    from llara_dist.data.dataset import load_dataset

    return load_dataset(data).titles


def measure(
    model: HybridLlama, batches: list[list[Sample]], answers: list[np.ndarray], tokens: int
) -> Iterator[dict[str, Any]]:
    """Both ways on every batch; yields what is known after each but the first, which warms up and is not counted."""
    ways: dict[str, Callable[[list[Sample]], np.ndarray]] = {
        "shared_prompt": lambda samples: shared_prompt(model, samples, answers),
        "separate_sequences": lambda samples: separate_sequences(model, samples, answers, tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    worst = 0.0
    for turn, samples in enumerate(batches):
        found = {}
        for name in sorted(ways, reverse=turn % 2 == 1):
            begun, begun_cpu = time.perf_counter(), time.process_time()
            found[name] = ways[name](samples)  # ends with a copy to the host, so a GPU has been waited for
            if turn:
                seconds[name].append((time.perf_counter() - begun) / len(samples))
                cpu[name].append((time.process_time() - begun_cpu) / len(samples))
        difference = np.abs(found["shared_prompt"] - found["separate_sequences"]).max()
        worst = float(np.maximum(worst, difference))  # what is no number stays so
        say(f"round {turn}: largest difference so far {worst:.1e} nats")
        if turn:
            yield {
                "rounds": turn,
                "seconds_a_row": {name: spread(values) for name, values in seconds.items()},
                "cpu_seconds_a_row": {name: spread(values) for name, values in cpu.items()},
                "ours_is_faster_by": ratios(seconds),
                "ours_takes_less_cpu_by": ratios(cpu),
                "largest_difference_nats": worst,
            }


def ratios(taken: dict[str, list[float]]) -> dict[str, float]:
    """The other way's over ours, within each round."""
    pairs = zip(taken["separate_sequences"], taken["shared_prompt"], strict=True)
    return spread([theirs / ours for theirs, ours in pairs])


def shared_prompt(model: HybridLlama, samples: list[Sample], answers: list[np.ndarray]) -> np.ndarray:
    """Ours: float64 [N, C]."""
    candidates = np.stack([sample.candidates for sample in samples])
    return score_candidates(model, read_prompts(model, samples, hybrid=True), candidates, answers).total


@torch.no_grad()
def separate_sequences(model: HybridLlama, samples: list[Sample], answers: list[np.ndarray], tokens: int) -> np.ndarray:
    """Every candidate behind its own copy of the prompt: float64 [N, C].

    Args:
        model: in evaluation mode.
        samples: the rows.
        answers: by item id, the answer's token ids, EOS last.
        tokens: most positions of a batch, padding included.
    """
    device = model.item_table.device
    prompts = []
    for sample in samples:
        batch = collate([sample], [True], answers=False).to(device)
        prompts.append(model.embed(batch)[0])
    jobs = [
        (row, place, answers[int(item)].astype(np.int64))
        for row, sample in enumerate(samples)
        for place, item in enumerate(sample.candidates)
    ]
    jobs.sort(key=lambda job: len(prompts[job[0]]) + len(job[2]))
    total = np.zeros((len(samples), len(samples[0].candidates)))
    while jobs:
        longest = len(prompts[jobs[-1][0]]) + len(jobs[-1][2]) - 1
        taken = jobs[-max(1, tokens // longest) :]
        del jobs[-len(taken) :]
        embeddings = torch.zeros((len(taken), longest, prompts[0].shape[1]), dtype=prompts[0].dtype, device=device)
        real = torch.zeros((len(taken), longest), dtype=torch.int64)
        given = torch.zeros((len(taken), max(len(answer) for *_, answer in taken)), dtype=torch.int64)
        for index, (_, _, answer) in enumerate(taken):
            given[index, : len(answer)] = torch.from_numpy(answer)
        embedded = token_embeddings(model, given.to(device))
        places = []
        for index, (row, _, answer) in enumerate(taken):
            length = len(prompts[row])
            embeddings[index, :length] = prompts[row]
            embeddings[index, length : length + len(answer) - 1] = embedded[index, : len(answer) - 1]
            real[index, : length + len(answer) - 1] = 1
            places.append(torch.stack([torch.full((len(answer),), index), length - 1 + torch.arange(len(answer))]))
        hidden, _ = hidden_states(model, embeddings, attention_mask=real.to(device), use_cache=False)
        rows, columns = torch.cat(places, dim=1).to(device)
        targets = np.concatenate([answer for *_, answer in taken])
        losses = torch.nn.functional.cross_entropy(
            vocabulary_logits(model, hidden[rows, columns]), torch.from_numpy(targets).to(device), reduction="none"
        )
        owners = np.repeat(np.arange(len(taken)), [len(answer) for *_, answer in taken])
        sums = np.bincount(owners, weights=losses.double().cpu().numpy(), minlength=len(taken))
        for index, (row, place, _) in enumerate(taken):
            total[row, place] = -sums[index]
    return total


if __name__ == "__main__":
    main()
