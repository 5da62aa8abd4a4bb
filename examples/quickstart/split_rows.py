"""Draw training and held-out problems from a file of ``question`` and ``answer`` rows (``... #### 42``).

    python examples/quickstart/split_rows.py --input train.parquet --output problems --train 48 --held-out 100

writes the same two files as ``word_problems.py``, without GSM8K's marks for a calculator (``<<48/2=24>>``). A question
that occurs twice is taken once, so that none is in both.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from pathlib import Path

from word_problems import problem_row, write_rows

from megatron_gft.atomic import atomic_directory
from megatron_gft.errors import InputError, InputErrors, command
from megatron_gft.groups.records import gold_answer
from megatron_gft.sampling.prompts import PromptColumns, PromptSet

PROBLEMS_SHOWN = 10
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows with a text question and a worked answer, each question once, in the order of the file.

    Raises:
        InputErrors: rows without them, by ``file:line``.
    """
    rows: dict[str, dict[str, str]] = {}
    wrong = []
    for row in PromptSet([path], PromptColumns(prompt="question")):
        answer = row.columns.get("answer")
        gold = gold_answer(answer) if isinstance(answer, str) else None
        if not isinstance(row.prompt, str) or not isinstance(answer, str) or not gold:
            wrong.append(f"{row.place}: needs the texts 'question' and 'answer', the answer ending in '#### 42'")
            continue
        work = CALCULATOR_MARK.sub("", answer.rpartition("####")[0]).strip()
        rows.setdefault(row.prompt, problem_row(row.prompt, work, gold))
    if wrong:
        raise InputErrors(f"{path}", wrong[:PROBLEMS_SHOWN])
    return list(rows.values())


def draw(
    rows: list[dict[str, str]], train: int, held_out: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Disjoint random samples of ``rows``.

    Raises:
        InputError: there are not enough.
    """
    if min(train, held_out) < 1 or train + held_out > len(rows):
        raise InputError(
            f"--train {train} --held-out {held_out}: the file has {len(rows)} different problems -> set fewer"
        )
    chosen = random.Random(seed).sample(rows, train + held_out)
    return chosen[held_out:], chosen[:held_out]


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSONL or parquet file")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=48, help="training problems (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out problems (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    options = parser.parse_args(argv)
    sets = draw(read_rows(options.input), options.train, options.held_out, options.seed)
    with atomic_directory(options.output) as folder:
        for name, rows in zip(("train", "held_out"), sets, strict=True):
            write_rows(folder / f"{name}.jsonl", rows)
    print(f"{options.output}: {options.train} training and {options.held_out} held-out problems of {options.input}")


if __name__ == "__main__":
    sys.exit(main())
