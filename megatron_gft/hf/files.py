"""The Hugging Face folder around the weights: files carried over, checks, hashes, source record."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_gft import __version__
from megatron_gft.atomic import sha256_json
from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.folders import check_folder, refuse_damage
from megatron_gft.hf.config_json import read_config
from megatron_gft.hf.mapping import HfMapping, Shard
from megatron_gft.hf.safetensors_io import SafetensorsFolder, TensorInfo, tensor_bytes
from megatron_gft.progress import ProgressBar
from megatron_gft.reading import read_json
from megatron_gft.tokenizer import tokenizer_fingerprint

CARRIED_PATTERNS = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template*"),
    *("additional_chat_templates", "LICENSE*", "NOTICE*", "*.py"),
)
"""What transformers, vLLM and a lawyer need beside the weights. Code (of ``auto_map``) is carried and never run."""

IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$")
"""Buffers that old checkpoints stored; transformers computes them."""

MODEL_FILES_FOLDER = "hf"
SOURCE_FILE = "hf_source.json"
HASHED_SINCE = 2  # format of that file from which on the checkpoint has hashes of its files, too


@dataclass(frozen=True)
class ModelFiles:
    """Where a run's checkpoints and exports get what stands beside the weights.

    ``folder`` has everything; ``config`` is the folder of another config.json, ``tokenizer`` that of another tokenizer.
    """

    folder: Path
    config: Path | None = None
    tokenizer: Path | None = None

    def write(self, target: Path) -> None:
        """Copy them into the empty folder ``target``."""
        write_model_files(self.folder, target)
        if self.tokenizer is not None and self.tokenizer != self.folder:
            _copy(self.tokenizer, target, CARRIED_PATTERNS[2:])  # neither config.json nor generation_config.json
        if self.config is not None:
            _copy(self.config, target, CARRIED_PATTERNS[:1])


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    check_folder(source, patterns)
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, target / path.name)


def write_model_files(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy configuration, tokenizer and chat template; config.json changes only where its dtype is another."""
    config = read_config(source)
    _copy(source, target, CARRIED_PATTERNS)
    key = "dtype" if "dtype" in config else "torch_dtype"
    if dtype is not None and config.get(key) != (name := str(dtype).removeprefix("torch.")):
        config[key] = name
        (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_tensors(weights: SafetensorsFolder, mapping: HfMapping) -> None:
    """Compare the tensors of a folder with those of the model.

    Raises:
        InputErrors: missing tensors, wrong shapes and extra tensors, by name, and what probably made them.
    """
    problems = []
    for name, shape in mapping.hf_shapes.items():
        if name not in weights.tensors:
            problems.append(f"tensor {name} is missing")
        elif (found := weights.tensors[name]).shape != shape:
            problems.append(f"tensor {name} in {found.file.name} is {list(found.shape)}, by config.json {list(shape)}")
    for name in weights.tensors.keys() - mapping.hf_shapes.keys():
        if IGNORED_TENSORS.search(name) or _duplicates_embedding(weights, mapping, name):
            continue
        file = weights.tensors[name].file.name
        problems.append(f"tensor {name} in {file} has no place in {mapping.shape.architecture}")
    if problems:
        cause = _likely_cause(weights.tensors, mapping)
        raise InputErrors(f"{weights.folder}: the weights do not fit config.json{cause}", sorted(problems), shown=12)


_CAUSES = (
    (
        r"\.lora_[AB]\.",
        "they hold an adapter (LoRA) -> merge it first (peft: merge_and_unload, save_pretrained)",
    ),
    (
        r"\.(qweight|qzeros|scales|weight_scale(_inv)?|weight_packed|absmax|SCB)$",
        "the weights are quantized -> take the unquantized model, or dequantize it first",
    ),
    (
        r"\.(Wqkv|W_pack|qkv_proj|query_key_value|c_attn|gate_up_proj|wqkv)\.|experts\.(gate_up|down)_proj$",
        "projections are stored fused -> write the model with transformers' class of its config.json (save_pretrained)",
    ),
)


def _likely_cause(tensors: Mapping[str, TensorInfo], mapping: HfMapping) -> str:
    """Of many tensors that do not fit, the one thing that explains them; empty when nothing does."""
    for pattern, cause in _CAUSES:
        if name := next(filter(re.compile(pattern).search, tensors), None):
            return f": {cause} ({name})"
    embedding = mapping.entries["embedding.word_embeddings.weight"].sources[0]
    expected, _, known = embedding.partition("embed_tokens")
    found = next((name for name in tensors if name.endswith("embed_tokens" + known)), embedding)
    if found != embedding:
        prefix = found.removesuffix("embed_tokens" + known)
        return f": the names begin with {prefix!r} instead of {expected!r} -> save the language model itself ({found})"
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers and max(layers) + 1 != mapping.shape.num_layers:
        return f": num_hidden_layers is {mapping.shape.num_layers}, the weights have {max(layers) + 1} -> correct one"
    return " -> this is not the model of its config.json"


def _duplicates_embedding(weights: SafetensorsFolder, mapping: HfMapping, name: str) -> bool:
    """Some tied checkpoints store the embedding a second time, as the output layer."""
    embedding = mapping.entries["embedding.word_embeddings.weight"].sources[0]
    if name != "lm_head.weight" or embedding not in weights.tensors:
        return False
    if weights.tensors[name].shape != weights.tensors[embedding].shape:
        return False
    pairs = zip(weights.read_chunks(name), weights.read_chunks(embedding), strict=True)
    return all(torch.equal(one, other) for (_, one), (_, other) in pairs)


def scatter_rows(outputs: Sequence[torch.Tensor], shard: Shard, rows: torch.Tensor, start: int) -> None:
    """Copy ``rows``, which begin at row ``start`` of a Megatron shard, to their places in the Hugging Face tensors."""
    for piece in shard.within(start, start + len(rows)):
        target = outputs[piece.source][piece.start : piece.stop]
        if shard.columns is not None:
            target = target[:, shard.columns[0] : shard.columns[1]]
        target.copy_(rows[piece.offset - start : piece.offset - start + piece.rows])


def file_hashes(folder: Path, files: Sequence[str], bar: ProgressBar) -> dict[str, str]:
    """sha256 of every tensor in these safetensors files; the bar counts bytes."""
    weights, hashes = SafetensorsFolder(folder, files), {}
    for name in weights.tensors:
        digest = hashlib.sha256()
        for _, rows in weights.read_chunks(name):
            digest.update(tensor_bytes(rows))
            bar.update(rows.nbytes)
        hashes[name] = digest.hexdigest()
    return hashes


def compare_hashes(place: Path | str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise InputErrors naming each tensor that is missing, extra or different."""
    problems = [f"tensor {name} is missing after writing" for name in expected.keys() - found.keys()]
    problems += [f"tensor {name} was not in the source" for name in found.keys() - expected.keys()]
    problems += [
        f"tensor {name} read back differs from its source"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    refuse(f"{place}: verification failed -> check the disk and convert again", sorted(problems))


def source_record(hf_dir: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a converted checkpoint remembers of its source: :data:`SOURCE_FILE`.

    ``tokenizer_fingerprint`` is None for a folder without a tokenizer that this package reads.
    """
    try:
        fingerprint = tokenizer_fingerprint(hf_dir)
    except InputError:
        refuse_damage(hf_dir)
        fingerprint = None
    return {
        "format": HASHED_SINCE,
        "tool": f"megatron_gft {__version__}",
        "config_sha256": sha256_json(read_config(hf_dir)),
        "tokenizer_fingerprint": fingerprint,
        "tensors_sha256": dict(sorted(hashes.items())),
    }


def read_source_record(checkpoint: Path) -> dict[str, Any] | None:
    """The :data:`SOURCE_FILE` of a checkpoint folder, None where there is none; InputError when it is damaged."""
    path = checkpoint / SOURCE_FILE
    if not path.is_file():
        return None
    record = read_json(path, "convert again")
    hashes = record.get("tensors_sha256")
    if isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values()):
        if isinstance(record.get("format"), int):
            return record
    raise InputError(f"{path}: not a source record (format, tensors_sha256) -> convert again")
