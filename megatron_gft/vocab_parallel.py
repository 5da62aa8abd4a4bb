"""Log-probabilities and the GFT loss over a vocabulary that is cut across tensor-parallel ranks.

:func:`vocab_parallel_logprobs` takes logits; :func:`linear_gft_loss` takes the last hidden state and never
holds more than a chunk of them. Both rest on the row passes of ``head_rows`` and one small all-gather
of per-row statistics, so every rank sees bit-equal log-probabilities and takes the same branch at tau.

Why the gradient can be made in forward: the loss is linear in the detached row weights, and row t's gradient
``w_t (softmax_t - onehot_t)`` needs row t alone. Per chunk: logits GEMM -> statistics -> combine over ranks -> p ->
w (:func:`gft.row_weights`) -> gradient of the logits in place of the logits -> hidden-gradient GEMM, weight-gradient
GEMM. Only the scalar upstream gradient is unknown, and with ``calculate_per_token_loss`` Megatron divides by the token
count after backward, so it is the loss scale (1 except in fp16).

Two homes for the weight gradient:

- by default a buffer of its own (float32 for half-precision weights), scaled and handed to autograd in
  backward: correct for any upstream gradient and anywhere in a graph;
- with ``accumulate_into_main_grad`` straight into Megatron's ``weight.main_grad`` **during forward**: no buffer,
  no second pass over [vocab, h]. Sound under Megatron's schedules: ``main_grad`` is zeroed before the first
  forward of a step, and its reduction starts only when the *backward* of the last microbatch has reported every
  parameter of the bucket, which comes after that microbatch's forward. Two conditions remain, and both are
  checked: a forward without backward must not pass here (the caller says so by not asking), and the upstream
  gradient must equal ``loss_scale`` (asserted in backward).

Shapes: T rows, V vocabulary rows of all ranks (padding included), v = V/tp rows here, h hidden size.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_gft.gft import RowFacts, row_weights
from megatron_gft.head_rows import RowResult, VocabShard, choose_passes, combine, exponentiate_rows_, softmax_gradient
from megatron_gft.objectives import OBJECTIVES, HeadSettings, by_source


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, shard):
        exponentials = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        rows = combine(exponentiate_rows_(exponentials, labels, shard), shard.tp_group)
        ctx.shard = shard
        ctx.save_for_backward(exponentials, labels, rows.scale, rows.logprobs)
        return rows.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs):
        exponentials, labels, scale, logprobs = ctx.saved_tensors
        rows, out = RowResult(logprobs, None, scale), torch.empty_like(exponentials)
        gradient = softmax_gradient(exponentials, labels, ctx.shard, rows, -grad_logprobs, out)
        return gradient, None, None


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """log p of the labels, differentiable in the logits.

    Args:
        logits: [T, v] this rank's columns; left unchanged.
        labels: [T] int64, in the whole vocabulary; equal on all ranks. A label >= ``vocab_size`` gives -inf.
        tp_group: tensor-parallel ranks that hold the other columns; None for one rank.
        vocab_size: true size of the vocabulary; columns beyond it are padding and have no probability.

    Returns:
        [T], float32 (float64 for float64 logits), the same bits on every rank.
    """
    assert logits.dim() == 2 and labels.shape == logits.shape[:1], (logits.shape, labels.shape)
    shard = VocabShard.of_rank(logits.shape[1], tp_group, vocab_size)
    return _VocabParallelLogprobs.apply(logits, labels, shard)


class _Gradients(NamedTuple):
    """Where a pass leaves its gradients (None: nobody wants it) and how; see :func:`linear_gft_loss`."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    reduce_hidden: bool
    into_main_grad: bool
    loss_scale: torch.Tensor | float


def _run_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    settings: HeadSettings,
    facts: RowFacts | None,
    shard: VocabShard,
    gradients: _Gradients,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss sum, log-probs [T] and entropy [T]; fills ``gradients`` on the way."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    weights = torch.empty_like(logprobs, dtype=torch.promote_types(dtype, token_weights.dtype))
    entropy = torch.empty_like(logprobs) if settings.entropy else None
    chunks = list(_chunks(len(hidden), settings.chunk_rows(shard.size, hidden.itemsize)))
    largest = max((rows.stop - rows.start for rows in chunks), default=0)
    buffer = torch.empty((largest, shard.size), dtype=hidden.dtype, device=hidden.device)
    passes, reductions = choose_passes(buffer), []
    for rows in chunks:
        x, y = hidden[rows], labels[rows]
        logits = torch.mm(x, weight.t(), out=buffer[: len(x)])
        statistics = passes.statistics(logits, y, shard, settings.entropy)
        result = combine(statistics, shard.tp_group)
        logprobs[rows] = result.logprobs
        if entropy is not None and result.entropy is not None:
            entropy[rows] = result.entropy
        weights[rows] = row_weights(result.logprobs, token_weights[rows], settings, facts and facts.at(rows))
        if gradients.hidden is None and gradients.weight is None:
            continue
        scaled = weights[rows] * gradients.loss_scale
        logits_grad = passes.gradient_(logits, y, shard, statistics, result, scaled)
        if gradients.hidden is not None:
            torch.mm(logits_grad, weight, out=gradients.hidden[rows])
            if gradients.reduce_hidden and shard.tp_group is not None:
                # Runs behind the weight-gradient GEMM and the next chunk's logits GEMM.
                reductions.append(dist.all_reduce(gradients.hidden[rows], group=shard.tp_group, async_op=True))
        if gradients.weight is not None:
            holds_nothing = rows.start == 0 and not gradients.into_main_grad
            _add_weight_gradient_(gradients.weight, logits_grad, x, overwrite=holds_nothing)
    for work in reductions:
        work.wait()
    return -(weights * logprobs).sum(), logprobs, entropy


class _LinearGFTLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, rows, shard, reduce_hidden, into_main_grad, loss_scale):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        into_main_grad = into_main_grad and wants_weight
        weight_grad = weight.main_grad if into_main_grad else None
        if wants_weight and not into_main_grad:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            allocate = torch.empty if len(hidden) else torch.zeros
            weight_grad = allocate(weight.shape, dtype=dtype, device=weight.device)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        gradients = _Gradients(hidden_grad, weight_grad, reduce_hidden, into_main_grad, loss_scale)
        labels, token_weights, settings, facts = rows
        outputs = _run_chunks(hidden, weight, labels, token_weights, settings, facts, shard, gradients)
        ctx.hidden_grad = hidden_grad
        ctx.weight_grad = None if into_main_grad else weight_grad
        ctx.weight = weight if into_main_grad else None
        ctx.loss_scale, ctx.done = loss_scale, False
        ctx.mark_non_differentiable(*(tensor for tensor in outputs[1:] if tensor is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.done:
            raise RuntimeError("linear_gft_loss: backward ran twice; its gradients are made once, in forward")
        ctx.done = True
        factor = grad_loss / ctx.loss_scale
        hidden_grad, weight_grad, weight = ctx.hidden_grad, ctx.weight_grad, ctx.weight
        ctx.hidden_grad = ctx.weight_grad = ctx.weight = None
        if hidden_grad is not None:
            hidden_grad.mul_(factor)
        if weight is not None:
            torch._assert_async(  # no host synchronisation on a GPU
                factor == 1,
                "linear_gft_loss: the upstream gradient is not loss_scale, but the weight gradient is in main_grad "
                "already -> scale the loss through loss_scale, or do not accumulate into main_grad",
            )
            weight_grad = _placeholder_gradient(weight)
        elif weight_grad is not None:
            weight_grad = weight_grad.mul_(factor)
        return hidden_grad, weight_grad, *[None] * 5


def linear_gft_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    settings: HeadSettings | None = None,
    facts: RowFacts | None = None,
    *,
    objective: str | None = None,
    tp_group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_into_main_grad: bool = False,
    loss_scale: torch.Tensor | float = 1.0,
    **changes: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output layer + cross entropy + row weights in one pass over chunks of rows.

    Three GEMMs and one all-gather of 3 floats a row, whatever the objective. Beyond the two gradients it holds one
    buffer of ``settings.chunk_rows`` x v in the dtype of ``hidden``. Statistics, p and c are float32 (float64 for
    float64 inputs). Without gradients (``torch.no_grad``, or inputs that need none) only the first GEMM runs.

    Args:
        hidden: [T, h] rows that carry loss, the same on all ranks of ``tp_group``; T may be 0.
        weight: [v, h] this rank's rows of the output matrix, in the dtype of ``hidden``.
        labels: [T] int64 in the whole vocabulary.
        token_weights: [T] float32 or wider, A * u of each row (``gft.response_weights``).
        settings, facts: None for the defaults of :class:`HeadSettings`, and where the coefficient reads p alone.
        objective: a preset that picks the coefficient unless ``coefficient`` names one.
        tp_group: ranks that hold the other rows of the matrix; None for one rank.
        reduce_hidden_grad: sum the gradient of ``hidden`` over ``tp_group``, as for an input that is replicated.
            With sequence parallelism pass False: the gather before this call reduce-scatters the partial sums.
        accumulate_into_main_grad: add the weight gradient to ``weight.main_grad`` in forward (see the module's
            docstring for when that is sound), mark ``grad_added_to_main_grad`` and return a placeholder.
        loss_scale: upstream gradient to expect (fp16 loss scaling); gradients are made at this scale, so that
            they do not underflow.
        changes: fields of ``settings`` by name: ``tau=0.2, chunk_tokens=512``.

    Returns:
        (sum of ``gft.row_weights`` * -log p, scalar with gradient; log p [T]; entropy [T] in nats or None);
        the last two without gradient. Equal on all ranks of ``tp_group``.
    """
    if objective is not None:
        changes = {"coefficient": by_source(OBJECTIVES[objective].coefficient)} | changes
    settings = replace(settings or HeadSettings(), **changes)
    assert hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert labels.shape == token_weights.shape == hidden.shape[:1], (hidden.shape, labels.shape, token_weights.shape)
    assert settings.chunk_tokens is None or settings.chunk_tokens > 0, settings
    shard = VocabShard.of_rank(len(weight), tp_group, settings.vocab_size)
    if not torch.is_grad_enabled():  # which the function below cannot see
        hidden, weight = hidden.detach(), weight.detach()
    rows = (labels, token_weights, settings, facts)  # without gradient
    return _LinearGFTLoss.apply(hidden, weight, rows, shard, reduce_hidden_grad, accumulate_into_main_grad, loss_scale)


def _chunks(num_rows: int, largest: int) -> Iterator[slice]:
    """Cut ``num_rows`` into the fewest pieces of at most ``largest`` rows, equal to within one row."""
    pieces = -(-num_rows // largest)
    for i in range(pieces):
        yield slice(num_rows * i // pieces, num_rows * (i + 1) // pieces)


def _add_weight_gradient_(total: torch.Tensor, logits_grad: torch.Tensor, x: torch.Tensor, *, overwrite: bool) -> None:
    """``total [v, h] (+)= logits_grad.T [v, T] @ x [T, h]``, accumulated in the dtype of ``total``."""
    beta = 0 if overwrite else 1
    if total.dtype == x.dtype:
        torch.addmm(total, logits_grad.t(), x, beta=beta, out=total)
    elif x.is_cuda:
        torch.addmm(total, logits_grad.t(), x, out_dtype=total.dtype, beta=beta, out=total)
    else:
        # No mixed-dtype GEMM on the CPU: slices of the vocabulary keep the half-precision product small.
        for rows in _chunks(len(total), 4096):
            product = torch.mm(logits_grad[:, rows].t(), x)
            total[rows] = product if overwrite else total[rows].add_(product)


def _placeholder_gradient(weight: torch.Tensor) -> torch.Tensor:
    """What autograd gets for a weight whose gradient is in ``main_grad`` already (Megatron's DDP contract).

    DDP's hooks need some gradient to fire. They ignore its values, except under ``zero_out_wgrad`` (embedding and
    output layer share the weight on this stage): there the sum with the embedding's gradient is added to
    ``main_grad``, so this part must be zero. An expanded zero takes no memory.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if getattr(weight, "zero_out_wgrad", False):
        return weight.new_zeros(()).expand_as(weight)
    return torch.empty_like(weight)
