"""The libraries: their versions, whether they import, and whether those with native parts really work here."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llara_dist.doctor.bounded import ProbeError, call
from llara_dist.doctor.gpu_facts import GpuFacts
from llara_dist.doctor.verdicts import error, passed, skipped, warning
from llara_dist.errors import Finding
from llara_dist.training.preflight.versions import check_versions, installed_versions

IMPORTED = ("transformers", "peft", "webdataset", "safetensors", "tokenizers", "sentencepiece", "polars", "pyarrow")
"""what every run imports beside the libraries that are tried out"""
OPTIONAL = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
"""by distribution, the module; a run does without"""
FLASH_ATTENTION = (8, 0)
"""compute capability that flash-attn 2 needs (its README)"""
TRYING_S = 120.0
"""an import from a cold file server takes a minute"""
STALE_S = 3600.0
"""no operator compiles for so long"""
NF4_ERROR = 0.153
"""farthest that a value can lie from the nearest NF4 code, as a part of its block's largest: half the gap from −1 to
−0.6962 (QLoRA, arXiv 2305.14314, appendix E)"""


def try_imports(modules: Sequence[str]) -> dict[str, str]:
    """By module, why it does not import; called in a process of its own."""
    import importlib

    problems = {}
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as raised:  # native parts break in many ways
            first = next(iter(str(raised).strip().splitlines()), "")
            problems[module] = f"{type(raised).__name__}: {first}"
    return problems


def try_bitsandbytes() -> dict[str, Any]:
    """Quantise and dequantise on the device that a run takes; called in a process of its own."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(values.to(device), blocksize=64, quant_type="nf4")
    back = dequantize_4bit(packed, state).cpu().float()
    blocks, errors = values.reshape(-1, 64), (back - values).reshape(-1, 64)
    return {"device": device, "error": float((errors.abs().amax(1) / blocks.abs().amax(1)).max())}


def try_deepspeed() -> dict[str, Any]:
    """One optimizer step of a small layer through an engine, as in training; called in a process of its own."""
    import torch

    from llara_dist.distributed import World, initialise, pick_device, shut_down

    world = World()
    device = pick_device("auto", world)
    initialise(world, device)
    import deepspeed

    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1).to(device)
    before = layer.weight.detach().clone()
    engine, *_ = deepspeed.initialize(
        model=layer,
        optimizer=torch.optim.AdamW(layer.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.backward(engine(torch.ones(1, 4, device=device)).sum())
    engine.step()
    shut_down()
    return {"device": device.type, "moved": bool((layer.weight.detach() != before).all())}


def check_bitsandbytes(tried: Mapping[str, Any]) -> list[Finding]:
    """What quantising gave."""
    found = f"NF4 on {tried['device']}: values come back within {tried['error']:.3f} of their block's largest"
    if tried["error"] <= NF4_ERROR:
        return [passed("bitsandbytes", found)]
    return [error("bitsandbytes", f"{found}; at most {NF4_ERROR} is right", "install another version of bitsandbytes")]


def check_deepspeed(tried: Mapping[str, Any]) -> list[Finding]:
    """What a step through DeepSpeed gave."""
    if tried["moved"]:
        return [passed("deepspeed", f"starts on {tried['device']} and makes a step")]
    return [error("deepspeed", f"a step on {tried['device']} moves nothing", "install a tested version of deepspeed")]


def check_imports(problems: Mapping[str, str]) -> list[Finding]:
    """Libraries that do not import."""
    if not problems:
        return [passed("imports", "every library that a run needs")]
    return [
        error("imports", f"{module}: {problem}", f"reinstall {module}, or what it names")
        for module, problem in problems.items()
    ]


def check_optional(
    versions: Mapping[str, str | None], problems: Mapping[str, str] | None, facts: GpuFacts
) -> list[Finding]:
    """flash-attn and Liger.

    Args:
        versions: by distribution, None where it is not installed.
        problems: by module, why it does not import; None = not tried.
        facts: of the GPUs.
    """
    findings = []
    for distribution, module in OPTIONAL.items():
        installed = versions[distribution]
        if installed is None:
            findings.append(skipped(distribution, "not installed; a run does without"))
            continue
        problem = (problems or {}).get(module)
        capabilities = [tuple(device["capability"]) for device in facts.torch.devices]
        if problem:
            remedy = f"build it again for this torch, or remove it: pip uninstall {distribution}"
            findings.append(warning(distribution, f"{installed} does not import: {problem}", remedy))
        elif distribution == "flash-attn" and any(capability < FLASH_ATTENTION for capability in capabilities):
            found = f"{installed} needs compute capability 8.0; a GPU here is older"
            findings.append(warning(distribution, found, f"remove it: pip uninstall {distribution}"))
        else:
            findings.append(passed(distribution, f"{installed}{', imports' if problems is not None else ''}"))
    return findings


def stale_locks(extensions: Path, now: float) -> list[Path]:
    """Locks that a killed compilation of an operator left; torch waits for them for ever.

    Args:
        extensions: torch's folder of compiled operators.
        now: seconds since the epoch.
    """
    locks = [*extensions.glob("*/lock"), *extensions.glob("*/*/lock")]
    return sorted(lock for lock in locks if now - lock.stat().st_mtime > STALE_S)


def check_compilers(
    on_gpu: bool, locks: Sequence[str], which: Callable[[str], str | None] = shutil.which
) -> list[Finding]:
    """Locks that were left behind, and the compilers that Triton needs on a GPU.

    Args:
        on_gpu: whether there is one.
        locks: that a killed compilation left.
        which: finds programs.
    """
    findings = [
        warning("compile lock", f"{lock}: left by a killed compilation; the next one waits for it", f"rm '{lock}'")
        for lock in locks
    ]
    compilers = [name for name in ("cc", "gcc", "g++", "nvcc") if which(name)]
    if on_gpu and not {"cc", "gcc"} & set(compilers):
        remedy = "install gcc, or set CC to a C compiler"
        findings.append(warning("compilers", "no C compiler: Triton's kernels cannot start", remedy))
    elif not findings:
        shown = ", ".join(compilers) or "none"
        findings.append(passed("compilers", f"{shown}; a run itself compiles nothing of DeepSpeed's"))
    return findings


def find_stale_locks() -> list[str]:
    """This user's; called in a process of its own, since the home folder may lie on a server that is gone."""
    place = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    return [str(lock) for lock in stale_locks(Path(place).expanduser(), time.time())]


def examine(facts: GpuFacts, quick: bool) -> list[Finding]:
    """The topic's findings."""
    on_gpu = bool(facts.torch.devices)
    installed = installed_versions()
    findings = check_versions(installed, on_gpu)
    shown = ", ".join(f"{name} {number}" for name, number in installed.items() if number)
    if not findings:
        findings = [passed("versions", f"{shown}; webdataset {_version('webdataset') or 'missing'}")]
    findings += _tried("compile lock", lambda: check_compilers(on_gpu, call(find_stale_locks, 10.0)))
    optional = {distribution: _version(distribution) for distribution in OPTIONAL}
    if quick:
        findings += check_optional(optional, None, facts)
        return [*findings, skipped("native parts", "not tried: --quick")]
    there = [OPTIONAL[name] for name, number in optional.items() if number]
    findings += _tried("bitsandbytes", lambda: check_bitsandbytes(call(try_bitsandbytes, TRYING_S)))
    findings += _tried("deepspeed", lambda: check_deepspeed(call(try_deepspeed, TRYING_S)))
    try:
        problems = call(try_imports, TRYING_S, modules=[*IMPORTED, *there])
    except ProbeError as silent:
        return [*findings, error("imports", str(silent), "import the libraries one by one to find the one that breaks")]
    needed = {module: problem for module, problem in problems.items() if module in IMPORTED}
    return [*findings, *check_imports(needed), *check_optional(optional, problems, facts)]


def _tried(check: str, run: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return run()
    except ProbeError as silent:
        return [error(check, str(silent), f"reinstall {check}" if check != "compile lock" else "look at ~/.cache")]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
