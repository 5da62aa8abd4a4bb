"""Throughput of conversions against reading plus writing the same bytes, on a synthetic model of any size."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.safetensors_io import DEFAULT_SHARD_BYTES, ShardWriter, layout_bytes, plan_shards, write_index
from megatron_gft.hf.shape import ModelShape, model_shape_from_config

COPY_BYTES = 16 * 2**20


def synthetic_config(total_bytes: int) -> dict[str, Any]:
    """A Llama configuration of about ``total_bytes`` in bfloat16: layers are added, widths grow by steps."""
    hidden = 2048 if total_bytes < 4 * 10**9 else 4096
    vocab = 4_000 if total_bytes < 4 * 10**9 else 64_000
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": hidden * 3,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": max(1, hidden // 512),
        "num_hidden_layers": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocab,
    }
    one, two = (_model_bytes(config | {"num_hidden_layers": layers}) for layers in (1, 2))
    config["num_hidden_layers"] = max(1, 1 + round((total_bytes - one) / (two - one)))
    return config


def _model_bytes(config: dict[str, Any]) -> int:
    shapes = HfMapping(model_shape_from_config(config, "synthetic")).hf_shapes
    return sum(layout_bytes((shape, torch.bfloat16)) for shape in shapes.values())


def write_synthetic_model(folder: Path, total_bytes: int, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Path:
    """Write a random bfloat16 model of about ``total_bytes``; returns the folder."""
    config = synthetic_config(total_bytes)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shapes = HfMapping(model_shape_from_config(config, "synthetic")).hf_shapes
    (plans,) = plan_shards([{name: (shape, torch.bfloat16) for name, shape in shapes.items()}], max_shard_bytes)
    generator = torch.Generator().manual_seed(0)
    for plan in plans:
        writer = ShardWriter(folder, plan)
        for name, (shape, dtype) in plan.tensors.items():
            # random bits in an exponent range without NaN: several times faster than normal numbers
            bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)
            writer.write(name, (bits & -16385).view(dtype))
        writer.close()
    write_index(folder, plans)
    return folder


class PeakMemory:
    """Largest resident memory of this process above that at entry, in bytes; sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self._process, self.peak = psutil.Process(), 0
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _drop_from_cache(folder: Path) -> None:
    """Ask the kernel to forget a folder's pages, so that reading it reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    """Read and write the same bytes and flush them: the baseline."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with open(path, "rb") as reader, open(target / path.name, "wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())


def _without_verifying(source: Path, target: Path) -> None:
    hf_to_megatron(source, target, verify="off")


def _back_without_verifying(source: Path, target: Path) -> None:
    megatron_to_hf(source, target, verify="off")


@dataclass(frozen=True)
class Measurement:
    """Wall time, processor time and peak memory of one step."""

    seconds: float
    cpu_seconds: float
    peak_resident_bytes: int


def _measure(action: Callable[[Path, Path], None], source: Path, target: Path) -> Measurement:
    """Run in this process, which should be a fresh one: freed memory stays resident."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        action(source, target)
    return Measurement(time.perf_counter() - begin, time.process_time() - cpu_begin, memory.peak)


def _measure_apart(action: Callable[[Path, Path], None], source: Path, target: Path) -> Measurement:
    """:func:`_measure` in a process of its own, after its imports, with ``source`` out of the page cache."""
    _drop_from_cache(source)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, action, source, target).result()


def measure_conversion(work_dir: str | Path | None = None, total_bytes: int = 2 * 10**9) -> dict[str, Any]:
    """Convert a synthetic model both ways; needs three times its size in ``work_dir``; removes everything.

    The baseline copies the same bytes before, between and after, since disks change speed; its mean counts. Times
    include reading from the disk and flushing to it.

    Returns:
        For each step its :class:`Measurement` as a dict, GB/s of the model's bytes, and the ratio to copying (1 = as
        fast); besides them the model's and the largest tensor's bytes.
    """
    with tempfile.TemporaryDirectory(dir=work_dir) as name:
        root = Path(name)
        source, checkpoint = write_synthetic_model(root / "hf", total_bytes), root / "checkpoint"
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        steps: dict[str, tuple[Callable[..., None], Path, Path]] = {
            "copy_before": (_copy, source, root / "copy"),
            "hf_to_megatron": (_without_verifying, source, checkpoint),
            "copy_between": (_copy, source, root / "copy"),
            "megatron_to_hf": (_back_without_verifying, checkpoint, root / "back"),
            "copy_after": (_copy, source, root / "copy"),
            "hf_to_megatron_verified": (hf_to_megatron, source, root / "again"),
        }
        results = {}
        for step, (action, read, written) in steps.items():
            results[step] = _measure_apart(action, read, written)
            if written != checkpoint:  # the way back reads it
                shutil.rmtree(written)
    baseline = sum(result.seconds for step, result in results.items() if step.startswith("copy")) / 3
    return {
        "bytes": size,
        "largest_tensor_bytes": max(map(_tensor_bytes, HfMapping(_shape(total_bytes)).hf_shapes.values())),
        "steps": {
            step: asdict(result)
            | {"gigabytes_per_second": size / 1e9 / result.seconds, "ratio_to_copy": baseline / result.seconds}
            for step, result in results.items()
        },
    }


def _shape(total_bytes: int) -> ModelShape:
    return model_shape_from_config(synthetic_config(total_bytes), "synthetic")


def _tensor_bytes(shape: tuple[int, ...]) -> int:
    return layout_bytes((shape, torch.bfloat16))
