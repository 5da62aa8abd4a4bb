"""Reading test suites of other verifiers as data, and the table of policies."""

import pytest

from megatron_gft.errors import InputError
from tools import measure_suites
from tools.bench.verifier_suites import read_suite

TESTS = r"""
import pytest, os

@pytest.mark.parametrize("gold,pred,expected", [("7", "so 7", 1), ("7", "$8$", 0), (os.name, "x", 1)])
def test_number_extraction(gold, pred, expected): ...

@pytest.mark.parametrize("gold, pred, expected, precision", [("1/3", "0.33", 1, 2)])
def test_precision(gold, pred, expected, precision): raise SystemExit("tests are never run")

@pytest.mark.parametrize("output_pair", [(5, "5.0")])
def test_correct_examples(output_pair): ...

class Old:
    def test_units(self):
        test_pairs = [("10 cm", "10")]
        for test_in, test_out in test_pairs:
            self.assertTrue(is_equiv(test_in, test_out))
        test_in = "[1, 2]"
        test_out = "(1, 2)"
        self.assertFalse(is_equiv(test_in, test_out))

    def test_reward(self):
        model_response = "<think>2+2</think> \\boxed{5}"
        reward = Reward(RewardConfig())
        task_info = {"kind": Kind.MATH, "ground_truth": "4"}
        assert not reward(task_info, model_response).is_correct
"""


@pytest.mark.slow  # tries a tool of ours, no part of the package
def test_suites_are_read_and_not_run(tmp_path, capsys):
    (tmp_path / "test_theirs.py").write_text(TESTS)
    cases = read_suite([tmp_path / "test_theirs.py"])
    assert [(case.gold, case.said, case.right) for case in cases] == [
        ("7", "so 7", True),
        ("7", "$8$", False),
        ("1/3", "0.33", True),
        ("5", r"\boxed{5.0}", True),
        ("5.0", r"\boxed{5}", True),
        ("10", r"\boxed{10 cm}", True),
        ("(1, 2)", r"\boxed{[1, 2]}", False),
        ("4", "<think>2+2</think> \\boxed{5}", False),
    ]
    assert cases[0].own == {"decimal": "either"} and cases[2].own == {"digits": "2"}
    assert measure_suites.main(["--suite", "math-verify", "--tests", str(tmp_path / "test_theirs.py")]) in (0, None)
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["default policies"] == ["3", "0"] and rows["its policies"] == ["5", "0"]
    assert rows["without digits"] == rows["without units"] == ["4", "0"]


def test_files_without_cases_are_named(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="no cases"):
        read_suite([tmp_path / "empty.py"])
    with pytest.raises(InputError, match="missing.py"):
        read_suite([tmp_path / "missing.py"])
