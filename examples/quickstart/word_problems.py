"""Arithmetic word problems with checkable answers: one or two steps, and a worked solution.

    python examples/quickstart/word_problems.py --output problems --train 40 --held-out 100 --seed 1

writes ``problems/train.jsonl`` and ``problems/held_out.jsonl`` with ``question``, ``solution`` and ``answer`` on each
line. No held-out problem shares template and numbers with a training problem, so that changing a name does not
make a training problem a held-out one. The same seed gives the same files everywhere.

With ``--input train.parquet`` they are drawn from rows of ``question`` and ``answer`` (``... #### 42``), each question
once, without GSM8K's marks for a calculator (``<<48/2=24>>``).
"""

import argparse
import json
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gft.atomic import atomic_directory
from megatron_gft.errors import InputError, InputErrors, command
from megatron_gft.groups.files import read_chunks, refuse_problems
from megatron_gft.groups.problems import ProblemLog
from megatron_gft.groups.records import gold_answer
from megatron_gft.groups.rows import iter_rows
from megatron_gft.sampling.prompts import prompt_files

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas", "Lena", "Max")
THINGS = ("apples", "books", "cards", "coins", "marbles", "pens", "shells", "stamps", "stickers", "stones")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}

PROBLEMS_SHOWN = 10
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")

Step = tuple[str, str, str]


@dataclass(frozen=True)
class Template:
    """A kind of problem. ``ranges`` are inclusive; a step names its numbers, or ``r`` for the last result."""

    name: str
    question: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[Step, ...]


TEMPLATES = (
    Template(
        "find",
        "{A} has {a} {things} and finds {b} more. How many {things} does {A} have now?",
        {"a": (2, 12), "b": (2, 9)},
        (("a", "+", "b"),),
    ),
    Template(
        "lose",
        "{A} has {a} {things} and loses {b} of them. How many {things} are left?",
        {"a": (4, 15), "b": (2, 9)},
        (("a", "-", "b"),),
    ),
    Template(
        "each",
        "{A} buys {a} {things} for {b} dollars each. How many dollars does {A} pay?",
        {"a": (2, 9), "b": (2, 9)},
        (("a", "*", "b"),),
    ),
    Template(
        "together",
        "{A} has {a} {things} and {B} has {b} {things}. How many {things} do they have together?",
        {"a": (2, 12), "b": (2, 12)},
        (("a", "+", "b"),),
    ),
    Template(
        "share",
        "{A} shares {a} {things} equally among {b} children. How many {things} does each child get?",
        {"a": (4, 40), "b": (2, 8)},
        (("a", "/", "b"),),
    ),
    Template(
        "older",
        "{A} is {a} years old. {B} is {b} years older. How old is {B}?",
        {"a": (3, 12), "b": (2, 9)},
        (("a", "+", "b"),),
    ),
    Template(
        "bags",
        "{A} has {a} bags with {b} {things} in each bag. How many {things} does {A} have?",
        {"a": (2, 9), "b": (2, 9)},
        (("a", "*", "b"),),
    ),
    Template(
        "more than",
        "{A} has {a} {things} and {B} has {b} {things}. How many more {things} does {A} have than {B}?",
        {"a": (5, 16), "b": (2, 9)},
        (("a", "-", "b"),),
    ),
    Template(
        "give away",
        "{A} has {a} {things} and finds {b} more. Then {A} gives {c} {things} to {B}. How many {things} does {A} have?",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9)},
        (("a", "+", "b"), ("r", "-", "c")),
    ),
    Template(
        "bus",
        "There are {a} people on a bus. At a stop {b} people get off and {c} people get on. "
        "How many people are on the bus now?",
        {"a": (5, 15), "b": (2, 9), "c": (2, 9)},
        (("a", "-", "b"), ("r", "+", "c")),
    ),
)


@dataclass(frozen=True)
class WordProblem:
    """One problem; ``key`` is its template and numbers, the identity used to keep the held-out set apart."""

    key: tuple[str, tuple[int, ...]]
    question: str
    work: str
    answer: str

    def row(self) -> dict[str, str]:
        """The problem as a line of the files."""
        return problem_row(self.question, self.work, self.answer)


def problem_row(question: str, work: str, answer: str) -> dict[str, str]:
    """Columns ``question``, ``solution`` and ``answer``.

    The solution ends in words that chat models use themselves. GFT scales the gradient of a token with p <= tau by p,
    so a mark that the model never writes, such as "####", is hardly learned in a few steps; the model then goes on
    calculating after its answer.
    """
    return {"question": question, "solution": f"{work}\nThe answer is {answer}.".lstrip(), "answer": answer}


def solve(template: Template, numbers: dict[str, int]) -> list[tuple[str, int]] | None:
    """Each step as ("7 + 5 = 12", 12); None when a result is not a positive whole number below 100."""
    known, lines = dict(numbers), []
    for left, sign, right in template.steps:
        x, y = known[left], known[right]
        result = OPERATIONS[sign](x, y)
        if not 0 < result < 100 or (sign == "/" and result * y != x):
            return None
        lines.append((f"{x} {sign} {y} = {result}", result))
        known["r"] = result
    return lines


def generate(seed: int) -> Iterator[WordProblem]:
    """An endless stream of problems; templates take turns, no two problems share template and numbers."""
    rng = random.Random(seed)
    seen = set()
    while True:
        for template in TEMPLATES:
            problem = _draw(template, rng)
            if problem.key not in seen:
                seen.add(problem.key)
                yield problem


def _draw(template: Template, rng: random.Random) -> WordProblem:
    lines = None
    while lines is None:
        numbers = {name: rng.randint(*limits) for name, limits in template.ranges.items()}
        lines = solve(template, numbers)
    first, second = rng.sample(NAMES, 2)
    question = template.question.format(A=first, B=second, things=rng.choice(THINGS), **numbers)
    work = f"{lines[0][0]}." if len(lines) == 1 else f"First, {lines[0][0]}. Then {lines[1][0]}."
    return WordProblem((template.name, tuple(numbers.values())), question, work, str(lines[-1][1]))


def problem_sets(train: int, held_out: int, seed: int) -> tuple[list[WordProblem], list[WordProblem]]:
    """``train`` and ``held_out`` problems, disjoint. The held-out set does not depend on the size of the other."""
    if min(train, held_out) < 1 or train + held_out > 2000:
        raise InputError(f"--train {train} --held-out {held_out}: each must be at least 1, together at most 2000")
    stream = generate(seed)
    held = [next(stream) for _ in range(held_out)]
    return [next(stream) for _ in range(train)], held


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows with a text question and a worked answer, each question once; InputErrors by ``file:line`` without them."""
    rows: dict[str, dict[str, str]] = {}
    wrong = []
    problems = ProblemLog()
    chunks = (chunk for file in prompt_files(path) for chunk in read_chunks(file))
    for row, place in (read for chunk in chunks for read in iter_rows(chunk, problems)):
        question, answer = row.get("question"), row.get("answer")
        gold = gold_answer(answer) if isinstance(answer, str) else None
        if not isinstance(question, str) or not question.strip() or not isinstance(answer, str) or not gold:
            wrong.append(f"{place}: needs the texts 'question' and 'answer', the answer ending in '#### 42'")
            continue
        work = CALCULATOR_MARK.sub("", answer.rpartition("####")[0]).strip()
        rows.setdefault(question, problem_row(question, work, gold))
    refuse_problems(problems)
    if wrong:
        raise InputErrors(f"{path}", wrong[:PROBLEMS_SHOWN])
    return list(rows.values())


def draw(
    rows: list[dict[str, str]], train: int, held_out: int, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Disjoint random samples of ``rows``."""
    if min(train, held_out) < 1 or train + held_out > len(rows):
        raise InputError(
            f"--train {train} --held-out {held_out}: the file has {len(rows)} different problems -> set fewer"
        )
    chosen = random.Random(seed).sample(rows, train + held_out)
    return chosen[held_out:], chosen[:held_out]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="JSONL or parquet file to draw from (default: our own problems)")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=40, help="training problems (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=100, help="held-out problems (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default %(default)s")
    options = parser.parse_args(argv)
    sizes = (options.train, options.held_out, options.seed)
    if options.input:
        sets = draw(read_rows(options.input), *sizes)
    else:
        sets = tuple([problem.row() for problem in problems] for problems in problem_sets(*sizes))
    with atomic_directory(options.output) as folder:
        for name, rows in zip(("train", "held_out"), sets, strict=True):
            write_rows(folder / f"{name}.jsonl", rows)
    print(f"{options.output}: {options.train} training and {options.held_out} held-out problems")


if __name__ == "__main__":
    sys.exit(main())
