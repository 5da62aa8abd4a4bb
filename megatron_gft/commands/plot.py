"""Overlay runs in one figure: loss, validation, gradient norm, probabilities by source, rectified share, speed."""

import argparse
from collections.abc import Sequence

from megatron_gft.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python tools/plot_run.py runs/gft runs/sft --output compare.html"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or its metrics.jsonl")
    parser.add_argument("--output", required=True, metavar="FILE", help=".png, .svg, .pdf, or self-contained .html")
    options = parser.parse_args(argv)
    from megatron_gft.reports.plotting import plot_runs  # imports numpy

    plot_runs(options.runs, options.output)
    print(options.output)
