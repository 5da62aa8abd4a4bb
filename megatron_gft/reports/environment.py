"""What a run runs on: versions, machine, processes. Each start writes it anew."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_gft import __version__
from megatron_gft.atomic import write_json

ENVIRONMENT_FILE = "environment.json"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")


def write_environment(folder: Path, world_size: int, device: str) -> None:
    """Keep what this start runs on in ``folder/environment.json``."""
    found = {"processes": str(world_size), "device": device, "host": platform.node(), "system": platform.platform()}
    found |= {"python": platform.python_version(), "megatron_gft": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    write_json(folder / ENVIRONMENT_FILE, found)
