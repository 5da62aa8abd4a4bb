"""Optional GPU packages that Megatron-Core picks up by name: is what is installed what it takes it for?"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

# What Megatron-Core imports from apex, as paths inside the package.
APEX_MODULES = ("optimizers", "multi_tensor_apply")


def apex_problem() -> str | None:
    """What is wrong with an installed ``apex``, None when it is NVIDIA's or absent. Does not import it.

    The project of that name on PyPI is a toolkit for the Pyramid web framework; Megatron-Core tries to import
    NVIDIA's from it and falls back without a word, or fails on its import.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    missing = [name for name in APEX_MODULES if not any((folder / name).is_dir() for folder in folders)]
    if not missing:
        return None
    try:
        version = f"apex {metadata.version('apex')}"
    except metadata.PackageNotFoundError:
        version = "an apex"
    place = folders[0] if folders else spec.origin
    return (
        f"{version} is installed at {place} and is not NVIDIA's (no {', '.join(missing)}): PyPI's apex is another "
        "project -> pip uninstall apex; NVIDIA's is built from source, see requirements-gpu.txt"
    )
