"""The base model's folder: configuration, tokenizer, weight files; no weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.verdicts import error, skipped
from llara_dist.errors import Finding, findings_of

LOOKING_S = 60.0


def look_at_model(path: str) -> dict[str, Any]:
    """What a model's files say, each with what is wrong with it; called in a process of its own.

    Of a hub id only configuration and tokenizer are fetched.
    """
    from llara_dist.config import ModelConfig
    from llara_dist.data.tokenizer import load_tokenizer, tokenizer_hash
    from llara_dist.model.llama import read_llama_config
    from llara_dist.training.preflight.base_model import check_weight_files
    from llara_dist.training.preflight.checklist import Checklist

    config = ModelConfig(path=path)
    checks = Checklist()
    architecture = checks.run(
        "configuration",
        read_llama_config,
        config,
        passed=lambda a: f"Llama of {a.num_hidden_layers} layers, width {a.hidden_size}",
    )
    if Path(path).is_dir():
        checks.run("weight files", check_weight_files, config, architecture, passed=str)
    tokenizer = checks.run("tokenizer", load_tokenizer, path, passed=lambda t: f"{len(t):,} tokens")
    return {
        "findings": [[finding.check, finding.severity, finding.found, finding.remedy] for finding in checks.findings],
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }


def check_tokenizer(tokenizer: str | None, shards_tokenizer: str | None) -> list[Finding]:
    """The model's tokenizer is the one that the shards were built with, where both are known (hashes)."""
    if tokenizer is None or shards_tokenizer is None or tokenizer == shards_tokenizer:
        return []
    remedy = "build the shards again with this model as --tokenizer"
    found = f"the model's ({tokenizer[:12]}) is not the one that the shards were built with ({shards_tokenizer[:12]})"
    return [error("tokenizer", found, remedy)]


def examine(path: str, shards_tokenizer: str | None) -> list[Finding]:
    """The topic's findings.

    Args:
        path: folder or hub id, "" = none was given.
        shards_tokenizer: hash of the tokenizer that the shards were built with, None = not known.
    """
    if not path:
        return [skipped("model", "not looked at: give --model")]
    try:
        looked = call(look_at_model, LOOKING_S, path=path)
    except ProbeError as problem:
        return [*findings_of("model", problem)]
    findings = [Finding(check, found, remedy, severity) for check, severity, found, remedy in looked["findings"]]
    return [*findings, *check_tokenizer(looked["tokenizer"], shards_tokenizer)]
