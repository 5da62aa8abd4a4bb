"""How often the ``math`` verifier errs: true solutions it refuses, falsified answers it accepts.

A verifier's false positives train wrong answers and its false negatives train against right ones, so both shares
are measured on real solutions: every solution against its own gold answer, and every solution with its answer
falsified (+-1, other sign, x10, x100, two digits swapped, another problem's gold answer, a matrix transposed or with
its rows swapped, a tuple with its ends swapped).
``tools/measure_verifier.py`` prints the table.
"""

import argparse
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_gft.errors import InputError, command
from megatron_gft.groups import iter_rows, read_chunks, refuse_problems
from megatron_gft.groups.problems import ProblemLog
from megatron_gft.groups.records import gold_answer
from megatron_gft.sampling.prompts import scalar_text
from megatron_gft.scoring.boxes import boxes_from_last
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.math_answers import same_answer
from megatron_gft.scoring.spelling import parse_number
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import Case

_INTEGER = re.compile(r"\d+")
_MATRIX = re.compile(r"\\begin\{(.?matrix)\}(.*)\\end\{\1\}", re.DOTALL)


@dataclass(frozen=True)
class Solution:
    """A full solution and its gold answer as a short text; ``place`` is its ``file:line``."""

    text: str
    gold: str
    place: str = "<text>"

    def with_answer(self, answer: str) -> str:
        r"""The same text with another answer in the place of its own (``\boxed`` or ``####``)."""
        boxed = last_boxed(self.text)
        before, marker, _ = self.text.rpartition("####")
        if boxed == "" or not (boxed or marker):
            raise InputError(
                f"{self.place}: this solution has no answer that could be replaced, in a closed \\boxed{{}} or after "
                "#### -> correct it or leave it out"
            )
        return replace_boxed(self.text, answer) if boxed else f"{before}{marker} {answer}"


def last_boxed(text: str) -> str | None:
    r"""Content of the last non-empty ``\boxed{}``; "" when the last box is not closed; ``None`` without a box."""
    for _, start, end in boxes_from_last(text):
        if end is None:
            return ""
        if text[start:end].strip():
            return text[start:end].strip()
    return None


def replace_boxed(text: str, answer: str) -> str:
    """``text`` with ``answer`` in the place of its last boxed content, wherever that is boxed."""
    boxed = last_boxed(text)
    for _, start, end in list(boxes_from_last(text)):
        if end is not None and text[start:end].strip() == boxed:
            braced = text[start - 1] == "{"
            text = text[:start] + (answer if braced else f"{{{answer}}}") + text[end:]
    return text


def read_solutions(
    paths: Sequence[str | Path], solution_column: str, answer_column: str | None = None, limit: int | None = None
) -> list[Solution]:
    """Solutions of JSONL or parquet files; without ``answer_column`` the gold answer is what follows ``####``.

    Raises:
        InputError: a file or row that cannot be read, or a row without solution or gold answer (``file:line``).
    """
    solutions: list[Solution] = []
    problems = ProblemLog()
    for chunk in itertools.chain.from_iterable(map(read_chunks, paths)):
        for row, place in iter_rows(chunk, problems):
            refuse_problems(problems)
            if limit is not None and len(solutions) >= limit:
                return solutions
            text = _cell(row, solution_column, place)
            gold = _cell(row, answer_column, place) if answer_column else gold_answer(text)
            if not gold:
                raise InputError(
                    f"{place}: no answer after #### in column {solution_column!r} -> set --answer-column to the "
                    "column of gold answers"
                )
            solutions.append(Solution(text, gold, place))
        refuse_problems(problems)
    if not solutions:
        raise InputError(f"{', '.join(map(str, paths))}: no rows -> name files with solutions")
    return solutions


def _cell(row: Mapping[str, Any], column: str, place: str) -> str:
    if column not in row:
        raise InputError(f"{place}: no column {column!r} -> the columns are {', '.join(row)}")
    text = scalar_text(row[column], place, column)
    if text is None or not text.strip():
        raise InputError(f"{place}: column {column!r} is empty -> fill it or leave the row out")
    return text


ENDINGS = {
    "boxed": "So the result is $\\boxed{{{}}}$.",
    "answer is": "The answer is {}.",
    "last number": "This makes {} in all.",
}


@dataclass(frozen=True)
class AccuracyRow:
    """One line of the table: ``accepted`` of ``count`` responses of one kind; ``seconds`` of CPU time."""

    kind: str
    count: int
    accepted: int
    seconds: float
    examples: tuple[tuple[str, str], ...]  # (gold, answer) judged the unexpected way

    @property
    def share(self) -> float:
        return self.accepted / self.count if self.count else 0.0


def perturbations(gold: str, other: str) -> Iterator[tuple[str, str]]:
    """(kind, answer) pairs that are wrong for ``gold``; ``other`` is another problem's gold answer.

    Numbers inside formulas are falsified too. What happens to stay right (the negative of 0, another problem with
    the same answer) is left out.
    """
    for kind, answer in _candidates(gold, other):
        if answer != gold and not _trivially_equal(gold, answer):
            yield kind, answer


def _candidates(gold: str, other: str) -> Iterator[tuple[str, str]]:
    yield "other gold", other
    yield from _rearranged(gold)
    numbers = list(_INTEGER.finditer(gold))
    if not numbers:
        return
    last = numbers[-1]

    def put(digits: str) -> str:
        return gold[: last.start()] + digits + gold[last.end() :]

    yield "+1", put(str(int(last[0]) + 1))
    yield "-1", put(str(int(last[0]) - 1) if int(last[0]) else "9")
    if int(last[0]) and gold[: last.start()][-1:] != ".":
        yield "x10", put(last[0] + "0")
        yield "x100", put(last[0] + "00")
    for index in range(last.end() - last.start() - 1):
        if last[0][index] != last[0][index + 1]:
            yield "digits swapped", put(last[0][:index] + last[0][index + 1] + last[0][index] + last[0][index + 2 :])
            break
    if not re.search(r"[=()<>]|\\pm|\\cup|matrix|_|text|mbox|, ", gold) and parse_number(gold) != 0:
        yield "sign", gold[1:] if gold.startswith("-") and not re.search(r"\d\s*[+-]", gold) else f"-({gold})"
        if parse_number(gold) is not None:
            yield "sign", gold[1:] if gold.startswith("-") else f"-{gold}"
            yield "/100", str(float(parse_number(gold) or 0) / 100)


def _rearranged(gold: str) -> Iterator[tuple[str, str]]:
    """A matrix with its rows swapped or turned around, a tuple with its ends swapped."""
    if matrix := _MATRIX.search(gold):
        rows = [[cell.strip() for cell in row.split("&")] for row in matrix[2].split("\\\\") if row.strip()]

        def put(rows: Sequence[Sequence[str]]) -> str:
            return gold[: matrix.start(2)] + r" \\ ".join(" & ".join(row) for row in rows) + gold[matrix.end(2) :]

        if rows[0] != rows[-1]:
            yield "rows swapped", put([rows[-1], *rows[1:-1], rows[0]])
        turned = list(zip(*rows, strict=False))
        if turned != [tuple(row) for row in rows]:
            yield "transposed", put(turned)
    if pair := re.fullmatch(r"(\\left)?\(([^(),]+),(.*?),?([^(),]+?)(\\right)?\)", gold):
        if pair[2].strip() != pair[4].strip():
            middle = f"{pair[3]}," if pair[3].strip() else ""
            yield "ends swapped", f"({pair[4]},{middle}{pair[2]})"


def respelled(gold: str) -> Iterator[str]:
    """``gold`` with other spaces, which change nothing."""
    spaced = re.sub(r"\s*(\\\\|&|(?<!\\)[,=+])\s*", r" \1  ", gold)
    compact = re.sub(r"\s*(\\\\|&|(?<!\\)[,=+])\s*", r"\1", gold)
    yield from {spaced, compact, f" {gold} "} - {gold}


def _trivially_equal(gold: str, answer: str) -> bool:
    numbers = parse_number(_value_text(gold)), parse_number(_value_text(answer))
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    return gold.replace(" ", "") == answer.replace(" ", "") or (
        numbers == (None, None) and not _INTEGER.search(gold + answer) and same_answer(gold, answer) is True
    )


def _value_text(answer: str) -> str:
    return answer.rsplit("=", 1)[-1].replace(",", "").replace("\\!", "").replace("\\$", "").strip()


def _cpu_seconds_of_workers() -> float:
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def measure(solutions: Sequence[Solution], options: Mapping[str, str], time_limit: float) -> list[AccuracyRow]:
    """The table for one set of solutions: the row "own gold" (should accept all), then one per kind of falsification.

    Numeric answers are judged in other endings too (rows "own gold, boxed", "falsified, boxed", ...). One worker, whose
    CPU time is counted: count / seconds is the throughput of a core.
    """
    cases: dict[str, list[tuple[str, Case]]] = {"own gold": [(s.gold, Case(s.text, s.gold)) for s in solutions]}
    for index, solution in enumerate(solutions):
        false_answers = list(perturbations(solution.gold, solutions[index - 1].gold))
        for answer in respelled(solution.gold):
            cases.setdefault("own gold, other spaces", []).append((answer, Case(f"\\boxed{{{answer}}}", solution.gold)))
        for kind, answer in false_answers:
            cases.setdefault(kind, []).append((answer, Case(solution.with_answer(answer), solution.gold)))
        if parse_number(solution.gold) is None:
            continue
        for ending, form in ENDINGS.items():
            cases.setdefault(f"own gold, {ending}", []).append(
                (solution.gold, Case(form.format(solution.gold), solution.gold))
            )
            for _, answer in false_answers:
                if parse_number(answer) is not None:
                    cases.setdefault(f"falsified, {ending}", []).append(
                        (answer, Case(form.format(answer), solution.gold))
                    )
    rows = []
    with VerifierPool(ScoringOptions("math", options, time_limit=time_limit)) as pool:
        list(pool.judge([Case("1", "1")]))  # start the worker outside the timing
        for kind, pairs in cases.items():
            before = _cpu_seconds_of_workers()
            verdicts = list(pool.judge(case for _, case in pairs))
            seconds = _cpu_seconds_of_workers() - before
            accepted = [verdict.outcome == "correct" for verdict in verdicts]
            surprising = [
                (case.answer or "", answer)
                for (answer, case), right in zip(pairs, accepted, strict=True)
                if right != kind.startswith("own gold")
            ]
            rows.append(AccuracyRow(kind, len(pairs), sum(accepted), seconds, tuple(surprising[:20])))
    return rows


EPILOG = """example:
  python tools/measure_verifier.py --input gsm8k/train.parquet gsm8k/test.parquet --solution-column answer
  python tools/measure_verifier.py --input math.jsonl --solution-column solution --answer-column answer
"""


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="JSONL (also .gz) or parquet files of one data set")
    parser.add_argument("--solution-column", required=True, help="full solution, its answer in \\boxed{} or after ####")
    parser.add_argument("--answer-column", help="gold answer; default: what follows #### in the solution")
    parser.add_argument("--limit", type=int, help="use only the first rows")
    parser.add_argument("--time-limit", type=float, default=10.0, help="seconds per response (default %(default)s)")
    parser.add_argument("--show", type=int, default=3, help="examples of errors per kind (default %(default)s)")
    options = parser.parse_args(argv)

    solutions = read_solutions(options.input, options.solution_column, options.answer_column, options.limit)
    table = measure(solutions, {}, options.time_limit)
    print(f"{'kind':<26}{'count':>8}{'accepted':>10}{'share':>10}{'per CPU s':>12}")
    for row in table:
        rate = row.count / max(row.seconds, 1e-9)
        print(f"{row.kind:<26}{row.count:>8}{row.accepted:>10}{row.share:>10.4%}{rate:>12.0f}")
    wrong = [row for row in table if not row.kind.startswith("own gold")]
    count, accepted = sum(row.count for row in wrong), sum(row.accepted for row in wrong)
    print(f"{'all falsified':<26}{count:>8}{accepted:>10}{accepted / max(1, count):>10.4%}")
    for row in table:
        for gold, answer in row.examples[: options.show]:
            print(f"{row.kind}: gold {gold!r}, judged {answer!r}")
