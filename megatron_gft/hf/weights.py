"""Hugging Face weights into a running Megatron model, without a conversion step.

Each rank reads, straight from safetensors, only the rows and columns that it holds, a piece at a time, into the
parameter itself; there are no collectives. Works for any layout (tensor, pipeline, virtual pipeline, expert,
expert-tensor parallel) and for local and Transformer Engine layer specs, whose parameter names differ.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gft.errors import InputError
from megatron_gft.hf.config_json import refuse_adapter
from megatron_gft.hf.files import check_tensors
from megatron_gft.hf.mapping import Entry, HfMapping, Shard
from megatron_gft.hf.safetensors_io import SafetensorsFolder, refuse_nonfinite
from megatron_gft.hf.shape import ModelShape
from megatron_gft.parallel import Parallel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"(\.local_experts\.|\.experts\.linear_fc[12]\.weight)(\d+)")


def live_parameters(
    model_chunks: Sequence[torch.nn.Module], mapping: HfMapping, parallel: Parallel
) -> Iterator[tuple[str, torch.nn.Parameter, Entry, Shard]]:
    """All parameters of this rank's chunks, in model order: name with global layer and expert numbers, parameter,
    entry, and what of the entry lies in it.

    Raises:
        InputError: a parameter that the family has no rule for, or of another shape than the model's.
    """
    first_expert = parallel.ep_rank * ((mapping.shape.num_moe_experts or 0) // parallel.ep_size)
    for chunk in model_chunks:
        for name, parameter in _global_names(chunk, first_expert):
            entry = mapping.entry(name)
            rank, size = parallel.tp_rank, parallel.tp_size
            if entry.is_expert:
                rank, size = parallel.etp_rank, parallel.etp_size
            # how far the vocabulary is padded is the model's decision
            shard = mapping.shard(entry, rank, size, len(parameter) if entry.operation == "vocab" else None)
            if tuple(parameter.shape) != shard.shape:
                raise InputError(
                    f"{parallel.coordinates}: Megatron parameter {name} is {tuple(parameter.shape)}, by the Hugging "
                    f"Face model {shard.shape} -> build the model from the same config.json"
                )
            yield name, parameter, entry, shard


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
    refuse_adapter(hf_dir)
    mapping = HfMapping(shape)
    weights = SafetensorsFolder(hf_dir)
    check_tensors(weights, mapping)
    live = list(live_parameters(model_chunks, mapping, parallel))
    # in the order of the files, so that each is opened about once
    for _, parameter, entry, shard in sorted(live, key=lambda item: weights.tensors[item[2].sources[0]].file.name):
        covered = 0
        for piece in shard.pieces:
            source = entry.sources[piece.source]
            for start, chunk in weights.read_chunks(source, (piece.start, piece.stop), shard.columns):
                rows = parameter[piece.offset + start : piece.offset + start + len(chunk)]
                rows.copy_(chunk)
                refuse_nonfinite(rows, f"{weights.tensors[source].file}: tensor {source}", [chunk])
            covered = piece.offset + piece.rows
        parameter[covered:].zero_()  # padding
