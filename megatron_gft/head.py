"""The output layer that computes the loss: Megatron's ``ColumnParallelLinear`` with a second way to be called.

It must be called as a module (``self.output_layer(...)``), since DDP's parameter all-gather hangs on its forward
pre-hook. Only the rows named in ``loss_rows`` reach the matrix: prompt rows cost nothing here.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch.autograd.function import once_differentiable

from megatron_gft.gft import token_coefficient
from megatron_gft.objectives import HeadSettings
from megatron_gft.vocab_parallel import VocabShard, linear_gft_loss


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
    ):
        """Logits as Megatron's layer, or with ``loss_rows`` the GFT loss of these rows.

        Args:
            input_: [s, 1, h] last hidden state; [s/tp, 1, h] with sequence parallelism.
            weight: [v/tp, h] the tied embedding matrix; None for the layer's own.
            runtime_gather_output: as in Megatron; logits only.
            loss_rows: [N] int64 rows of the gathered s; repeated where one row predicts the first token of
                several responses (shared prefix). N may be 0.
            labels: [N] int64.
            token_weights: [N] float32, A * u.
            settings: objective and path.

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
        loss = self._fused_loss if settings.fused else self._unfused_loss
        return loss(rows, weight, labels, token_weights, settings)

    def _select_rows(self, input_: torch.Tensor, loss_rows: torch.Tensor) -> torch.Tensor:
        """Rows [N, h] of the whole sequence.

        Each rank's gradient of them is a partial sum over its part of the vocabulary. With sequence parallelism
        the gather's backward reduce-scatters the sums; without, loss or linear layer all-reduces them
        (``allreduce_dgrad``, as Megatron decided in the constructor), on N rows instead of s.
        """
        if self.sequence_parallel:
            input_ = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        return _SelectRows.apply(input_[:, 0], loss_rows)

    def _fused_loss(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        settings: HeadSettings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        grad_scale = self.config.grad_scale_func
        return linear_gft_loss(
            rows,
            weight,
            labels,
            token_weights,
            settings,
            tp_group=self.tp_group,
            reduce_hidden_grad=self.allreduce_dgrad,
            # Megatron's DDP sets both attributes: there is a buffer, and its hooks know of gradients put there.
            accumulate_into_main_grad=self.training
            and hasattr(weight, "main_grad")
            and hasattr(weight, "grad_added_to_main_grad"),
            loss_scale=1.0 if grad_scale is None else grad_scale(torch.ones((), device=rows.device)),
        )

    def _unfused_loss(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        settings: HeadSettings,
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
        c = token_coefficient(logprobs, settings.tau, settings.coefficient)
        return -(token_weights * c * logprobs).sum(), logprobs.detach(), entropy


class _SelectRows(torch.autograd.Function):
    """``input[rows]`` whose backward adds repeated rows in a fixed order, so that runs repeat bit for bit.

    ``index_add_`` is sequential on the CPU but atomic on CUDA; accumulating ``index_put_`` is the reverse (it
    sorts on CUDA).
    """

    @staticmethod
    def forward(ctx, input_, rows):
        ctx.save_for_backward(rows)
        ctx.input_shape = input_.shape
        return input_.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.input_shape)
        if grad.is_cuda:
            return total.index_put_((rows,), grad, accumulate=True), None
        return total.index_add_(0, rows, grad), None
