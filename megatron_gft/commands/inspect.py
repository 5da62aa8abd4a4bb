"""Show what is in group files or group shards, and whether it is sound."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from megatron_gft.atomic import atomic_file
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
    parser.add_argument("--json", metavar="FILE", help="write report and groups as JSON; - for stdout")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file of the shards")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser


def _check_output(option: str, name: str | None) -> None:
    """Before the work, not after it.

    Raises:
        InputError: a file cannot be written there.
    """
    if name is None or name == "-":
        return
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {name}: no folder can be made there ({error}) -> choose another file") from error
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {name}: exists and is no file -> choose another one")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{option} {name}: the folder cannot be written to -> choose another one")


def _write(name: str, text: str) -> None:
    try:
        with atomic_file(name) as temporary:  # backslashreplace: names of files need not be Unicode
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error}) -> choose another file") from error
    print(f"wrote {name}", file=sys.stderr)


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when everything was read (and, with --verify, is sound)."""
    arguments = _parser().parse_args(argv)
    if any(value is not None and value < 1 for value in (arguments.groups_per_step, arguments.max_tokens_per_pack)):
        raise InputError("--groups-per-step and --max-tokens-per-pack must be at least 1")
    if arguments.html == "-":
        raise InputError("--html -: the page needs a file -> name one")
    _check_output("--html", arguments.html)
    _check_output("--json", arguments.json)
    if isinstance(sys.stdout, io.TextIOWrapper):  # any text is to be shown, whatever the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    from megatron_gft.inspection.inputs import open_source  # imports megatron: seconds
    from megatron_gft.inspection.views import group_text, html_page, report_text

    source = open_source(arguments.inputs, arguments.tokenizer, arguments.chat_template)
    if arguments.verify:
        alone = not (arguments.group or arguments.html or arguments.json or arguments.max_tokens_per_pack)
        for prefix in source.verify():
            print(f"{prefix}: every byte is as written", file=sys.stdout if alone else sys.stderr)
        if alone:
            return 0
    views = source.groups(arguments.group) if arguments.group else []
    if views and not (arguments.html or arguments.json):
        colour = arguments.color == "always" or (arguments.color == "auto" and sys.stdout.isatty())
        print("\n".join(group_text(view, colour) for view in views), end="")
        return 0
    report = source.report(arguments.max_tokens_per_pack, arguments.groups_per_step)
    if arguments.html:
        _write(arguments.html, html_page(report, views))
    if arguments.json:
        text = json.dumps(report | {"views": [asdict(view) for view in views]}, indent=1)
        if arguments.json == "-":
            print(text)
        else:
            _write(arguments.json, text + "\n")
    if not (arguments.html or arguments.json):
        print(report_text(report))
    return 0
