"""Megatron-Core's GPT model with packs as input and the GFT loss as output.

:class:`GFTModel` stays a ``GPTModel`` (parameters, checkpoints, pipeline, DDP hooks); its forward takes a pack,
indexes RoPE by our position ids, and ends in :class:`GFTOutputLayer`, Megatron's ``ColumnParallelLinear`` with a second
way to be called: it computes the loss from the last hidden state. It must be called as a module
(``self.output_layer(...)``), since DDP's parameter all-gather hangs on its forward pre-hook. Only the rows named in
``loss_rows`` reach the matrix: prompt rows cost nothing there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gft.attention import GatherRows
from megatron_gft.backend import build_layer_spec, build_transformer_config, choose_backend
from megatron_gft.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_gft.gft import RowFacts, row_weights
from megatron_gft.head_rows import VocabShard
from megatron_gft.hf.shape import ModelShape, gpt_model_kwargs, padded_vocab_size
from megatron_gft.objectives import HeadSettings, by_source
from megatron_gft.packing import Pack
from megatron_gft.parallel import Parallel
from megatron_gft.vocab_parallel import linear_gft_loss


class GFTOutputLayer(ColumnParallelLinear):
    """Output layer of ``GPTModel``. Without ``loss_rows`` it is Megatron's layer and returns (logits, bias).

    It has no state of its own, so a built ``ColumnParallelLinear`` becomes one by assigning ``__class__``: the
    vocabulary matrix is not allocated twice and DDP, checkpoints and tying see the same parameter.
    """

    def forward(  # type: ignore[override]
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        loss_rows: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
        settings: HeadSettings | None = None,
        facts: RowFacts | None = None,
    ):
        """Logits as Megatron's layer, or with ``loss_rows`` the GFT loss of these rows.

        Args:
            input_: [s, 1, h] last hidden state; [s/tp, 1, h] with sequence parallelism.
            weight: [v/tp, h] the tied embedding matrix; None for the layer's own.
            loss_rows: [N] int64 rows of the gathered s; repeated where one row predicts the first token of
                several responses (shared prefix). N may be 0.
            labels, token_weights, settings, facts: [N], as for :func:`linear_gft_loss`.

        Returns:
            (loss sum, scalar with gradient; log p [N]; entropy [N] or None), equal on all tensor-parallel ranks.
        """
        if loss_rows is None:
            return super().forward(input_, weight, runtime_gather_output)
        assert labels is not None and token_weights is not None and settings is not None
        assert input_.dim() == 3 and input_.shape[1] == 1, input_.shape
        assert self.bias is None, "an output layer with bias is not supported"
        weight = self.weight if weight is None else weight
        rows = self._select_rows(input_, loss_rows)
        if not settings.fused:
            return self._unfused_loss(rows, weight, labels, token_weights, settings, facts)
        grad_scale = self.config.grad_scale_func
        return linear_gft_loss(
            rows,
            weight,
            labels,
            token_weights,
            settings,
            facts,
            tp_group=self.tp_group,
            reduce_hidden_grad=self.allreduce_dgrad,
            # Megatron's DDP sets both attributes: there is a buffer, and its hooks know of gradients put there.
            accumulate_into_main_grad=self.training
            and hasattr(weight, "main_grad")
            and hasattr(weight, "grad_added_to_main_grad"),
            loss_scale=1.0 if grad_scale is None else grad_scale(torch.ones((), device=rows.device)),
        )

    def _select_rows(self, input_: torch.Tensor, loss_rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, h] of the whole sequence.

        Each rank's gradient of them is a partial sum over its part of the vocabulary. With sequence parallelism
        the gather's backward reduce-scatters the sums; without, loss or linear layer all-reduces them
        (``allreduce_dgrad``, as Megatron decided in the constructor), on N rows instead of s.
        """
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        return GatherRows.apply(input_[:, 0], loss_rows, input_.dtype)

    def _unfused_loss(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        settings: HeadSettings,
        facts: RowFacts | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        logits = self._forward_impl(
            input=rows,
            weight=weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=False,  # gathered already
            grad_output_buffer=None,
            wgrad_deferral_limit=None,
            tp_group=self.tp_group,
        )
        shard = VocabShard.of_rank(logits.shape[1], self.tp_group, settings.vocab_size)
        if shard.valid < shard.size:
            logits[:, shard.valid :] = torch.finfo(logits.dtype).min
        entropy = None
        if settings.entropy:  # before the cross entropy, which overwrites float32 logits
            full = gather_from_tensor_model_parallel_region(logits.detach(), group=self.tp_group)
            entropy = torch.special.entr(full.float().softmax(dim=1)).sum(1)
        logprobs = -vocab_parallel_cross_entropy(logits[:, None], labels[:, None])[:, 0]
        weights = row_weights(logprobs, token_weights, settings, facts)
        return -(weights * logprobs).sum(), logprobs.detach(), entropy


@dataclass
class LossOutput:
    """What the last stage returns for one pack.

    ``loss_sum`` is ``sum(w * -log p)`` over this rank's loss rows with w of ``gft.row_weights``, scalar, with gradient;
    ``logprobs`` and ``entropy`` are ``[N]`` float32 without gradient (``entropy`` None when not asked for).
    """

    loss_sum: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class GFTModel(GPTModel):
    """``GPTModel`` whose forward takes a :class:`Pack` and, on the last stage, returns a :class:`LossOutput`."""

    def __init__(
        self,
        config: TransformerConfig,
        spec: TransformerBlockSubmodules,
        shape: ModelShape,
        *,
        vocab_size: int,
        head: HeadSettings,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None = None,
    ):
        options = gpt_model_kwargs(shape)
        super().__init__(
            config,
            spec,
            vocab_size=vocab_size,
            max_sequence_length=options["max_sequence_length"],
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=options["share_embeddings_and_output_weights"],
            position_embedding_type="none",  # RoPE below, by position id
            vp_stage=vp_stage,
        )
        self.shape = shape
        self.head = head
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=shape.kv_channels,
            rotary_percent=1.0,
            rotary_base=options["rotary_base"],
            rope_scaling=options.get("rope_scaling", False),
            rope_scaling_factor=options.get("rope_scaling_factor", 8.0),
            use_cpu_initialization=config.use_cpu_initialization,
        )
        if post_process:
            # Same parameters, other forward. Building a second layer would allocate the vocabulary matrix twice.
            self.output_layer.__class__ = GFTOutputLayer
            self.output_layer.gradient_accumulation_fusion = False  # needs apex; the fused head adds by itself

    def rotary_frequencies(self, position_ids: torch.Tensor) -> torch.Tensor:
        """RoPE angles of ``position_ids`` [t] as [t, 1, 1, kv_channels].

        Megatron counts positions from the start of a buffer or of a thd segment; neither holds for a response
        that continues a shared prompt.
        """
        inv_freq = self.rotary_pos_emb.inv_freq.to(position_ids.device)
        positions = position_ids.to(inv_freq.dtype) / (self.shape.seq_len_interpolation_factor or 1.0)
        angles = torch.outer(positions, inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def hidden_states(self, pack: Pack) -> torch.Tensor:
        """Output of this stage's layers, [t(/tp with sequence parallel), 1, h]; t rows of this context rank."""
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=pack.tokens[None], position_ids=pack.position_ids[None])
        return self.decoder(
            hidden_states=embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary_frequencies(pack.position_ids),
            packed_seq_params=pack.layout,
        )

    def output_weight(self) -> torch.Tensor | None:
        """The embedding matrix where it is also the output layer's, else None."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def forward(self, pack: Pack) -> torch.Tensor | LossOutput:  # type: ignore[override]
        """Hidden states for the next stage, or on the last one the loss of this pack's rows."""
        hidden = self.hidden_states(pack)
        if not self.post_process:
            return hidden
        loss_sum, logprobs, entropy = self.output_layer(
            hidden,
            weight=self.output_weight(),
            loss_rows=pack.loss_rows,
            labels=pack.labels,
            token_weights=pack.token_weights,
            settings=self.head,
            facts=pack.facts,
        )
        return LossOutput(loss_sum, logprobs, entropy)

    def logits(self, pack: Pack) -> torch.Tensor:
        """Logits of every row of this context rank, [t, vocab/tp] (padding columns included); last stage only."""
        hidden = self.hidden_states(pack)
        logits, _ = self.output_layer(hidden, weight=self.output_weight())
        return logits[:, 0]


def build_model(
    shape: ModelShape,
    model: ModelConfig,
    objective: ObjectiveConfig,
    parallel_config: ParallelConfig,
    parallel: Parallel,
    **extra: Any,
) -> tuple[TransformerConfig, list[torch.nn.Module]]:
    """The model chunks of this rank (one, or ``vpp`` of them), on the GPU when there is one.

    Returns Megatron's configuration and the chunks, in bf16 wrapped in Megatron's ``Float16Module``
    (which leaves packs and their float32 weights as they are: it converts bare tensors).
    """
    backend = choose_backend(model.backend, model.precision)
    config = build_transformer_config(shape, model, parallel_config, backend=backend, **extra)
    head = HeadSettings(
        tau=objective.tau,
        coefficient=by_source(objective.coefficient or "rectified"),
        **objective.model_dump(include={"eps_low", "eps_high", "ratio_dual_clip", "shaping"}),
        vocab_size=shape.vocab_size,
        fused=objective.fused_head,
        chunk_tokens=objective.head_chunk_tokens,
        entropy=objective.entropy,
    )
    vocab_size = padded_vocab_size(shape.vocab_size, parallel.tp_size, model.make_vocab_size_divisible_by)
    stages: Sequence[int | None] = [None] if parallel.vp_size is None else range(parallel.vp_size)
    chunks: list[torch.nn.Module] = []
    for vp_stage in stages:
        first, last = parallel.stage_bounds(vp_stage)
        chunk: torch.nn.Module = GFTModel(
            config,
            build_layer_spec(config, backend, vp_stage),
            shape,
            vocab_size=vocab_size,
            head=head,
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
        )
        if torch.cuda.is_available() and not extra.get("init_model_with_meta_device"):
            chunk.cuda(torch.cuda.current_device())
        if config.bf16:
            chunk = Float16Module(config, chunk)
        chunks.append(chunk)
    return config, chunks


def unwrap(chunk: torch.nn.Module) -> GFTModel:
    """The model inside DDP and half-precision wrappers."""
    while not isinstance(chunk, GFTModel):
        assert isinstance(chunk.module, torch.nn.Module)
        chunk = chunk.module
    return chunk
