"""4-bit loading: the bytes of transformers' own loader, stored or not; and what is refused, by file and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from llara_dist.cli import main
from llara_dist.config import ModelConfig
from llara_dist.errors import InputError
from llara_dist.integrity import sha256_file
from llara_dist.model import attention, nf4
from llara_dist.model.llama import base_fingerprint, load_llama
from llara_dist.model.quantize import PROVENANCE, quantize
from tests.tiny import write_tokenizer

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENS = torch.arange(2, 30)[None]


def write_source(folder: Path, dtype: str = "float32", tied: bool = False, shard: str = "1MB") -> Path:
    """A random Llama with a tokenizer; its feed-forward layers are larger than a piece and no multiple of one."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=192,
        intermediate_size=500,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=shard)  # pyright: ignore
    write_tokenizer(folder, ["a few words", "of no meaning"])
    return folder


def from_transformers(path: Path, dtype: torch.dtype, storage: str = "uint8") -> Any:
    """The same model through transformers' own loader and bitsandbytes' own modules."""
    attention.register()
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="packed",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=storage,
        ),
    )
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model.eval()


def load(path: Path, **settings: Any) -> Any:
    model = load_llama(ModelConfig(path=str(path), **settings), CPU)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (untyped in the base class)
    return model


def assert_same_tensors(one: Any, other: Any) -> None:
    """Parameters with their quantisation states, and buffers, are equal in dtype, shape and every bit."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    left |= {f"buffer {name}": value for name, value in one.named_buffers()}
    right |= {f"buffer {name}": value for name, value in other.named_buffers()}
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert (value.dtype, value.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(value.contiguous().view(torch.uint8), right[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize(
    "shape",
    [(8, 8), (nf4.PIECE // 64, 64), (nf4.PIECE // 64 + 1, 64), (300, 1000), (1001, 200), (3 * nf4.PIECE // 64, 128)],
)
def test_pieces_give_the_same_bytes(shape: tuple[int, int], dtype: torch.dtype, storage: torch.dtype) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, state = nf4.quantise(weight, storage)
    expected, whole = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", quant_storage=storage)
    assert (packed.dtype, packed.shape) == (expected.dtype, expected.shape)
    assert torch.equal(packed.view(torch.uint8), expected.view(torch.uint8))
    ours, theirs = state.as_dict(packed=True), whole.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(dequantize_4bit(packed, state), dequantize_4bit(expected, whole))


@pytest.mark.parametrize(
    ("stored", "tied", "storage", "computed"),
    [
        ("float32", False, "uint8", "float32"),
        ("float32", True, "float32", "float32"),
        ("bfloat16", True, "uint8", "float32"),
        ("bfloat16", False, "uint8", "bfloat16"),
        ("float16", False, "float32", "float32"),
    ],
)
def test_loads_bit_for_bit_what_transformers_loads(
    tmp_path: Path, stored: str, tied: bool, storage: str, computed: str
) -> None:
    source = write_source(tmp_path / "llm", stored, tied)
    model = load(source, quant_storage=storage, compute_dtype=computed)
    expected = from_transformers(source, DTYPES[computed], storage)
    assert_same_tensors(model, expected)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ours, theirs = model.config.to_dict(), expected.config.to_dict()
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == {"use_cache"}


@pytest.mark.parametrize(
    ("stored", "tied", "storage", "split"),
    [("float32", False, "uint8", True), ("bfloat16", True, "float32", False), ("float16", False, "uint8", True)],
)
def test_a_stored_model_is_what_quantising_at_load_gives(
    tmp_path: Path, stored: str, tied: bool, storage: Any, split: bool
) -> None:
    source = write_source(tmp_path / "llm", stored, tied)
    made = tmp_path / "nf4"
    quantize(str(source), made, quant_storage=storage, max_shard_mib=1 if split else 1000)
    files = sorted(path.name for path in made.glob("*.safetensors"))
    assert files == (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] if split else ["model.safetensors"]
    )
    assert (made / "model.safetensors.index.json").exists() == split
    for computed in ("float32", "bfloat16"):
        model = load(made, quant_storage=storage, compute_dtype=computed)
        expected = load(source, quant_storage=storage, compute_dtype=computed)
        assert_same_tensors(model, expected)
        assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_a_stored_model(tmp_path: Path, tied: bool) -> None:
    source = write_source(tmp_path / "llm", tied=tied)
    quantize(str(source), tmp_path / "nf4", max_shard_mib=1)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype="auto")
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    expected = from_transformers(source, torch.float32)
    assert_same_tensors(model, expected)
    expected.set_attn_implementation("sdpa")
    assert torch.equal(model.eval()(TOKENS).logits, expected(TOKENS).logits)


def test_what_transformers_saved_loads_too(tmp_path: Path) -> None:
    expected = from_transformers(write_source(tmp_path / "llm"), torch.float32)
    expected.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load(tmp_path / "saved"), expected)


def test_the_packed_bytes_do_not_depend_on_the_compute_dtype(tmp_path: Path) -> None:
    source = write_source(tmp_path / "llm", "float16")
    one, other = (load(source, compute_dtype=dtype).state_dict() for dtype in ("float32", "bfloat16"))
    packed = [name for name, value in one.items() if value.dtype == torch.uint8 and "quant_state" not in name]
    assert len(packed) == 70  # 35 linear layers: packed weights and their scales
    assert all(torch.equal(one[name], other[name]) for name in packed)


def test_the_command_writes_a_model_folder_with_its_provenance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "llm")
    main(["quantize", "--model", str(source), "--out", str(tmp_path / "nf4"), "--max-shard-mib", "1", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    made = Path(result["out"])
    provenance = json.loads((made / PROVENANCE).read_text())
    assert result["files"] == sorted(path.name for path in made.glob("*.safetensors"))
    assert provenance["files"] == {name: sha256_file(made / name) for name in result["files"]}
    assert provenance["source"]["fingerprint"] == base_fingerprint(ModelConfig(path=str(source)))
    assert base_fingerprint(ModelConfig(path=str(made))) != provenance["source"]["fingerprint"]
    assert result["bytes"] < 0.6 * result["source_bytes"]  # embeddings and head are a third of so small a model
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((made / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == result["bytes"]


def test_a_tied_head_may_be_stored_again_and_old_rope_buffers_are_passed_over(tmp_path: Path) -> None:
    source = write_source(tmp_path / "llm", tied=True, shard="1GB")
    expected = load(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(24)
    save_file(tensors, source / "model.safetensors")
    assert_same_tensors(load(source), expected)


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Edit the tensors of a folder with one weight file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def write_index(folder: Path, weight_map: dict[str, str] | str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


UP = "model.layers.1.mlp.up_proj.weight"


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def twice(folder: Path) -> None:
    save_file({UP: load_file(folder / "model.safetensors")[UP]}, folder / "more.safetensors")
    write_index(folder, {UP: "more.safetensors", "model.norm.weight": "model.safetensors"})


DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a tensor is missing": (change(lambda t: t.pop(UP)), (UP, "hold no")),
    "one too many": (change(lambda t: t.update(stray=torch.ones(2))), ("model.safetensors", "stray", "no parameter")),
    "another shape": (change(lambda t: t.update({UP: t[UP][1:].clone()})), ("model.safetensors", UP, "[499, 192]")),
    "whole numbers": (change(lambda t: t.update({UP: t[UP].to(torch.int32)})), ("model.safetensors", UP, "I32")),
    "a head that is not the embeddings": (
        change(lambda t: t.update({"lm_head.weight": torch.zeros(400, 192)})),
        ("model.safetensors", "lm_head.weight", "tie_word_embeddings"),
    ),
    "a file that was cut": (cut, ("model.safetensors", "not a whole safetensors file")),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), ("has no model.safetensors",)),
    "a tensor in two files": (twice, (UP, "model.safetensors", "more.safetensors")),
    "an index of what is not there": (
        lambda folder: write_index(folder, {"gone": "model.safetensors"}),
        ("gone", "model.safetensors", "it does not"),
    ),
    "an index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[1"),
        ("model.safetensors.index.json", "not an index"),
    ),
}


@pytest.fixture(scope="module")
def tied_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "llm", tied=True, shard="1GB")


@pytest.fixture(scope="module")
def stored(tied_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "nf4"
    quantize(str(tied_source), folder)
    return folder


def assert_refused(action: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused_by_file_and_tensor(tied_source: Path, tmp_path: Path, case: str) -> None:
    damage, parts = DAMAGE[case]
    folder = Path(shutil.copytree(tied_source, tmp_path / "llm"))
    damage(folder)
    assert_refused(lambda: load(folder), parts)
    assert_refused(lambda: quantize(str(folder), tmp_path / "nf4"), parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm"]


STATE = f"{UP}.quant_state.bitsandbytes__nf4"
STORED_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no state": (change(lambda t: t.pop(STATE)), (STATE, "hold no")),
    "another state": (change(lambda t: t[STATE].zero_()), ("model.safetensors", UP, "damaged")),
    "a state of another shape": (
        change(lambda t: t.update({STATE: t["model.layers.1.mlp.down_proj.weight" + STATE.removeprefix(UP)].clone()})),
        ("model.safetensors", UP, "[192, 500]"),
    ),
    "weights that are not packed": (change(lambda t: t.update({UP: torch.zeros(500, 192)})), (UP, "F32", "U8")),
}


@pytest.mark.parametrize("case", STORED_DAMAGE)
def test_damaged_stored_weights_are_refused(stored: Path, tmp_path: Path, case: str) -> None:
    damage, parts = STORED_DAMAGE[case]
    folder = Path(shutil.copytree(stored, tmp_path / "nf4"))
    damage(folder)
    assert_refused(lambda: load(folder), parts)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"bits": 16}, ("config.json", "model.bits=16")),
        ({"bits": 32}, ("config.json", "model.bits=32")),
        ({"quant_storage": "float32"}, ("bnb_4bit_quant_storage", "'uint8'", "'float32'")),
    ],
)
def test_a_stored_model_must_fit_the_config(stored: Path, settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    assert_refused(lambda: load(stored, **settings), parts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quant_method", "gptq"),
        ("load_in_4bit", False),
        ("bnb_4bit_quant_type", "fp4"),
        ("bnb_4bit_use_double_quant", False),
    ],
)
def test_other_quantisations_are_refused(stored: Path, tmp_path: Path, field: str, value: object) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(lambda: load(folder), ("config.json", field, repr(value)))


def test_quantize_refuses_what_it_cannot_do(tied_source: Path, stored: Path, tmp_path: Path) -> None:
    assert_refused(lambda: quantize(str(stored), tmp_path / "again"), ("quantised already",))
    assert_refused(lambda: quantize(str(tied_source), tmp_path / "no", max_shard_mib=0), ("--max_shard_mib 0",))
    assert_refused(lambda: quantize(str(tied_source), stored), (str(stored), "exists already"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", [True, False])
def test_a_gpu_loads_bit_for_bit_what_transformers_loads(tmp_path: Path, place: bool) -> None:
    device = torch.device("cuda", 0)
    source = write_source(tmp_path / "llm", "bfloat16")
    quantize(str(source), tmp_path / "nf4", device="cuda")
    attention.register()
    expected: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        attn_implementation="packed",
        device_map={"": device},
        quantization_config=nf4.settings(ModelConfig(), torch.bfloat16),
    )
    for folder in (source, tmp_path / "nf4"):
        model = load_llama(ModelConfig(path=str(folder), compute_dtype="bfloat16"), device, place)
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda" if place else "cpu"}
        assert_same_tensors(model.to(device), expected)  # pyright: ignore
