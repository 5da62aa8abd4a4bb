"""How the ``math`` verifier does on the tests that others wrote for theirs, with each policy switched off in turn.

The tests are read as data, by ``ast``, from clones of their repositories, and never run:
huggingface/Math-Verify, MARIO-Math-Reasoning/MARIO_EVAL, NVIDIA/NeMo-Skills, volcengine/verl, huggingface/open-r1 and
rllm-org/rllm. ``tools/measure_suites.py`` prints the table; docs/verifiers.md says what it means.
"""

import argparse
import ast
import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gft.errors import InputError, command
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import Case

# suite -> the policies that its authors mean, for all of its cases
POLICIES = {
    "math-verify": {"percent": "either", "units": "ignore", "names": "ignore", "steps": "last", "boxes": "near"},
    "mario": {"percent": "either", "units": "spaced", "names": "ignore", "digits": "4"},
    "nemo": {"percent": "ignore", "units": "ignore"},
    "verl, open-r1, rllm": {},
}
_DECIMAL_TESTS = ("test_number_extraction",)  # the only ones in which a comma is a decimal sign


@dataclass(frozen=True)
class SuiteCase:
    """What one test expects; ``own`` are policies that it alone sets."""

    gold: str
    said: str
    right: bool
    own: dict[str, str] = field(default_factory=dict)


def read_suite(paths: Sequence[str | Path]) -> list[SuiteCase]:
    """Cases of Python test files; InputError where one is missing, no Python, or holds no case."""
    cases: list[SuiteCase] = []
    for path in paths:
        try:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(f"{path}: {error} -> name a test file of a clone") from error
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                cases += [*_parametrized(function), *_asserted_pairs(function), *_rewarded(function)]
    if not cases:
        raise InputError(f"{', '.join(map(str, paths))}: no cases -> name the files that docs/verifiers.md names")
    return cases


def _value(node: ast.expr) -> Any:
    """Value of a literal; ``None`` of anything else; lists and objects without what else they hold."""
    if isinstance(node, ast.List):
        return [value for value in map(_value, node.elts) if value is not None]
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _tables(function: ast.FunctionDef) -> Iterator[tuple[str, list[Any]]]:
    """Names and rows of each ``pytest.mark.parametrize``."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and len(decorator.args) > 1:
            names, rows = (_value(argument) for argument in decorator.args[:2])
            if isinstance(names, str) and isinstance(rows, list):
                yield names, rows


def _parametrized(function: ast.FunctionDef) -> Iterator[SuiteCase]:
    """``pytest.mark.parametrize("gold, pred, expected", ...)``, and pairs that equal both ways."""
    for names, rows in _tables(function):
        for row in rows:
            values = dict(zip([name.strip() for name in names.split(",")], row, strict=False))
            expected = values.get("expected", values.get("result"))
            if names.startswith("gold") and expected is not None:
                yield SuiteCase(values["gold"], values["pred"], bool(expected), _own(function.name, values))
            elif names.startswith("gt"):
                yield SuiteCase(values["gt"], values["pred"], True)
            elif names == "output_pair":
                pair = ["" if value is None else str(value) for value in row]
                for gold, said in (pair, reversed(pair)):
                    yield SuiteCase(gold, _boxed(said), "incorrect" not in function.name)


def _own(test: str, values: dict[str, Any]) -> dict[str, str]:
    own = {"decimal": "either"} if test in _DECIMAL_TESTS else {}
    if values.get("precision", 6) < 6:
        own["digits"] = str(values["precision"])
    if values.get("allow_set_relation_comp"):
        own["intervals"] = "either"
    return own


def _asserted_pairs(function: ast.FunctionDef) -> Iterator[SuiteCase]:
    """``test_in = ...; test_out = ...; self.assertTrue(is_equiv(test_in, test_out))``; loops over ``test_pairs``."""
    known: dict[str, Any] = {}
    for statement in function.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            known[statement.targets[0].id] = _value(statement.value)
            continue
        right = {"assertTrue(": True, "assertFalse(": False}
        marks = [value for mark, value in right.items() if mark in ast.unparse(statement)]
        pairs = known.get("test_pairs", []) if isinstance(statement, ast.For) else [("test_in", "test_out")]
        for said, gold in pairs if marks else []:
            gold, said = known.get(gold, gold), known.get(said, said)
            if gold != "test_out":
                yield SuiteCase(gold, _boxed(said), marks[0])


def _boxed(answer: str) -> str:
    return answer if answer.endswith("\\") else f"\\boxed{{{answer}}}"


def _rewarded(function: ast.FunctionDef) -> Iterator[SuiteCase]:
    """``model_response`` and ``task_info["ground_truth"]``, or completions and solutions, and what is asserted."""
    known = {
        statement.targets[0].id: _value(statement.value)
        for statement in function.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    text, (response, task) = ast.unparse(function), (known.get("model_response"), known.get("task_info"))
    gold = task.get("ground_truth") if isinstance(task, dict) else None
    if response and gold and "RewardConfig()" in text and "format_error" not in text:
        gold = gold[0] if isinstance(gold, list) else gold
        yield SuiteCase(gold, response, "is_correct is True" in text)
    completions, solutions = (
        known.get("completion", known.get("completions")),
        known.get("solution", known.get("solutions")),
    )
    if completions and solutions and "accuracy" in function.name + text:
        for index, (said, answer) in enumerate(zip(completions, solutions, strict=False)):
            yield SuiteCase(answer, said[0]["content"], f"rewards[{index}], 1.0" in text)


def accepted(cases: Sequence[SuiteCase], policies: dict[str, str], off: str | None = None) -> Counter[bool]:
    """How many right (True) and wrong (False) answers the policies accept, without the one called ``off``."""
    found: Counter[bool] = Counter()
    batches: dict[tuple[tuple[str, str], ...], list[SuiteCase]] = {}
    for case in cases:
        options = {name: value for name, value in {**policies, **(case.own if policies else {})}.items() if name != off}
        batches.setdefault(tuple(sorted(options.items())), []).append(case)
    for settings, batch in batches.items():
        with VerifierPool(ScoringOptions("math", dict(settings))) as pool:
            verdicts = pool.judge(Case(case.said, case.gold) for case in batch)
            found.update(case.right for case, verdict in zip(batch, verdicts, strict=True) if verdict.reward > 0)
    return found


def accepted_by_math_verify(cases: Sequence[SuiteCase]) -> Counter[bool]:
    """The same for the library as it comes; cases on which it raises are not accepted."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found: Counter[bool] = Counter()
    for case in cases:
        gold = _boxed(case.gold) if case.said.startswith("\\boxed") else case.gold
        found[case.right] += bool(verify(parse(gold, targets), parse(case.said, targets)))
    return found


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, choices=POLICIES)
    parser.add_argument("--tests", nargs="+", required=True, help="test files of a clone of the suite's repository")
    options = parser.parse_args(argv)
    cases = read_suite(options.tests)
    right = sum(case.right for case in cases)
    policies = POLICIES[options.suite]
    print(f"{options.suite}: {right} right answers, {len(cases) - right} wrong ones; accepted:")
    rows = [("default policies", {}, None), ("its policies", policies, None)]
    rows += [(f"  without {name}", policies, name) for name in sorted({*policies, *(n for c in cases for n in c.own)})]
    if importlib.util.find_spec("math_verify"):
        found = accepted_by_math_verify(cases)
        print(f"{'math-verify':<24}{found[True]:>5}{found[False]:>5}")
    for name, settings, off in rows:
        found = accepted(cases, settings, off)
        print(f"{name:<24}{found[True]:>5}{found[False]:>5}")
