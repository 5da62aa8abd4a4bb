"""Hugging Face weights into a running Megatron model, and out of it, without a conversion step.

Loading reads, straight from safetensors, only the rows and columns that a rank holds, a piece at a time, into the
parameter itself; there are no weight collectives. Exporting gathers each parameter over tensor-parallel ranks in
small pieces to the one rank that writes it; every pipeline stage and expert group writes its own files, and the
folder appears whole or not at all.

Works for any layout (tensor, pipeline, virtual pipeline, expert, expert-tensor parallel) and for local and
Transformer Engine layer specs, whose parameter names differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gft.errors import InputError
from megatron_gft.hf.files import check_tensors, export_folder, scatter_rows
from megatron_gft.hf.mapping import Entry, HfMapping, Shard
from megatron_gft.hf.safetensors_io import DEFAULT_SHARD_BYTES, SafetensorsFolder, TensorLayout, row_chunks
from megatron_gft.hf.shape import ModelShape
from megatron_gft.hf.shared_folder import gather_results
from megatron_gft.parallel import Parallel

GATHER_BYTES = 64 * 2**20
"""Per rank and piece, while exporting."""

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True)
class LiveParameter:
    """A parameter of this rank and where it belongs. ``tp_rank``/``tp_size``/``tp_group`` are the expert ones for
    an expert's; ``is_copy`` marks the last stage's copy of a tied embedding."""

    name: str
    parameter: torch.nn.Parameter
    entry: Entry
    tp_rank: int
    tp_size: int
    tp_group: dist.ProcessGroup
    is_replica: bool
    is_copy: bool

    def shard(self, mapping: HfMapping, tp_rank: int | None = None) -> Shard:
        """What lies in it, or in the same parameter of another tensor-parallel rank."""
        rows = self.parameter.shape[0] if self.entry.operation == "vocab" else None
        return mapping.shard(self.entry, self.tp_rank if tp_rank is None else tp_rank, self.tp_size, rows)


def live_parameters(
    model_chunks: Sequence[torch.nn.Module], mapping: HfMapping, parallel: Parallel
) -> Iterator[LiveParameter]:
    """All parameters of this rank's chunks, in model order, with global layer and expert numbers.

    Raises:
        InputError: a parameter that the family has no rule for, or of another shape than the model's.
    """
    tied = mapping.shape.share_embeddings_and_output_weights
    first_expert = parallel.ep_rank * ((mapping.shape.num_moe_experts or 0) // parallel.ep_size)
    for chunk in model_chunks:
        for name, parameter in _global_names(chunk, first_expert):
            entry = mapping.entry(name)
            if entry.is_expert:
                place = (parallel.etp_rank, parallel.etp_size, parallel.etp_group, parallel.expert_dp_rank > 0)
            else:
                replica = parallel.dp_rank > 0 or parallel.cp_rank > 0
                place = (parallel.tp_rank, parallel.tp_size, parallel.tp_group, replica)
            live = LiveParameter(name, parameter, entry, *place, is_copy=tied and name == "output_layer.weight")
            expected = live.shard(mapping).shape
            if tuple(parameter.shape) != expected:
                raise InputError(
                    f"{parallel.coordinates}: Megatron parameter {name} is {tuple(parameter.shape)}, by the Hugging "
                    f"Face model {expected} -> build the model from the same config.json"
                )
            yield live


def _global_names(chunk: torch.nn.Module, first_expert: int) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with layers counted over the whole model and experts over all expert ranks."""
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):  # DDP, half precision
        chunk = inner
    layers: Any = chunk.get_submodule("decoder.layers")

    def global_expert(match: re.Match[str]) -> str:
        return f"{match[1]}{int(match[2]) + first_expert}"

    for name, parameter in chunk.named_parameters():
        if layer := _LAYER.match(name):
            number = layers[int(layer[1])].layer_number - 1
            name = f"decoder.layers.{number}.{name[layer.end() :]}"
        yield _EXPERT.sub(global_expert, name), parameter


@torch.no_grad()
def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], shape: ModelShape, hf_dir: str | Path, parallel: Parallel
) -> None:
    """Fill this rank's parameters from a Hugging Face folder. No collectives; dtypes are cast to the model's.

    Args:
        model_chunks: one ``GPTModel``, or one for each virtual pipeline stage; wrappers are looked through.

    Raises:
        InputError: weights that are damaged, incomplete, or of another model.
    """
    mapping = HfMapping(shape)
    weights = SafetensorsFolder(hf_dir)
    check_tensors(weights, mapping)
    live = list(live_parameters(model_chunks, mapping, parallel))
    # in the order of the files, so that each is opened about once
    for item in sorted(live, key=lambda item: weights.tensors[item.entry.sources[0]].file.name):
        fill_shard(item.parameter.data, item.shard(mapping), item.entry, weights)
    weights.close()


def fill_shard(target: torch.Tensor, shard: Shard, entry: Entry, weights: SafetensorsFolder) -> None:
    """Copy a shard's pieces into ``target`` (any device and dtype) and zero its padding rows."""
    covered = 0
    for piece in shard.pieces:
        source, rows = entry.sources[piece.source], (piece.start, piece.stop)
        for start, chunk in weights.read_chunks(source, rows, shard.columns):
            target[piece.offset + start : piece.offset + start + len(chunk)].copy_(chunk)
        covered = piece.offset + piece.rows
    target[covered:].zero_()


@torch.no_grad()
def export_hf_weights(
    model_chunks: Sequence[torch.nn.Module],
    shape: ModelShape,
    parallel: Parallel,
    output_dir: str | Path,
    *,
    model_files: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    verify: bool = True,
) -> None:
    """Write a Hugging Face folder from a running model. Collective over all ranks.

    Extra memory: one tensor on the writing host, :data:`GATHER_BYTES` per tensor-parallel rank on the device.

    Args:
        model_files: folder with config.json, generation config and tokenizer files to carry over.
        dtype: of the written tensors; None keeps the parameters'.
        verify: re-read every written file and compare each tensor's sha256 with what was gathered.

    Raises:
        InputError: the output exists, the disk is full, or a re-read tensor differs.
    """
    mapping = HfMapping(shape)
    live = [
        item for item in live_parameters(model_chunks, mapping, parallel) if not item.is_replica and not item.is_copy
    ]
    mine: dict[str, TensorLayout] = {}
    for item in live:
        if item.tp_rank == 0:
            sizes = zip(item.entry.sources, item.entry.source_shapes, strict=True)
            mine |= {name: (size, dtype or item.parameter.dtype) for name, size in sizes}
    groups = gather_results(lambda: mine)
    tensors = (
        pair
        for item in live
        for pair in zip(item.entry.sources, gather_to_hf(item, mapping, dtype) or (), strict=False)  # none: not ours
    )
    with export_folder(
        output_dir, groups, tensors, model_files=Path(model_files), max_shard_bytes=max_shard_bytes, verify=verify
    ):
        pass


def gather_to_hf(item: LiveParameter, mapping: HfMapping, dtype: torch.dtype | None) -> list[torch.Tensor] | None:
    """The Hugging Face tensors of a parameter, on the CPU of tensor-parallel rank 0; None on the others."""
    parameter, entry = item.parameter.data, item.entry
    outputs = None
    if item.tp_rank == 0:
        outputs = [torch.empty(size, dtype=dtype or parameter.dtype) for size in entry.source_shapes]
    shards = [item.shard(mapping, rank) for rank in range(item.tp_size)]
    is_split = item.tp_size > 1 and entry.operation != "copy"
    for start, stop in row_chunks(len(parameter), parameter[:1].nbytes, GATHER_BYTES):
        rows = parameter[start:stop].contiguous()
        gathered = [rows]
        if is_split:
            gathered = [torch.empty_like(rows) for _ in range(item.tp_size)] if item.tp_rank == 0 else []
            dist.gather(rows, gathered or None, group=item.tp_group, group_dst=0)
        if outputs is not None:
            for shard, part in zip(shards, gathered, strict=False):
                scatter_rows(outputs, shard, part.cpu(), start)
    return outputs
