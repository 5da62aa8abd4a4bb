"""The head's two row passes as Triton kernels: every logit is read twice and written once.

The eager passes of ``head_rows`` are the reference; on a GPU each of theirs goes through memory several times
(40 bytes a half-precision logit, 64 with entropy; here 6, with entropy or without). Logits come in and gradients go
out in the dtype of the logits (half precision or float32); everything between is float32.

Shapes: T rows, v columns here, of which the first ``valid`` are real.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A thread holds 8 columns of a half-precision row, one 16-byte load.
STATISTICS_BLOCK, GRADIENT_BLOCK, WARPS = 2048, 4096, 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def statistics_kernel(
    logits, labels, out, rows, stride, start, valid, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # pragma: no cover - runs on the device
    """One program a row. The softmax is kept online lane by lane; lanes meet once, at the end."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    offsets = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum of e = exp(x - peak)
    dot = tl.zeros((BLOCK,), tl.float32)  # sum of e * (x - peak)
    for first in range(0, valid, BLOCK):
        columns = first + offsets
        inside = columns < valid
        x = tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        rescale = tl.exp(peak - higher)
        e = tl.exp(x - higher)
        if ENTROPY:
            dot = rescale * (dot + total * (peak - higher)) + tl.where(e > 0, e * (x - higher), 0.0)
        total = total * rescale + e
        peak = higher
    top = tl.max(peak, 0)
    scale = tl.exp(peak - top)
    label = tl.load(labels + row) - start
    owned = (label >= 0) & (label < valid)
    target = tl.load(base + tl.where(owned, label, 0), mask=owned, other=float("-inf")).to(tl.float32)
    tl.store(out + row, top)
    tl.store(out + rows + row, tl.sum(total * scale, 0))
    tl.store(out + 2 * rows + row, target)
    if ENTROPY:
        # a lane that saw nothing has scale 0, and its distance to the top is finite: LOWEST is no infinity
        moved = tl.where(scale > 0, scale * (dot + total * (peak - top)), 0.0)
        tl.store(out + 3 * rows + row, tl.sum(moved, 0))


@triton.jit
def gradient_kernel(
    logits, labels, top, factor, label_gradient, stride, start, valid, size, BLOCK: tl.constexpr
):  # pragma: no cover - runs on the device
    """One program a row and block of columns: ``factor * exp(x - top)``, the label's own value, 0 for padding."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < valid
    x = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(factor + row) * tl.exp(x - tl.load(top + row))
    gradient = tl.where(columns == tl.load(labels + row) - start, tl.load(label_gradient + row), gradient)
    gradient = tl.where(inside, gradient, 0.0)
    tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=columns < size)


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, start: int, valid: int, *, entropy: bool = False
) -> torch.Tensor:
    """Statistics of each row of ``logits`` [T, v], which stay as they are; one read of them.

    Args:
        labels: [T] int64 in the whole vocabulary.
        start, valid: first column of this rank in the vocabulary, and how many of the columns are real.

    Returns:
        float32 [3 or 4, T]: maximum, sum of e = exp(logit - maximum), logit of the label (-inf where another rank
        owns it), and with ``entropy`` the sum of e * log(e). As ``head_rows.exponentiate_rows_``.
    """
    out = torch.empty((4 if entropy else 3, len(logits)), dtype=torch.float32, device=logits.device)
    if len(logits):
        arguments = (logits, labels, out, len(logits), logits.stride(0), start, valid)
        statistics_kernel[(len(logits),)](*arguments, entropy, STATISTICS_BLOCK, num_warps=WARPS)
    return out


def row_gradient_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    valid: int,
    top: torch.Tensor,
    factor: torch.Tensor,
    label_gradient: torch.Tensor,
) -> torch.Tensor:
    """Replace ``logits`` [T, v] by the gradient of each row, in their dtype; one read and one write of them.

    Args:
        top: [T] float32, the row's maximum here.
        factor: [T] float32, row weight * exp(top) / partition function.
        label_gradient: [T] float32, row weight * (p - 1), the value at the label's column.
    """
    if logits.numel():
        grid = (len(logits), triton.cdiv(logits.shape[1], GRADIENT_BLOCK))
        arguments = (logits, labels, top, factor, label_gradient, logits.stride(0), start, valid, logits.shape[1])
        gradient_kernel[grid](*arguments, GRADIENT_BLOCK, num_warps=WARPS)
    return logits
