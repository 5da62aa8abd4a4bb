"""Write the table of each recipe's README again, with the numbers of ``tools/plan.py``; two minutes of CPU."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_gft.errors import InputError, command
from megatron_gft.reading import read_text

if TYPE_CHECKING:
    from megatron_gft.sizing.fit import Plan

FP8 = "examples/fp8.yaml"
GIB = 2**30


def row(recipe: Path) -> str:
    """``| file | layout | GiB | GiB with FP8 | groups | packs | seconds a step | tokens/s | MFU | 10,000 groups |``."""
    bf16, fp8 = (_plan([str(recipe), *more]) for more in ([], [FP8]))
    p, steps, time = bf16.config.parallel, bf16.steps, bf16.time
    assert steps is not None and time is not None, recipe
    layout = f"tp {p.tp}, pp {p.pp}" + (f" x {p.vpp}" if p.vpp else "") + (f", ep {p.ep}" if p.ep > 1 else "")
    minutes = 60 * time.epoch_hours
    cells = [
        f"`{recipe.name}`",
        f"{layout}, dp {bf16.dp}",
        *(f"{plan.peak_bytes / GIB:.1f}" for plan in (bf16, fp8)),
        str(bf16.config.data.groups_per_step),
        f"{steps.packs_per_rank:.0f}",
        f"{time.seconds:.2g}",
        f"{time.tokens_per_second_per_device:,.0f}",
        f"{time.mfu:.0%}",
        f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s",
    ]
    return f"| {' | '.join(cells)} |"


def _plan(files: list[str]) -> Plan:
    from megatron_gft.config import load_config  # torch and Megatron: seconds
    from megatron_gft.hf.shape import read_model_shape
    from megatron_gft.sizing.fit import make_plan

    config = load_config(files)
    world_size = int(re.findall(r"gpus-(\d+)", files[0])[0])
    plan = make_plan(config, read_model_shape(config.model.config), world_size)
    assert plan.fits, f"{files} on {world_size} GPUs: {plan.peak_bytes / GIB:.1f} GiB on the fullest"
    return plan


@command
def main(argv: list[str] | None = None) -> int:
    """1 when a README was not what it is now (or should be)."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python tools/recipe_tables.py --check")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a row would be another")
    check = parser.parse_args(argv).check
    logging.disable(logging.WARNING)
    changed = False
    for readme in sorted(Path("examples").glob("*/README.md")):
        text = read_text(readme)
        for recipe in sorted(readme.parent.glob("gpus-*.yaml")):
            new = row(recipe)
            old, *twins = re.findall(rf"^\| `{recipe.name}` .*$", text, flags=re.MULTILINE) or [None]
            if old is None or twins:
                raise InputError(f"{readme}: {len(twins)} rows of `{recipe.name}`")
            if old != new:
                print(f"{readme}\n- {old}\n+ {new}")
                text, changed = text.replace(old, new), True
        if not check:
            readme.write_text(text, encoding="utf-8")
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
