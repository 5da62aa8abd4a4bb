"""Verifiers: finding and comparing answers, policies, choices, users' functions, and the accuracy measurement."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gft.errors import InputError
from megatron_gft.scoring.math_answers import extract_answer, parse_number, same_answer
from megatron_gft.scoring.verifier_accuracy import Solution, measure, perturbations
from megatron_gft.scoring.verifiers import Case, ChoiceVerifier, ExactVerifier, MathVerifier, Verdict, build_verifier

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
    (r"Answer: \(x=3\)", "x=3"),
    ("So it is $5 and $6 = $11.", "11"),
    ("costs $1,234.50 in all", "1,234.50"),
    ("it went to -5", "-5"),
    ("10 - 5", "5"),
    ("the range 5-10", "10"),
    ("-$5", "-5"),
    ("it is 50%", "50%"),
    (r"is $\frac{3}{4}$.", r"\frac{3}{4}"),
    (r"is 1\frac{4}{5}.", r"1\frac{4}{5}"),
    (r"$x^2$", "x^2"),
    ("2 x 3 = **6**", "6"),
    ("finished 3rd of 10", "10"),
    ("it had 10, but she was 13th", "10"),
    ("1{,}234", "1,234"),
    ("a^2 and H2O", None),
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


def test_what_is_no_mathematics_is_unparsed_and_what_is_endless_is_not_read_out():
    assert MathVerifier()(Case("no idea", "3")).outcome == "unparsed"
    assert MathVerifier()(Case(r"\boxed{\frac{}{}}", "3")).outcome in ("unparsed", "wrong")
    assert same_answer("3", "x" * 5000 + "+1") is None
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
    ],
)
def test_choices(text, letter):
    assert ChoiceVerifier().find(text) == letter
    expected = "unparsed" if letter is None else "correct"
    assert ChoiceVerifier()(Case(text, f"({letter or 'A'})")).outcome == expected


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
    ],
)
def test_bad_verifiers_are_refused_with_the_way_out(name, options, message):
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
