"""HybridLlama: behaviour embeddings written in place into a Llama's input, loss on the answers only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llara_dist.config import KernelsConfig, LoraConfig, ModelConfig, ProjectorConfig
from llara_dist.errors import InputError
from llara_dist.model.attention import NAME as PACKED
from llara_dist.model.fused_lora import fuse_lora
from llara_dist.model.kernels import Kernels, chooser
from llara_dist.model.layers import arrange_layers
from llara_dist.model.llama import attach_lora, compute_dtype, load_llama
from llara_dist.model.ops.projector import output_rms, write_reference
from llara_dist.model.packing import AnswerRows, Packing
from llara_dist.model.projector import Projector
from llara_dist.stream.batch import Batch


class HybridLlama(nn.Module):
    """A frozen Llama with LoRA that reads titles and behaviour embeddings (LLaRA, section 3.2).

    No vocabulary row is added: the slot positions of a row hold any token id, and the projected item embedding
    replaces that id's embedding before the first layer.

    Args:
        llm: a LlamaForCausalLM or a PeftModel around one.
        projector: [U, d] → [U, h].
        item_table: [num_items, d] float32, frozen; kept as a buffer that is saved nowhere.
        dtype: what matrix products run in; parameters that train stay float32 whatever it is.
        kernels: which implementation computes.
    """

    item_table: Tensor
    llm: Any

    def __init__(
        self, llm: nn.Module, projector: Projector, item_table: Tensor, dtype: torch.dtype, kernels: Kernels
    ) -> None:
        super().__init__()
        self.llm = llm
        self.kernels = kernels
        self.projector = projector
        self.dtype = dtype
        self.register_buffer("item_table", item_table.to(torch.float32), persistent=False)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings of a packed row, behaviour embeddings written at the slot positions.

        The projector takes part whether or not the row has a slot: a parameter without a gradient on one rank hangs
        or corrupts ZeRO's reductions, and under ZeRO-3 silently repeats the previous step's gradient.

        Returns:
            [1, T, h] in the language model's embedding dtype.
        """
        # Detached: the embedding is frozen, and PEFT makes its output a leaf that requires a gradient when activations
        # are checkpointed, which could not be written in place. Written before the batch dimension is added: autograd
        # would copy the gradient of a view that was written to.
        row = self.llm.get_input_embeddings()(batch.tokens).detach()
        if self.kernels.projector == "triton":
            return self.projector.write(row, self.item_table, batch)[None]
        behaviour = self.projector(self.item_table[batch.unique_items])
        return write_reference(row, behaviour, batch.slot_positions, batch.slot_inverse)[None]

    def answer_logits(self, batch: Batch) -> Tensor:
        """Float32 logits [L, vocabulary] at the positions that predict answer tokens; the head runs nowhere else."""
        arguments: dict[str, Any] = {"logits_to_keep": batch.label_positions}
        if self._attention() == PACKED:
            arguments["packing"] = packing = Packing.of(batch, self.kernels.attention)
            if self.kernels.last_layer == "answers":
                arguments["answer_rows"] = rows = AnswerRows.of(batch, packing)
                arguments["logits_to_keep"] = rows.labels
            # A four-dimensional mask is taken as it is: transformers then builds no T × T mask from position_ids.
            arguments["attention_mask"] = torch.empty((1, 1, 1, 1), device=batch.tokens.device)
        with torch.autocast(batch.tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.llm(
                inputs_embeds=self.embed(batch),
                position_ids=batch.position_ids[None],
                use_cache=False,
                **arguments,
            )
        return output.logits[0].to(torch.float32)

    def forward(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the row's answer tokens (EOS included), a float32 scalar; 0 for an empty row."""
        return F.cross_entropy(self.answer_logits(batch), batch.labels, reduction="sum")

    def _attention(self) -> str:
        return self.llm.config._attn_implementation

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' trainable parameters by name."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("projector.")}

    def projector_parameters(self) -> dict[str, nn.Parameter]:
        """The projector's parameters by name."""
        return {n: p for n, p in self.named_parameters() if n.startswith("projector.")}


FASTEST = KernelsConfig()
"""of every part the fastest that is installed and fits the device"""


def build_hybrid_llama(
    model: ModelConfig,
    lora: LoraConfig,
    projector: ProjectorConfig,
    item_table: Tensor,
    device: torch.device,
    seed: int,
    place: bool = True,
    kernels: KernelsConfig = FASTEST,
) -> HybridLlama:
    """Load the base, attach LoRA, make the projector; every rank makes the same from the same seed.

    Args:
        model: the frozen language model.
        lora: the adapters.
        projector: width and initialisation.
        item_table: [num_items, d] float32.
        device: where it computes.
        seed: of the adapters' and the projector's initialisation.
        place: move everything to `device` now; false under ZeRO-3.
        kernels: which implementation computes.

    Raises:
        InputError: a part does not load, the item table is not finite, or a kernel asked for cannot run here.
    """
    if not bool(torch.isfinite(item_table).all()):
        raise InputError("the item table holds values that are not finite; train the recommender again")
    dtype = compute_dtype(model, device)
    chosen = chooser(model, device, zero_stage=0 if place else 3)(kernels)
    llm = load_llama(model, device, place)
    if chosen.last_layer == "answers":
        from llara_dist.model.last_layer import compute_answers_only

        compute_answers_only(llm)
    embedding: Any = llm.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = attach_lora(llm, lora, model.path)
        arrange_layers(llm, chosen)
        made = Projector(item_table.shape[1], llm.config.hidden_size, projector.hidden_dim)
    if chosen.lora == "fused":
        fuse_lora(adapted)
    if projector.init == "embedding_scale":
        made.match_scale(item_table.to(torch.float32), float(output_rms(embedding)))
    hybrid = HybridLlama(adapted, made, item_table, dtype, chosen)
    return hybrid.to(device) if place else hybrid
