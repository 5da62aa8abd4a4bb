"""Core attention over packs: Megatron's ``core_attention`` for packed and shared-prefix token layouts.

Why our own: a shared-prefix pack holds the prompt of a group once and lets every response attend to it, which none
of Megatron-Core's attention modules express; and Megatron's own module without Transformer Engine takes neither
packs nor context parallelism. The layer around it (projections, RoPE, tensor parallelism, recompute) is Megatron's.

The idea that carries all cases is in ``pack_layout.py``. Keys and values are all-gathered over the context-parallel
group (as Llama 3 was trained: arXiv 2407.21783, section 3.3.2). So sharing and context parallelism are exact, alone
and together, and a backend only needs variable-length attention with unequal query and key lengths:

- Transformer Engine (:class:`TECoreAttention`): ``thd`` with gathered keys and values;
- CUDA, half precision (:class:`CoreAttention`): torch's flash attention, same gathered keys and values;
- CPU: torch's flash kernel on unmasked blocks, merged by log-sum-exp: no gathered copies, no masks;
- anything else (fp32 on CUDA, sliding window off the GPU): ``scaled_dot_product_attention`` with masks.

Shapes: T rows of a pack on this rank, h query heads, g key-value heads (g divides h), d channels a head.
"""

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gft.pack_layout import Block, PackLayout, VarlenIndex

# Kernel limits of flash attention 2, which torch ships.
FLASH_HEAD_MULTIPLE, FLASH_HEAD_MAX = 8, 256
# Transformer Engine's fused kernels are built anew for each longest segment.
LONGEST_MULTIPLE = 64


# --- backends: query [T, h, d], key and value [K, g, d] -> [T, h, d] ---------------------------------------------


def flash_attention(q: Tensor, k: Tensor, v: Tensor, index: VarlenIndex, scale: float, window: int | None) -> Tensor:
    """torch's CUDA flash attention, one call for the pack; half precision only.

    The aten operator and not ``torch.nn.attention.varlen``: that may choose cuDNN, whose causal mask is aligned to
    the top left where flash's is aligned to the bottom right (pytorch pull request 193630), and its signature
    changed in each of the last releases.
    """
    k, v = _gather_keys(k, v, index)
    return torch.ops.aten._flash_attention_forward(
        *(q, k, v, index.cu_seqlens_q, index.cu_seqlens_kv, max(index.q_lengths), max(index.kv_lengths)),
        0.0,  # dropout
        True,  # causal
        False,  # debug mask
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=0,
    )[0]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, index: VarlenIndex, scale: float, window: int | None) -> Tensor:
    """``scaled_dot_product_attention`` entry by entry, with a mask where causal alone does not say it; any device."""
    k, v = _gather_keys(k, v, index)
    outputs = []
    # split, not slices: the gradient of a split is one concatenation, that of a slice a full-size buffer.
    pieces = zip(q.split(index.q_lengths), k.split(index.kv_lengths), v.split(index.kv_lengths), strict=True)
    for piece in pieces:
        q_j, k_j, v_j = _heads_first(*piece)
        mask = bottom_right_mask(q_j.shape[2], k_j.shape[2], window, q.device)
        out = F.scaled_dot_product_attention(
            q_j, k_j, v_j, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class GatherRows(torch.autograd.Function):
    """``rows[index]`` along the first dimension, whose gradient is summed in the same order each time, in ``dtype``.

    Rows repeat: K responses read the same prompt. ``index_select`` sums their gradients by atomic adds on CUDA.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count, ctx.dtype = len(rows), dtype
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        total = grad.new_zeros((ctx.count, *grad.shape[1:]), dtype=ctx.dtype)
        if grad.is_cuda:  # with accumulate, CUDA sorts the indices; on a CPU it is index_add_ that keeps their order
            total.index_put_((index,), grad.to(ctx.dtype), accumulate=True)
        else:
            total.index_add_(0, index, grad.to(ctx.dtype))
        return total.to(grad.dtype), None, None


def _gather_keys(k: Tensor, v: Tensor, index: VarlenIndex) -> tuple[Tensor, Tensor]:
    """Keys and values [K, g, d] in the order in which the entries of a pack read them."""
    if index.kv_index is None:
        return k, v
    wide = torch.promote_types(k.dtype, torch.float32)  # half precision would lose small gradients of K responses
    return GatherRows.apply(k, index.kv_index, wide), GatherRows.apply(v, index.kv_index, wide)


def _rounded_up(longest: int) -> int:
    return -(-longest // LONGEST_MULTIPLE) * LONGEST_MULTIPLE


def bottom_right_mask(q_length: int, kv_length: int, window: int | None, device: torch.device) -> Tensor | None:
    """bool [q_length, kv_length], True = visible; the last query sees the last key. None = plain square causal."""
    if window is None or window >= kv_length:
        if q_length == kv_length:
            return None
        window = kv_length
    position = torch.arange(kv_length - q_length, kv_length, device=device)[:, None]
    key = torch.arange(kv_length, device=device)
    return (key <= position) & (key > position - window)


class _BlockAttention(torch.autograd.Function):
    """Attention as a sum over :class:`Block` s, merged by log-sum-exp, on torch's CPU flash kernels.

    Each block's softmax is normalised over its own keys; outputs merge with weights exp(lse_block - lse_total).
    The backward kernel given the merged output and log-sum-exp yields each block's exact share of the gradients
    (probabilities are exp(score - lse_total)), as in ring attention (arXiv 2310.01889).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: tuple[Block, ...], scale: float) -> Tensor:
        out = torch.empty_like(q)  # [T, h, d]
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))  # [T, h]
        for block in blocks:
            rows, keys = _slices(block)
            o, l = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q[rows], k[keys], v[keys]), 0.0, block.causal, scale=scale
            )
            o, l = o[0].transpose(0, 1), l[0].transpose(0, 1)
            if block.causal:  # these come first and cover each row once
                out[rows], lse[rows] = o, l
                continue
            merged = torch.logaddexp(lse[rows], l)
            old, new = (torch.exp(x - merged)[..., None].to(q.dtype) for x in (lse[rows], l))
            out[rows] = out[rows] * old + o * new
            lse[rows] = merged
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for block in ctx.blocks:
            rows, keys = _slices(block)
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(grad[rows], q[rows], k[keys], v[keys], out[rows]),
                lse[rows].transpose(0, 1)[None],
                0.0,
                block.causal,
                scale=ctx.scale,
            )
            for total, part, where in zip((dq, dk, dv), grads, (rows, keys, keys), strict=True):
                total[where] += part[0].transpose(0, 1)
        return dq, dk, dv, None, None


def _slices(block: Block) -> tuple[slice, slice]:
    return (
        slice(block.q_start, block.q_start + block.q_length),
        slice(block.k_start, block.k_start + block.k_length),
    )


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[n, heads, d] -> views [1, heads, n, d]."""
    return [t.transpose(0, 1)[None] for t in tensors]


# --- modules ------------------------------------------------------------------------------------------------------


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm as Megatron's layers want it. Megatron's own refuses sequence parallelism, where each tensor rank
    sees a part of the rows: ``finalize_model_grads`` sums the gradients of weights marked ``sequence_parallel``."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """A view of keys among queries and values is copied: backward would keep all of them."""
        return super().forward(x.contiguous())


class CoreAttention(MegatronModule):
    """Core attention on torch alone, CPU or GPU; the constructor is the one that Megatron's layer specs call.

    Self-attention, causal, without dropout: ``backend.py`` asks for nothing else.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        self.window = None  # tokens that a query sees, itself included; None = all
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.cp_group = pg_collection.cp

    @property
    def cp_rank(self) -> int:
        """This rank's place among those that share a pack."""
        return 0 if self.cp_group is None else self.cp_group.rank()

    def _check(self, layout: PackLayout, query: Tensor) -> None:
        """A layout that does not belong to the tensors would give wrong numbers silently."""
        cp_size = self.config.context_parallel_size
        if layout.cp_size != cp_size or query.shape[:2] != (layout.tokens // cp_size, 1):
            raise ValueError(
                f"layout of {layout.tokens} rows, cp_size {layout.cp_size} does not fit query "
                f"{tuple(query.shape)} at context_parallel_size {cp_size}"
            )

    def _gather(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[T, g, d] of this rank -> [T * cp, g, d] of all, by rank; backward reduce-scatters. One collective."""
        if self.cp_group is None:
            return key, value.contiguous()  # a view would keep the whole projection of q, k and v for backward
        both = gather_from_sequence_parallel_region(torch.cat((key, value), 1), group=self.cp_group)
        return tuple(both.chunk(2, 1))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> Tensor:
        """Attend within a pack.

        Args:
            query: [T, 1, h/tp, d] after RoPE; T local rows (zig-zag under context parallelism).
            key, value: [T, 1, g/tp, d].
            packed_seq_params: which rows see which; ``attention_mask`` and the rest are not read.

        Returns:
            [T, 1, h/tp * d].
        """
        assert packed_seq_params is not None
        self._check(packed_seq_params, query)
        out = self._attend(query.squeeze(1), *self._gather(key.squeeze(1), value.squeeze(1)), packed_seq_params)
        return out.reshape(len(out), 1, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
        """[T, h, d] and gathered keys and values [T * cp, g, d] -> [T, h, d] or [T, h * d]."""
        window = self.window if self.window is not None and self.window < layout.max_seqlen_kv else None
        head_fits = q.shape[-1] % FLASH_HEAD_MULTIPLE == 0 and q.shape[-1] <= FLASH_HEAD_MAX
        if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and head_fits:
            return flash_attention(q, k, v, layout.varlen(self.cp_rank, q.device), self.scale, window)
        if q.is_cuda or window is not None:
            return masked_attention(q, k, v, layout.varlen(self.cp_rank, q.device), self.scale, window)
        if layout.cp_size > 1:
            order = layout.ungather_index(k.device)
            k, v = k.index_select(0, order), v.index_select(0, order)
        return _BlockAttention.apply(q, k, v, layout.blocks(self.cp_rank), self.scale)


class TECoreAttention(CoreAttention):
    """Core attention on Transformer Engine's kernels, through Megatron's wrapper (which knows TE's versions).

    Shared prefixes and context parallelism come to TE as gathered keys and values with unequal lengths and mask
    ``padding_causal_bottom_right``; TE's own context parallelism stays off. A sliding window over unequal lengths
    goes to torch's flash attention instead: TE's FusedAttention aligns windows to the top left (table "Sliding
    window attention" in TE's dot_product_attention/utils.py), which would be silently wrong.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # Optional dependency: megatron's module imports without TE, its classes do not construct.
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        local = copy.copy(config)
        local.context_parallel_size = 1
        # In a tuple, so that it is no submodule: TE registers an (empty) extra state, and checkpoints must not
        # depend on the attention backend.
        self._attention = (TEDotProductAttention(local, *args, **kwargs),)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
        index = layout.varlen(self.cp_rank, q.device)
        if index.kv_index is not None and self.window is not None:
            return super()._attend(q, k, v, layout)
        k, v = _gather_keys(k, v, index)
        # Megatron's enum lacks the second value of TE's; its wrapper reads only ``.name``.
        mask_type = "padding_causal" if index.kv_index is None else "padding_causal_bottom_right"
        thd = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=index.cu_seqlens_q,
            cu_seqlens_kv=index.cu_seqlens_kv,
            max_seqlen_q=_rounded_up(max(index.q_lengths)),
            max_seqlen_kv=_rounded_up(max(index.kv_lengths)),
        )
        return self._attention[0](q, k, v, None, SimpleNamespace(name=mask_type), packed_seq_params=thd)
