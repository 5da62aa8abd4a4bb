#!/usr/bin/env python3
"""Show what is in group files or group shards, and whether it is sound."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_gft.errors import InputError, command

EXAMPLES = """examples:
  python tools/inspect_groups.py data/train                                  statistics of a shard
  python tools/inspect_groups.py 'data/train*' --max-tokens-per-pack 8192    with packing and shared-prefix estimate
  python tools/inspect_groups.py data/train --tokenizer models/base --group 3
  python tools/inspect_groups.py scored.jsonl --tokenizer models/base --html report.html --group 0
  python tools/inspect_groups.py 'data/train*' --verify                      compare every byte with the manifests
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="PREFIX|FILE", help="shard prefixes, or group files; globs too")
    parser.add_argument("--tokenizer", help="to show groups, and to measure group files in tokens")
    parser.add_argument("--chat-template", metavar="FILE|none", help="for group files; default: the tokenizer's own")
    parser.add_argument("--group", type=int, action="append", default=[], metavar="N", help="print group N (from 0)")
    parser.add_argument("--max-tokens-per-pack", type=int, metavar="N", help="estimate packing for packs of N tokens")
    parser.add_argument("--groups-per-step", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained page")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON; - for stdout")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file of the shards")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when everything was read (and, with --verify, is sound)."""
    arguments = _parser().parse_args(argv)
    if any(value is not None and value < 1 for value in (arguments.groups_per_step, arguments.max_tokens_per_pack)):
        raise InputError("--groups-per-step and --max-tokens-per-pack must be at least 1")
    from megatron_gft.data.inspection_sources import open_source  # imports megatron: seconds
    from megatron_gft.data.inspection_view import group_text, html_page, report_text

    source = open_source(arguments.inputs, arguments.tokenizer, arguments.chat_template)
    if arguments.verify:
        for prefix in source.verify():
            print(f"{prefix}: every byte is as written")
        if not (arguments.group or arguments.html or arguments.json):
            return 0
    views = [source.group(number) for number in arguments.group]
    if views and not (arguments.html or arguments.json):
        colour = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
        print("\n".join(group_text(view, colour) for view in views), end="")
        return 0
    report = source.report(arguments.max_tokens_per_pack, arguments.groups_per_step)
    if arguments.html:
        Path(arguments.html).write_text(html_page(report, views), encoding="utf-8")
        print(f"wrote {arguments.html}", file=sys.stderr)
    if arguments.json == "-":
        print(json.dumps(report, indent=1))
    elif arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not (arguments.html or arguments.json):
        print(report_text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
