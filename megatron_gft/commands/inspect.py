"""Show what is in group files or group shards, and whether it is sound."""

import argparse
import io
import json
import shutil
import sys
from dataclasses import asdict

from megatron_gft.atomic import atomic_file, check_output, writing
from megatron_gft.commands.options import count, tool_parser
from megatron_gft.errors import TRUST_HELP, InputError, command

WHOLE_GROUPS = 3  # that a page opens with
EXAMPLES = """examples:
  python tools/inspect_groups.py data/train                                  statistics of a shard
  python tools/inspect_groups.py 'data/train*' --max-tokens-per-pack 8192    with packing and shared-prefix estimate
  python tools/inspect_groups.py data/train --tokenizer models/base --group 3
  python tools/inspect_groups.py scored.jsonl --tokenizer models/base --html report.html --group 0
  python tools/inspect_groups.py 'data/train*' --verify                      compare every byte with the manifests
"""


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("inputs", nargs="+", metavar="PREFIX|FILE", help="shard prefixes, or group files; globs too")
    parser.add_argument("--tokenizer", help="to show groups, and to measure group files in tokens")
    parser.add_argument("--chat-template", metavar="FILE|none", help="for group files; default: the tokenizer's own")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    parser.add_argument("--group", type=count(0), action="append", default=[], metavar="N", help="show it (from 0)")
    parser.add_argument("--max-tokens-per-pack", type=count(), metavar="N", help="estimate packing for such packs")
    parser.add_argument("--groups-per-step", type=count(), default=128, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="write one page that needs nothing else; it opens with three groups, or those of --group",
    )
    parser.add_argument("--json", metavar="FILE", help="write report and groups as JSON; - for stdout")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file of the shards")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return parser


def _write(name: str, text: str) -> None:
    """Into a file, whole or not at all, or ``-``: standard output."""
    if name == "-":
        print(text, end="")
        return
    with writing(name), atomic_file(name) as temporary:  # backslashreplace: names of files need not be Unicode
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"wrote {name}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """What can be known before the work.

    Raises:
        InputError: a file that cannot be written.
    """
    if arguments.html == "-":
        raise InputError("--html -: the page needs a file -> name one")
    for name in (arguments.html, arguments.json):
        if name is not None and name != "-":
            check_output(name)


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when everything was read (and, with --verify, is sound)."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # any text is to be shown, whatever the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    from megatron_gft.inspection.inputs import open_source  # imports megatron: seconds
    from megatron_gft.inspection.output import group_text, html_page, report_text

    source = open_source(arguments.inputs, arguments.tokenizer, arguments.chat_template, arguments.trust_remote_code)
    if arguments.verify:
        alone = not any((arguments.group, arguments.html, arguments.json, arguments.max_tokens_per_pack))
        for prefix in source.verify():
            print(f"{prefix}: every byte is as written", file=sys.stdout if alone else sys.stderr)
        if alone:
            return 0
    colour = {"always": True, "never": False, "auto": sys.stdout.isatty()}[arguments.color]
    views = source.groups(arguments.group) if arguments.group else []
    to_files = any((arguments.html, arguments.json))
    if arguments.group and not to_files:
        print("\n".join(group_text(view, colour) for view in views), end="")
        return 0
    report = source.report(arguments.max_tokens_per_pack, arguments.groups_per_step)
    if not to_files:
        print(report_text(report, colour, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    if arguments.html:
        _write(arguments.html, html_page(report, [*views, *source.first(WHOLE_GROUPS * (not views))]))
    if arguments.json:
        _write(arguments.json, json.dumps(report | {"views": [asdict(view) for view in views]}, indent=1) + "\n")
    return 0
