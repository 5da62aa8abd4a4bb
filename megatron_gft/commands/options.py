"""What several command lines take: configuration files, a verifier, numbers within bounds; else exit code 2."""

import argparse
import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from megatron_gft.errors import InputError

MANY = 10**9
"""More than anything that a user counts; beyond are typing errors, which would run for years or out of memory."""

Kind = TypeVar("Kind")


def tool_parser(**options: Any) -> argparse.ArgumentParser:
    """Shows its texts as they are written; ``options`` are argparse's."""
    return argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, **options)


def taken(kind: type[Kind], options: argparse.Namespace, **others: Any) -> Kind:
    """The dataclass ``kind`` of those options that are called as its fields, and of ``others``."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(options).items() if name in names} | others)


def add_verifier(parser: argparse.ArgumentParser) -> None:
    """What judges responses, and its limits."""
    parser.add_argument("--verifier", default="math", help="name or module:function (default %(default)s)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the verifier")
    workers, cores = "processes of the verifier (default %(default)s)", os.cpu_count() or 1
    parser.add_argument("--workers", type=count(high=1024), default=cores, help=workers)
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds per response (default %(default)s)")


def config_parser(**options: Any) -> argparse.ArgumentParser:
    """Reads ``--config FILE ... [section.key=value ...]``; ``options`` are argparse's."""
    parser = tool_parser(**options)
    help_of_files = "YAML file; later files win, key by key"
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help=help_of_files)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override single keys")
    return parser


def count(low: int = 1, high: int = MANY) -> Callable[[str], int]:
    """Reads an integer from ``low`` to ``high``."""

    def read(text: str) -> int:
        if not (text.strip().lstrip("+-").isdecimal() and len(text) < 20 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} -> an integer from {low} to {high}")
        return int(text)

    return read


def number(low: float = 0.0, high: float = math.inf) -> Callable[[str], float]:
    """Reads a finite number above ``low`` and up to ``high``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low < value <= high):
            limit = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]!r} -> a number above {low:g}{limit}")
        return value

    return read


def part(text: str) -> tuple[int, int]:
    """Reads ``I/N``: the I-th of N parts, from 1."""
    mine, slash, of = text.partition("/")
    if not (slash and mine.isdecimal() and of.isdecimal() and 1 <= int(mine) <= int(of)):
        raise InputError(f"--part {text!r} -> I/N with 1 <= I <= N, e.g. 1/4 to 4/4")
    return int(mine), int(of)
