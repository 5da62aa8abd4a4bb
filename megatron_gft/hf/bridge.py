"""NVIDIA's Megatron-Bridge for model families that this package does not map. Optional, imported on use.

It builds whole models in memory and does not stream, and its older releases are silently wrong (rope scaling under
transformers 5, sliding windows off by one: 0.3), so it is never used for a family of ``hf/families.py``, and only
from 0.6 on. Training such a model needs a family here all the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

from megatron_gft.atomic import atomic_directory
from megatron_gft.errors import InputError
from megatron_gft.hf.shape import is_mapped

MINIMUM_VERSION = (0, 6)


def _auto_bridge(hf_dir: str | Path) -> Any:
    """The ``AutoBridge`` class, for a model that may use it.

    Raises:
        InputError: the family is mapped here, or Megatron-Bridge is absent or too old.
    """
    if is_mapped(hf_dir):
        raise InputError(f"{hf_dir}: this package converts this family itself -> leave out --use-megatron-bridge")
    try:
        version = importlib.metadata.version("megatron-bridge")
        module = importlib.import_module("megatron.bridge")
    except (importlib.metadata.PackageNotFoundError, ImportError) as error:
        raise InputError(
            f"{hf_dir}: Megatron-Bridge cannot be used ({error}) -> install megatron-bridge>=0.6 (Python 3.12, with "
            "Transformer Engine), or add the family to megatron_gft/hf/families.py"
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        raise InputError(f"megatron-bridge {version} is installed -> 0.6 or later; older ones convert wrongly")
    return module.AutoBridge


def bridge_hf_to_megatron(hf_dir: str | Path, output: str | Path) -> None:
    """Convert by ``AutoBridge.import_ckpt``; one process.

    Raises:
        InputError: see :func:`_auto_bridge`; or ``output`` exists.
    """
    bridge = _auto_bridge(hf_dir)
    with atomic_directory(output) as folder:
        bridge.import_ckpt(str(hf_dir), str(folder))


def bridge_megatron_to_hf(checkpoint: str | Path, output: str | Path, hf_dir: str | Path) -> None:
    """Convert back by ``AutoBridge.export_ckpt``; ``hf_dir`` holds the configuration. One process.

    Raises:
        InputError: see :func:`_auto_bridge`; or ``output`` exists.
    """
    bridge = _auto_bridge(hf_dir)
    with atomic_directory(output) as folder:
        bridge.from_hf_pretrained(str(hf_dir)).export_ckpt(str(checkpoint), str(folder))
