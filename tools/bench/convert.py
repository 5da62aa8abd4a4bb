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
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_gft.conversion.convert import hf_to_megatron, megatron_to_hf
from megatron_gft.hf.mapping import HfMapping
from megatron_gft.hf.safetensors_io import DEFAULT_SHARD_BYTES, layout_bytes, plan_shards, write_index, write_shard
from megatron_gft.hf.shape import model_shape_from_config

COPY_BYTES = 16 * 2**20


def synthetic_config(layers: int) -> dict[str, Any]:
    """A Llama configuration; the largest of its bfloat16 tensors has 25 MB, a layer 90 MB."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 4_000,
    }


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    return HfMapping(model_shape_from_config(synthetic_config(layers), "synthetic")).hf_shapes


def write_synthetic_model(folder: Path, total_bytes: int) -> Path:
    """Write a random bfloat16 model of about ``total_bytes`` into a new folder; returns the folder."""
    one, two = (sum(layout_bytes((s, torch.bfloat16)) for s in _shapes(layers).values()) for layers in (1, 2))
    layers = max(1, 1 + round((total_bytes - one) / (two - one)))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(synthetic_config(layers), indent=1))
    tensors = {name: (shape, torch.bfloat16) for name, shape in _shapes(layers).items()}
    (files,) = plan_shards([tensors], DEFAULT_SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for file, planned in files.items():
        # random bits in an exponent range without NaN: several times faster than normal numbers
        bits = (
            (name, torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator))
            for name, (shape, _) in planned.items()
        )
        write_shard(folder / file, planned, ((name, (value & -16385).view(torch.bfloat16)) for name, value in bits))
    write_index(folder, files)
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
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(source: Path, target: Path) -> None:
    """Read and write the same bytes and flush them: the baseline."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with open(path, "rb") as reader, open(target / path.name, "wb") as writer:
            shutil.copyfileobj(reader, writer, COPY_BYTES)
            writer.flush()
            os.fsync(writer.fileno())


def _measure(action: Callable[..., None], source: Path, target: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a step in this process, a fresh one: freed memory stays resident."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        action(source, target)
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu_begin,
        "peak_resident_bytes": memory.peak,
    }


def measure_conversion(total_bytes: int = 2 * 10**9) -> dict[str, Any]:
    """Convert a synthetic model both ways; needs three times its size in the temporary folder; removes everything.

    The baseline copies the same bytes before, between and after, since disks change speed; its mean counts. Times
    include reading from the disk and flushing to it. Each step runs in a process of its own, after its imports.

    Returns:
        For each step wall and CPU seconds, peak memory, GB/s of the model's bytes, and the ratio to copying (1 = as
        fast); besides them the model's bytes.
    """
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source, checkpoint = write_synthetic_model(root / "hf", total_bytes), root / "checkpoint"
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        steps: dict[str, tuple[Callable[..., None], Path, Path]] = {
            "copy_before": (_copy, source, root / "copy"),
            "hf_to_megatron": (partial(hf_to_megatron, verify="off"), source, checkpoint),
            "copy_between": (_copy, source, root / "copy"),
            "megatron_to_hf": (partial(megatron_to_hf, verify="off"), checkpoint, root / "back"),
            "copy_after": (_copy, source, root / "copy"),
            "hf_to_megatron_verified": (hf_to_megatron, source, root / "again"),
        }
        results = {}
        for step, (action, read, written) in steps.items():
            _drop_from_cache(read)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                results[step] = pool.submit(_measure, action, read, written).result()
            if written != checkpoint:  # the way back reads it
                shutil.rmtree(written)
    baseline = sum(result["seconds"] for step, result in results.items() if step.startswith("copy")) / 3
    for result in results.values():
        result |= {
            "gigabytes_per_second": size / 1e9 / result["seconds"],
            "ratio_to_copy": baseline / result["seconds"],
        }
    return {"bytes": size, "steps": results}
