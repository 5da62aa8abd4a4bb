"""Verifiers: finding and comparing answers, policies, choices, users' functions, and the accuracy measurement."""

import gzip
import re
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gft.errors import InputError
from megatron_gft.scoring.final_answers import extract_answer
from megatron_gft.scoring.math_answers import same_answer
from megatron_gft.scoring.spelling import parse_number
from megatron_gft.scoring.verifier_pool import judge_one
from megatron_gft.scoring.verifiers import (
    Case,
    ChoiceVerifier,
    ExactVerifier,
    MathVerifier,
    UserVerifier,
    Verdict,
    build_verifier,
)
from tools import measure_verifier
from tools.bench.verifier_accuracy import Solution, measure, perturbations, read_solutions

FOUND = [
    (r"so \boxed{12}, or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\left\{x : x > \frac{1}{\sqrt{2}}\right\}}", r"\left\{x : x > \frac{1}{\sqrt{2}}\right\}"),
    (r"\fbox{7}", "7"),
    (r"\boxed 5", "5"),
    (r"It is 3, and so 4 = \boxed{12", None),  # cut off inside the box: 3 and 4 are no answers
    (r"Put it in \boxed{}: \boxed{8}, not \boxed{ }", "8"),
    ("12 apples\n#### 1,234", "1,234"),
    ("#### 18 dollars", "18"),
    ("#### -(72)", "-(72)"),
    ("#### x = 5\nsome more 9", "x = 5"),
    ("#### ", None),
    ("The answer is 3 * 6 = 18. That took 2 steps.", "18"),
    ("The answer is not 5. So she has 7", "7"),
    ("Answer: 42 because 6 times 7", "42"),
    ("The answer is east.", "east"),
    (r"Answer: \(x=3\)", "3"),
    ("So it is $5 and $6 = $11.", "11"),
    ("costs $1,234.50 in all", "1,234.50"),
    ("it went to -5", "-5"),
    ("10 - 5", "10 - 5"),
    ("the range 5-10", "5-10"),
    ("-$5", "-5"),
    ("it is 50%", "50%"),
    (r"is $\frac{3}{4}$.", r"\frac{3}{4}"),
    (r"is 1\frac{4}{5}.", r"1\frac{4}{5}"),
    (r"$x^2$", "x^2"),
    ("2 x 3 = **6**", "6"),
    ("finished 3rd of 10", "10"),
    ("it had 10, but she was 13th", "10"),
    ("1{,}234", "1,234"),
    ("a^2 and H2O", "a^2"),
    ("H2O", None),
    # headings
    ("#### Step 3: Compute the total\nSo she has 18 dollars.\n\n**Answer:** 18", "18"),
    ("### Solution\n#### Step 4: Add\n4+14=18. The answer is 18.", "18"),
    ("#### Step 1\nfoo\n#### Conclusion\nThe final answer is $18$.", "18"),
    ("#### 4. Conclusion\nThe total is 18", "18"),
    ("#### Final Answer\n18", "18"),
    ("#### Final answer:\n\n18 dollars\n\nfor 3 days", "18"),
    ("**Final Answer**\n\n$$18$$", "18"),
    ("#### Answer\n\\[\n18\n\\]", "18"),
    ("#### Final Answer", None),  # cut off
    ("So 18.\n#### Step 3", "18"),
    ("#### 18\n\n#### Explanation\nShe sells 9 eggs", "18"),
    ("#### 18\nLet me check: 9+9", "18"),
    # formulas are taken whole
    ("The answer is 10^5", "10^5"),
    ("The answer is 12-5", "12-5"),
    ("The answer is 2x+3", "2x+3"),
    ("The answer is sqrt(2).", "sqrt(2)"),
    ("The answer is 5 \u00d7 10^3", r"5 \times 10^3"),
    ("The answer is 1 1/2 cups", "1 1/2"),
    ("The answer is 2 million", "2 million"),
    ("it is 10^5", "10^5"),
    ("it is 1 000 000", "1 000 000"),
    ("total 20cm^2", "20"),
    ("answer: x = 3, y = 5", "x = 3, y = 5"),
    ("The answer is (3, 4).", "(3, 4)"),
    ("The answer is $x=5$ or $x=7$", "x=5, x=7"),
    ("The answer is 5 apples or 7", "5, 7"),
    ("The answer is 3, 5 and 7.", "3, 5, 7"),
    ("The answer is 18, and 20 is wrong", "18"),
    ("The answer is 18 (9*2=18), since 1+1=2", "18"),
    ("The answer is $2.50 per hour \u00d7 3 = $7.50", "7.50"),
    ("either 3 or 5", "3, 5"),
    ("", None),
]


@pytest.mark.parametrize("text, answer", FOUND)
def test_the_final_answer_is_found(text, answer):
    assert extract_answer(text) == answer


EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"),
    (r"\dfrac{33}{100}", "0.33"),
    (r"1\frac{4}{5}", "1.8"),
    (r"137 \frac{1}{2}", "137.5"),
    ("5000", "5,000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\$32,\!348", "32348"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("1/3", "0.333333"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("1,-2", "-2, 1"),
    (r"90^\circ", "90"),
    ("52_8", "52_{8}"),
    (r"\text{(C)}", "C"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\sqrt{51}", "51^{1/2}"),
    (r"2\sqrt{5}", r"\sqrt{20}"),
    ("(a+5)(b+2)", "(b+2)(a+5)"),
    ("6 - 5i", "-5i+6"),
    (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("y = 2x + 3", "y=3+2x"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    ("10", r"\(10\)."),
    ("-5", "\u22125"),
    ("3,5", r"x=3 \text{ or } x=5"),
    (r"x=3 \text{ or } x=5", "3, 5"),
    ("3,5", "5 and 3"),
    ("12", "x+y=12"),
    ("18", r"3 \cdot 6 = 18"),
    ("3.33", r"\frac{10}{3} = 3.33"),
    ("(3,5)", "(x,y) = (3,5)"),
    ("1000000", "1 000 000"),
    ("1000", r"1\,000"),
    ("2000000", "2 million"),
    ("5000", "5 x 10^3"),
    ("0.001", "10^-3"),
    (r"\sqrt{2}", "sqrt(2)"),
    (r"3\pi", "3pi"),
    ("50%", "50 percent"),
]
DIFFERENT = [
    ("50", "0.5"),
    ("50", "5000"),
    ("0.5", "50%"),
    ("10", "10%"),
    ("5.4", r"5.4 \text{ cents}"),
    ("1/3", "0.33"),
    ("3", "2.9999999"),
    ("10000000", "10000001"),
    ("0.00000001", "0.00000002"),
    ("x=5", "y=5"),
    ("(3,4]", "(3,4)"),
    ("52_8", "52"),
    (r"\text{even}", "neve"),
    (r"\sqrt{2}", r"-\sqrt{2}"),
    ("(15,-29)", "(15,29)"),
    (r"\frac{3}{56}", r"\frac{3}{65}"),
    (r"\pi", "3.14"),
    (r"\text{(C)}", r"\text{(D)}"),
    ("11/2", "1 1/2"),
    ("12/3", "1 2/3"),
    ("5", "x=3 or x=5"),
    ("5", r"x=3 \text{ or } x=5"),
    ("5", "x=3, y=5"),
    ("5", "3=5"),
    ("5", "a=1,b=2,c=3,d=4,e=5"),
    ("5", "5 or 7"),
    ("3,5", "x=3, y=5"),
    ("0", "5x - 7y = 0"),
    ("12", "2x+3y=12, x=12"),
    ("(1,2)", r"\{1,2\}"),
    ("2", "2 million"),
    ("5", "5 percent"),
    ("3", "3pi"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal_answers_in_other_clothes(gold, answer):
    assert same_answer(gold, answer) is True


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different_answers(gold, answer):
    assert same_answer(gold, answer) is False


def test_percent_and_unit_policies_are_off_until_asked_for():
    assert same_answer("50", "50%", percent="ignore") is True
    assert same_answer("0.5", r"50\%", percent="ignore") is False
    assert same_answer("0.5", r"50\%", percent="value") is True
    assert same_answer("50", "50%", percent="value") is False
    assert same_answer("50%", "50 %") is True
    assert same_answer("50", "0.5", percent="value") is False  # no sign, no factor
    assert same_answer(r"15\mbox{ cm}^2", "15", units="ignore") is True
    assert same_answer("15", "15 square meters", units="ignore") is True
    assert same_answer("15", "16 cm", units="ignore") is False
    assert same_answer("15", "15cm", units="ignore") is True
    assert same_answer("15", r"15 \text{ slices of pizza}", units="ignore") is True


@pytest.mark.parametrize(
    "gold, answer",
    [("12ab", "12xy"), ("3", "3pi"), ("3", "3 sin"), ("2", "2 ab"), ("2", "2 million"), ("2", r"2 \text{ dozen}")]
    + [("5", said) for said in ("5 percent", "5 or more", "5 squared", "5 hundred", "5 and a half")],
)
def test_words_that_change_a_value_are_no_units(gold, answer):
    assert same_answer(gold, answer, units="ignore") is False


@pytest.mark.parametrize("gold", [r"\frac{}{}", "%", "5 (or 5.0)"])
def test_a_gold_answer_that_cannot_be_read_is_an_error(gold):
    for said in (r"\boxed{5}", r"\boxed{east}", r"\boxed{5\%}"):
        verdict = judge_one(MathVerifier(), Case(said, gold))
        assert verdict.outcome == "error" and "cannot be read" in (verdict.detail or "")


def test_what_is_no_mathematics_is_unparsed_and_what_is_endless_is_not_read_out():
    assert MathVerifier()(Case("no idea", "3")).outcome == "unparsed"
    assert MathVerifier()(Case(r"\boxed{\frac{}{}}", "3")).outcome in ("unparsed", "wrong")
    assert same_answer("3", "x" * 5000 + "+1") is None
    assert same_answer("123", "1 2 3") is None
    assert parse_number("1e9999") is None  # would be a number of ten thousand digits


NUMBERS = st.integers(-(10**9), 10**9)


@given(NUMBERS, NUMBERS)
@settings(max_examples=300, deadline=None)
def test_only_the_very_number_is_accepted_however_it_is_written(gold, said):
    endings = ("\\boxed{{{}}}", "#### {}", "The answer is {}.", "which makes {}", "**{}**", "it costs {} dollars")
    for form in endings:
        for written in (f"{said}", f"{said:,}", f"{said}.0", f"{said}."):
            verdict = MathVerifier()(Case(form.format(written), f"{gold}"))
            assert verdict.outcome == ("correct" if said == gold else "wrong"), (form, written)


@given(st.text(max_size=200) | st.text(alphabet="\\boxed{}$^_0123456789.,-#%/= answeris", max_size=200))
@example("$ $")
@example("The answer is $$.")
@example("#### $;$")
@settings(max_examples=500, deadline=None)
def test_no_text_breaks_the_extraction(text):
    answer = extract_answer(text)
    assert answer is None or answer.strip()


HOSTILE = [
    "$" + "1 " * 5000 + "\\",
    "$ 1 " * 4000,
    "$" + "=1 " * 5000,
    "\\(" * 5000,
    "\\[ 1 " * 3000,
    "\\boxed{" * 5000,
    "\\boxed{" + "{" * 20000,
    "1," * 10000,
    "1" * 20000 + "th",
    "1,111" * 4000 + "x",
    "\\frac{" * 4000,
    "answer is " * 3000,
    "#### " + "a " * 10000,
    "-" * 20000 + "5",
    "1/" * 10000,
    "\\text{" * 4000,
    "5 " + "cm " * 8000 + "!",
    "(" * 20000,
    "((1)" * 6000,
    "1*(" * 8000,
    "5 or " * 5000,
    "#### " * 6000,
    "answer:\n" * 5000,
    "\n" * 20000,
    "a\n" * 10000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_takes_no_time(text):
    began = time.process_time()
    for said in (text, f"\\boxed{{{text}}}", f"#### {text}"):
        answer = extract_answer(said)
        if answer is not None:
            same_answer("5", answer[:400], units="ignore")
            same_answer("5", answer, units="ignore")
        ChoiceVerifier().find(said)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"Thus \boxed{C}", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        ("A is wrong, so the answer is (d).", "D"),
        ("Answer: **C**", "C"),
        ("first (A), but then (B)", "B"),
        ("reasons\nE", "E"),
        ("A cat sat", None),
        ("The answer is Apple", None),
        ("The answer is a number, so B", None),
        ("I think the answer is a bit unclear", None),
        ("So f(a)=f(b).\n\nD", "D"),
        ("(A) is wrong.\n\nD", "D"),
        ("The answer is (b) because", "B"),
        ("the answer is b.", "B"),
        (r"\boxed{e}", "E"),
        ("first this, then\n(c)", "C"),
        ("first (a), but then (b) and so on", None),
    ],
)
def test_choices(text, letter):
    assert ChoiceVerifier().find(text) == letter
    expected = "unparsed" if letter is None else "correct"
    assert ChoiceVerifier()(Case(text, f"({letter or 'A'})")).outcome == expected


@pytest.mark.parametrize(
    "gold, letter",
    [("C) f(a) is continuous", "C"), ("C. (a) and (b)", "C"), ("(d) north", "D"), (r"\text{(B)}", "B"), ("e", "E")]
    + [("A) is wrong, so the answer is (B)", "B"), ("A cat", None)],
)
def test_gold_choices(gold, letter):
    assert ChoiceVerifier().find_gold(gold) == letter


def test_exact():
    assert ExactVerifier()(Case("a  b\n", "a b")).outcome == "correct"
    assert ExactVerifier()(Case("A b", "a b")).outcome == "wrong"
    assert ExactVerifier(case="ignore")(Case("A b", "a b")).outcome == "correct"
    assert ExactVerifier(part="answer")(Case(r"so \boxed{a b}", "a b")).outcome == "correct"
    assert ExactVerifier()(Case("  ", "a")).outcome == "unparsed"


def test_gold_may_be_a_whole_solution():
    assert MathVerifier()(Case("it is 7", "we get 3+4=7\n#### 7")).reward == 1.0
    assert MathVerifier()(Case("it is 7", r"as shown, \boxed{7}")).reward == 1.0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mth", {}, "did you mean math"),
        ("math", {"percnt": "off"}, "no option 'percnt'"),
        ("math", {"percent": "maybe"}, "one of off, ignore, value"),
        ("no_such_module:f", {}, "No module named"),
        ("json:no_such_function", {}, "no_such_function"),
        ("json:__name__", {}, "not callable"),
        ("bad_syntax:judge", {}, r"bad_syntax.py:2 \(SyntaxError"),
        ("bad_import:judge", {}, r"bad_import.py:2 \(ModuleNotFoundError: No module named 'no_such_module'"),
        ("bad_exit:judge", {}, r"bad_exit.py:1 \(SystemExit: 3"),
        ("good:judge", {"nosuch": "1"}, r"unexpected keyword argument 'nosuch'; its signature is judge\(case, bonus"),
        ("good:two", {}, "missing a required argument: 'gold'"),
    ],
)
def test_bad_verifiers_are_refused_with_the_way_out(name, options, message, tmp_path, monkeypatch):
    (tmp_path / "bad_syntax.py").write_text("import json\ndef judge(case) return 1\n")
    (tmp_path / "bad_import.py").write_text("import json\nimport no_such_module\n")
    (tmp_path / "bad_exit.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "good.py").write_text("def judge(case, bonus=0): return bonus\ndef two(case, gold): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=message):
        build_verifier(name, options)


def test_users_functions_may_return_verdict_bool_or_number(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from megatron_gft.scoring.verifiers import Verdict\n"
        "def judge(case, bonus='0'):\n"
        "    said = {'v': Verdict('unparsed', -1.0), 'b': True, 'n': 0.25 + float(bonus), 'z': 0, 'x': 'what'}\n"
        "    return said[case.response]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = build_verifier("my_rewards:judge", {"bonus": "1"})
    assert judge(Case("v", None)) == Verdict("unparsed", -1.0)
    assert judge(Case("b", None)) == Verdict("correct", 1.0)
    assert judge(Case("n", None)) == Verdict("correct", 1.25)
    assert judge(Case("z", None)) == Verdict("wrong", 0.0)
    with pytest.raises(TypeError, match="not a Verdict"):
        judge(Case("x", None))


@pytest.mark.parametrize(
    "result, verdict",
    [
        (Verdict("correct", np.float32(1)), Verdict("correct", 1.0)),  # type: ignore[arg-type]
        (Verdict("correct", True), Verdict("correct", 1.0)),
        (Verdict("wrong", 0, {"a": {1}}), Verdict("wrong", 0.0, "{'a': {1}}")),  # type: ignore[arg-type]
        (np.bool_(True), Verdict("correct", 1.0)),
        (1e39, "ValueError.*1e\\+39"),
        (Verdict("correct", -1e39), "ValueError.*-1e\\+39"),
        (float("nan"), "ValueError.*nan"),
        (10**400, "TypeError.*not a Verdict"),
        (None, "TypeError.*None"),
        (Verdict("correct", None), "TypeError.*not a number"),  # type: ignore[arg-type]
        (Verdict("good", 1.0), "ValueError.*'good', not one of correct"),  # type: ignore[arg-type]
        (Verdict(["wrong"], 1.0), "ValueError.*not one of correct"),  # type: ignore[arg-type]
    ],
)
def test_results_of_users_functions_are_plain_finite_or_refused(result, verdict):
    given = judge_one(UserVerifier("mine:f", lambda case: result), Case("", None))
    if isinstance(verdict, Verdict):
        assert given == verdict and type(given.reward) is float
    else:
        assert given.outcome == "error" and re.match(verdict, given.detail or "")


def test_a_users_function_may_spoil_its_own_copy_only():
    def judge(case):
        case.meta.setdefault("seen", []).append(1)
        case.meta["deep"].append(1)
        case.prompt[0]["content"] += "!"
        return len(case.meta["seen"] + case.meta["deep"]) == 2

    meta, prompt = {"deep": []}, [{"role": "user", "content": "Why?"}]
    verifier = UserVerifier("mine:judge", judge)
    assert [verifier(Case("", None, prompt, meta)).reward for _ in range(3)] == [1.0] * 3
    assert meta == {"deep": []} and prompt[0]["content"] == "Why?"


@pytest.mark.parametrize(
    "text, changed",
    [
        (r"thus \boxed 5", r"thus \boxed {8}"),
        (r"so \boxed {7} = \fbox{ 7 }", r"so \boxed {8} = \fbox{8}"),
        ("#### Step 1\n\\boxed{7}", "#### Step 1\n\\boxed{8}"),
        ("so\n#### 7", "so\n#### 8"),
    ],
)
def test_the_answer_of_a_solution_is_replaced(text, changed):
    assert Solution(text, "7").with_answer("8") == changed


@pytest.mark.parametrize("text", ["no answer 5", r"cut \boxed{5", r"#### 5 \boxed{5"])
def test_a_solution_without_answer_is_refused(text):
    with pytest.raises(InputError, match="f:3: this solution has no answer"):
        Solution(text, "5", "f:3").with_answer("8")


@pytest.mark.parametrize(
    "content, options, message",
    [
        ('{"solution": "#### 5"}\n{oops\n', [], "in.jsonl:2: invalid_json"),
        (
            '{"solution": null, "answer": "5"}\n',
            ["--answer-column", "answer"],
            "in.jsonl:1: column 'solution' is empty",
        ),
        ('{"solution": "so 5", "answer": "5"}\n', ["--answer-column", "answer"], "in.jsonl:1: this solution has no"),
        ('{"solution": "so \\\\boxed{5}", "answer": "5"}\n', [], "no answer after #### .* set --answer-column"),
        ('{"text": "5"}\n', [], "in.jsonl:1: no column 'solution'.*text"),
        ("\n", [], "no rows"),
    ],
)
def test_bad_rows_are_named_by_the_measuring_tool(content, options, message, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    assert (
        measure_verifier.main(["--input", str(tmp_path / "in.jsonl"), "--solution-column", "solution", *options]) == 2
    )
    assert re.search(message, capsys.readouterr().err)


def test_rows_to_measure_may_be_compressed_and_hold_line_separators(tmp_path):
    with gzip.open(tmp_path / "in.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"solution": "a\u2028b #### 5"}\n{"solution": "c #### 1,700"}\n')
    solutions = read_solutions([tmp_path / "in.jsonl.gz"], "solution")
    assert [(solution.gold, solution.text[0]) for solution in solutions] == [("5", "a"), ("1700", "c")]


def test_falsified_answers_differ_from_the_gold():
    made = dict(perturbations("1,234", "99"))
    assert made["+1"] == "1,235" and made["x10"] == "1,2340" and made["digits swapped"] == "1,324"
    assert made["sign"] == "-1,234" and made["other gold"] == "99"
    assert not [answer for _, answer in perturbations("0", "0") if parse_number(answer) == 0]


def test_accuracy_of_the_math_verifier_on_made_up_solutions():
    solutions = [
        Solution(f"We add {i} and {3 * i}: {i}+{3 * i}=<<4*{i}>>{4 * i}.\n#### {4 * i}", f"{4 * i}")
        for i in range(7, 60)
    ]
    solutions += [
        Solution(rf"By Vieta $x=\boxed{{\frac{{{i}}}{{{2 * i + 1}}}}}$ holds.", rf"\frac{{{i}}}{{{2 * i + 1}}}")
        for i in range(3, 20)
    ]
    table = {row.kind: row for row in measure(solutions, {}, time_limit=20)}
    for kind, row in table.items():
        assert row.share == (1.0 if kind.startswith("own gold") else 0.0), (kind, row.examples)
    assert sum(row.count for row in table.values()) > 1500
