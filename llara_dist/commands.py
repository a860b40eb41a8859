"""What `llara-dist` can do: each command, the function behind it, what it does and an example."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand: the function behind it, a line of what it does, an example."""

    function: str
    summary: str
    example: str
    out: str = ""
    """What --out names, where that is not the run's folder."""
    hands_on: tuple[str, ...] = ()
    """Commands that it runs: the first of these words ends its own options, and is handed on with all that follows."""


COMMANDS = {
    "quickstart": Command(
        "llara_dist.quickstart:quickstart",
        "the whole way on the built-in synthetic world, with an HTML report, in about five minutes on two CPU cores",
        "llara-dist quickstart --out quickstart_out",
    ),
    "doctor": Command(
        "llara_dist.doctor.command:doctor",
        "whether this machine, or every node of a job, will carry a run: drivers, libraries, links, folders, Slurm",
        "srun --ntasks-per-node 8 llara-dist doctor --shards shards/out/movielens --out runs/movielens",
    ),
    "download": Command(
        "llara_dist.data.download:download",
        "fetch a public data set from its publisher, checksum pinned, resumable",
        "llara-dist download movielens --out raw",
    ),
    "prepare": Command(
        "llara_dist.data.prepare:prepare",
        "raw logs → dataset folder: windows, splits, titles, frozen candidates, an audit",
        "llara-dist prepare --recipe movielens --raw raw/ml-100k --out data/movielens",
    ),
    "recommender train": Command(
        "llara_dist.recommenders.training:train",
        "train the sequential recommender and write its item table",
        "llara-dist recommender train --data data/movielens --model sasrec --out recommenders/sasrec",
    ),
    "recommender eval": Command(
        "llara_dist.recommenders.evaluation:evaluate",
        "full-ranking HR@k, NDCG@k and HR@1 over the frozen candidates",
        "llara-dist recommender eval --data data/movielens --weights recommenders/sasrec --split test",
    ),
    "recommender join": Command(
        "llara_dist.recommenders.joining:join",
        "the item tables of several recommenders → one, for a mixture of their data sets",
        "llara-dist recommender join --tables '[recommenders/movielens, recommenders/steam]' --out recommenders/both",
    ),
    "tiny-llama": Command(
        "llara_dist.model.tiny:tiny_llama",
        "make and pre-train a small Llama for tests, debugging and the quickstart",
        "llara-dist tiny-llama --data data/movielens --tokenizer llama2-tokenizer --out llm",
    ),
    "quantize": Command(
        "llara_dist.model.quantize:quantize",
        "a model in 4-bit NF4, written once, so that many ranks and runs load it without quantising each",
        "llara-dist quantize --model llm --out llm-nf4",
    ),
    "shards build": Command(
        "llara_dist.data.build:build",
        "dataset folder + tokenizer → WebDataset shards with index and manifest",
        "llara-dist shards build --data data/movielens --tokenizer llm --out shards/out/movielens",
    ),
    "shards merge": Command(
        "llara_dist.data.parts:merge",
        "the parts of a build made on many machines → one shards folder, the bytes of one machine's build",
        "llara-dist shards merge shards/out/movielens",
    ),
    "shards mix": Command(
        "llara_dist.stream.locations:mix",
        "the shards of several data sets → one mixture, a weight each",
        "llara-dist shards mix --shards '[shards/out/movielens, shards/out/steam]' --weights '[1, 0.5]' --out mix",
    ),
    "shards verify": Command(
        "llara_dist.data.verify:verify",
        "check every byte of every shard against index and manifest",
        "llara-dist shards verify shards/out/movielens",
    ),
    "shards repair": Command(
        "llara_dist.data.repair:repair",
        "rebuild what is damaged from the dataset folder, byte for byte, and nothing else",
        "llara-dist shards repair shards/out/movielens --data data/movielens",
    ),
    "shards inspect": Command(
        "llara_dist.data.inspect:inspect_sample",
        "print one sample so that a person can read it, in both forms",
        "llara-dist shards inspect shards/out/movielens --key 42",
    ),
    "plan": Command(
        "llara_dist.cost.command:plan",
        "predict memory per GPU, step time and communication of a run; recommend stage, token budget, recomputation",
        "llara-dist plan --model llama-2-7b --gpu h100 --gpus '[1, 8, 64, 1024]' --run launch/configs/movielens.yaml",
    ),
    "preflight": Command(
        "llara_dist.training.preflight.examine:preflight",
        "all that train checks before it reads a weight, in one table, for any number of ranks; nothing is written",
        "llara-dist preflight --config launch/configs/movielens.yaml --model.path llm --data.shards "
        "shards/out/movielens --recommender.path recommenders/sasrec --out runs/movielens --ranks 8",
    ),
    "tune": Command(
        "llara_dist.autotune.command:tune",
        "the token budget and kernels that are fastest on this machine, measured in two minutes, as a further --config",
        "llara-dist tune --config launch/configs/movielens.yaml --model.path llm --data.shards shards/out/movielens "
        "--recommender.path recommenders/sasrec --out tuned.yaml",
        out="FILE.yaml to write, to be given to train as a further --config; give it after a --config that names `out`",
    ),
    "train": Command(
        "llara_dist.tuning:train",
        "tune LoRA and projector with the curriculum; the same code runs under deepspeed, torchrun and srun",
        "llara-dist train --config launch/configs/movielens.yaml --model.path llm --data.shards shards/out/movielens "
        "--recommender.path recommenders/sasrec --out runs/movielens",
    ),
    "launch": Command(
        "llara_dist.cluster.ssh_launch:launch",
        "train or evaluate on several hosts, over ssh, through DeepSpeed's launcher on each",
        "llara-dist launch --hostfile hosts train --config launch/configs/movielens.yaml --resume auto",
        hands_on=("train", "evaluate"),
    ),
    "submit": Command(
        "llara_dist.cluster.submit:submit",
        "a run, an array of runs or a whole pipeline as jobs of a Slurm cluster, checked before they are queued",
        "llara-dist submit --config launch/configs/movielens.yaml --model.path llm --data.shards shards/out/movielens "
        "--recommender.path recommenders/sasrec --out runs/movielens --nodes 2 --gpus_per_node 8 --time 12:00:00",
    ),
    "status": Command(
        "llara_dist.cluster.jobs:status",
        "the jobs of a run or pipeline in Slurm, and how far the run is; without Slurm from its files alone",
        "llara-dist status runs/movielens",
    ),
    "logs": Command(
        "llara_dist.cluster.jobs:logs",
        "what a run's job printed, or one rank's log",
        "llara-dist logs runs/movielens --rank 17 --follow",
    ),
    "top": Command(
        "llara_dist.watching.top:top",
        "a run on the terminal, live: how far, how fast, and its ranks, the slow, stuck and silent ones first",
        "llara-dist top runs/movielens",
    ),
    "cancel": Command(
        "llara_dist.cluster.jobs:cancel",
        "cancel the jobs of a run or pipeline, waiting and running; a running one saves a checkpoint first",
        "llara-dist cancel runs/movielens",
    ),
    "debug": Command(
        "llara_dist.replay.command:debug",
        "one step of a run again, in one process without a cluster: the batch, dropout and weights that a rank had",
        "llara-dist debug --run runs/movielens --step 1234 --rank 17",
    ),
    "evaluate": Command(
        "llara_dist.evaluation.evaluate:evaluate",
        "generate answers and rank candidates: HitRatio@1, valid ratio, HR@k, NDCG@k, with intervals",
        "llara-dist evaluate --run runs/movielens --split test --protocol exact",
    ),
    "report": Command(
        "llara_dist.evaluation.compare_runs:report",
        "evaluated runs side by side on one HTML page: HR@1 with intervals, paired differences, curves",
        "llara-dist report --runs '[runs/hybrid, runs/text-only]' --out report.html",
    ),
}

GROUPS = {
    "recommender": "the frozen sequential recommender: train, eval, join",
    "shards": "training samples as WebDataset shards: build, merge, mix, verify, repair, inspect",
}

POSITIONAL = {
    "shards merge": "out",
    "shards verify": "shards",
    "shards repair": "shards",
    "shards inspect": "shards",
    "download": "dataset",
    "top": "run",
    "status": "run",
    "logs": "run",
    "cancel": "run",
    "debug": "run",
    "evaluate": "run",
}
"""Commands whose first argument may be given without its option's name; only switches may stand before it."""
