"""Measure the math verifier on solutions with known answers: what it refuses wrongly and accepts wrongly."""

from __future__ import annotations

import argparse
import sys

from megatron_gft.errors import command

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

    from megatron_gft.scoring.verifier_accuracy import measure, read_solutions

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


if __name__ == "__main__":
    sys.exit(main())
