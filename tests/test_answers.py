"""What answers mean: kinds of answers and their neighbours, each right and wrong, and the policies of ``math``."""

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_gft.scoring.final_answers import extract_answer
from megatron_gft.scoring.math_answers import Policies, same_answer
from megatron_gft.scoring.spelling import parse_number
from megatron_gft.scoring.verifier_pool import judge_one
from megatron_gft.scoring.verifiers import Case, ExactVerifier, MathVerifier, build_verifier

# kind -> rows of: gold, answers that are right, answers that are wrong; an answer stands in a box
ANSWERS = {
    "unicode": [
        (r"\sqrt{2}", ["√2", "√{2}", "2^½"], ["2", "√3"]),
        ("25", ["5²", "２５", "5^{2}"], ["5", "2²"]),
        ("5.5", ["5½", r"5\frac{1}{2}", "5 1/2"], ["5", "½", "5²"]),
        ("3x^2", ["3x²", "3·x²"], ["3x", "3x³"]),
        ("x_1", ["x₁", "x_{1}"], ["x_2", "x"]),
        ("0.006", ["6×10⁻³", "6·10^{-3}"], ["6×10⁻²", "6×10³"]),
        ("2", ["∛8"], ["√8"]),
        (r"\frac{\pi}{2}", ["π/2", "½π"], ["π", "2π"]),
        (r"\sqrt{x+1}", ["√(x+1)"], ["√x+1"]),
        ("-7", ["−7", "–7"], ["7"]),
        (r"\theta", ["θ"], ["φ"]),
    ],
    "relations": [
        ("x<1", ["x < 1", "1 > x", "-x > -1", r"x \lt 1", "2x<2", r"(-\infty, 1)"], ["x>1", r"x\le 1", "1", "y<1"]),
        (r"x \leq 1", ["x ≤ 1", "x <= 1", r"1 \geqslant x", r"(-\infty,1]"], ["x<1", r"(-\infty,1)"]),
        ("-2<a<5", ["a > -2, a < 5", "(-2,5)"], ["[-2,5]", r"-2\le a<5", "(5,-2)"]),
        ("1<|x|<2", [r"(-2,-1) \cup (1,2)"], [r"(1,2)", r"[-2,-1) \cup (1,2)"]),
        (r"x \ne 3", ["x != 3", "x ≠ 3"], ["x = 3", "3"]),
        ("2x+3y=6", ["6=3y+2x", "4x+6y=12", "y = 2 - 2x/3"], ["2x+3y=7", "6", "2x-3y=6"]),
        (
            "|x|<2",
            ["-2<x<2", "(-2,2)", r"x > -2 \text{ and } x < 2"],
            ["-2<x<3", "-2<y<2", r"|x| \le 2", "x<2", "|x|>2", "2"],
        ),
        ("-2<x<2", ["|x|<2"], ["|x|>2", r"|x| \le 2", "|y|<2"]),
        ("|x-3|<=2", ["1 <= x <= 5", "[1,5]"], ["-2<=x<=2", "1<x<5", "[1,5)"]),
        ("|x-1/2|<1", [r"-\frac12<x<\frac32", "(-1/2, 3/2)", r"|x-\frac{1}{2}|<1"], ["-1<x<1", "(1/2,3/2)", "|x-1|<2"]),
        ("|x+1|>2", ["x < -3 or x > 1", r"(-\infty,-3) \cup (1,\infty)"], ["x < -1 or x > 3", "-3<x<1", "x>1"]),
        ("x<-2 or x>=2", [r"(-\infty,-2) \cup [2,\infty)", "x>=2 or x<-2"], ["|x|>2", "(2,-2)", "[2,-2)", "x<-2"]),
        ("y=2x", ["2x", "y = 2 x"], ["y=3x", "x=2y", "x"]),
        ("(1,2]", ["(1, 2]", r"\left(1,2\right]"], ["1<x≤2", "(1,2)", "[1,2]"]),
    ],
    "commas": [
        ("3,5", ["3, 5", "5 and 3", r"\{5,3\}", "x = 3 or x = 5"], ["35", "3.5", "3", "3,5,7"]),
        ("(1, 2)", ["(1,2)", r"\left(1,\, 2\right)"], ["(2,1)", r"\{1,2\}", "12", "(1,2,3)"]),
        ("(100,200)", ["(100, 200)"], ["100200", "(200,100)"]),
        ("100200", ["100,200", r"100{,}200", r"100\,200", r"100,\!200"], ["(100,200)", "100.2"]),
        ("1;2;3", ["1,2,3"], ["1;2"]),
    ],
    "names": [
        ("n=1, 2, 3", ["1, 2, 3", "n=1,2,3", "n=3, n=2, n=1", r"n \in \{1,2,3\}"], ["n=1,2", "m=1,2,3", "1,2"]),
        ("1,2,3", ["n=1, 2, 3"], ["n=1, m=2, k=3"]),
        ("5", ["x=5", "5=x", "2+3=5", "x=2+3=5", r"x \approx 5"], ["5=7", "7=5", "x=3, x=5", r"7 \approx 5"]),
        (r"\frac{AB}{CD}=3", ["3"], ["4"]),
        (r"\sin x = \frac12", [r"\sin(x)=0.5"], [r"\cos x = \frac12", "0.5"]),
        (r"\frac{10}{3}", [r"\frac{10}{3} \approx 3.33", "3.33333"], ["3.33", r"3 \approx \frac{10}{3}"]),
    ],
    "matrices": [
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            [
                r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
                r"\begin{bmatrix} 1 & 2 \\[2pt] 3 & \frac{8}{2} \\ \end{bmatrix}",
                r"\begin{array}{cc}1&2\\3&4\end{array}",
                r"\begin{pmatrix}1&1\\3&3\end{pmatrix}+\begin{pmatrix}0&1\\0&1\end{pmatrix}",
            ],
            [
                r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
                r"\begin{pmatrix}3&4\\1&2\end{pmatrix}",
                r"\begin{pmatrix}1&2&3&4\end{pmatrix}",
                r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
                "10",
            ],
        ),
        (
            r"\begin{pmatrix} 2 \\ -4 \end{pmatrix}",
            [r"2\begin{pmatrix}1\\-2\end{pmatrix}", r"\begin{pmatrix}2\\-4\end{pmatrix}"],
            [r"\begin{pmatrix}2&-4\end{pmatrix}", r"\begin{pmatrix}-4\\2\end{pmatrix}", "(2,-4,0)"],
        ),
    ],
    "percent": [
        (r"28\%", [r"28 \%", "28 percent", r"28 \text{ pct}", "28 per cent"], ["28", "0.28", r"29\%"]),
        ("28", [], [r"28\%", "28 percent"]),
    ],
    "tiny and huge": [
        (r"\frac{1}{2004!}", [r"\frac{1}{2004!}", r"\frac{2004}{2004 \cdot 2004!}"], [r"\frac{1}{2006!}", "0"]),
        ("2^{-2000}", [r"\frac{1}{2^{2000}}", "4^{-1000}"], ["-2^{-2000}", "2^{-2001}", "0"]),
        ("e^{-1000}", [r"\frac{1}{e^{1000}}"], ["e^{-2000}", "0"]),
        ("2^{2^{10}}", ["2^{1024}", "4^{512}"], ["2^{1023}", "2^{2^{11}}"]),
        ("100!", [r"100 \cdot 99!"], ["100!+1", "99!"]),
        ("1e-320", [r"10^{-320}"], ["2e-320", "0"]),
    ],
    "infinity": [
        (
            r"\infty",
            ["∞", r"+\infty", "infinity", r"\text{infinity}", "inf", "positive infinity"],
            [r"-\infty", "1e99"],
        ),
        (r"-\infty", ["-∞", "negative infinity", "-inf"], ["∞"]),
        ("5", [], ["∞", r"-\infty"]),
        (r"(-\infty, 3]", ["(-∞,3]", "(-inf, 3]"], ["(-∞,3)", r"(\infty,3]"]),
        (r"\emptyset", [r"\varnothing", "∅"], ["0"]),
    ],
    "notes and money": [
        ("9 (apples)", ["9", r"9 \text{ apples}", "9 (apples)", "9.0"], ["8", "9 pears", "8 (apples)", "19"]),
        ("4.5 (miles/hour)", ["4.5"], ["4"]),
        ("9.5 (m^2)", ["9.5", "9.5 (m²)"], ["9", "9.5^2"]),
        ("2.74", ["2,74 €", "€2,74", "€ 2,74", r"\$2.74"], ["74", "2,74", "274"]),
        ("1.5", ["1.5 (times)", "1.5 (cups)"], ["1.5 (times 2)", "1.5 (million)", "1.5 (dozen)", "1.5 (x)"]),
        ("3 (out of 10)", ["3", "3 (out of 10)"], ["30", "3 (or 4)", "3 (out of 9)", "3/10"]),
        ("12 ($/hour)", ["12", r"\$12"], ["13"]),
        ("9 (cm, approx.)", ["9", "9.0"], ["8", "9 pears", "9 (or 10, approx.)"]),
        ("9 (%)", ["9", r"9\%", "9 percent", "9 (%)"], ["0.09", "900", "9 pears"]),
        ("9 ($)", ["9", r"\$9", "9 (dollars)", "9 (€)"], ["90", "9 pears"]),
        ("5:30 (p.m.)", ["5:30", "5:30 p.m.", r"5:30 \text{ PM}", "5:30pm"], ["5:30 a.m.", "5:31", "5:30 (am)", "30"]),
        ("7:05 a.m.", ["7:05 am", r"7:05\text{ A.M.}"], ["7:05", "7:05 p.m."]),
        ("52_8", ["52_{8}"], ["52", "42", "52_9"]),
    ],
    "plus or minus": [
        (r"\pm 2", ["±2", "2, -2", r"\{-2, 2\}", "x = ±2"], ["2", "-2", "±3"]),
        (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"1-\sqrt{19}, \sqrt{19}+1"], [r"1+\sqrt{19}", r"1 \pm 19"]),
        ("2", ["2"], ["±2"]),
    ],
    "degrees": [
        (
            r"\frac{1}{2}",
            [r"\sin 30^\circ", "sin(30°)", r"\cos{60^{\circ}}", r"\sin\left(30^\circ\right)", r"\sin 30^\circ = 0.5"],
            [r"\sin 30", r"\cos 30^\circ", r"\sin(-30^\circ)"],
        ),
        (r"\tan 80^\circ", [r"\cot 10^\circ", r"\tan 80^{\circ}"], [r"\tan 10^\circ", r"\cot 80^\circ"]),
        ("1", [r"\sin^2 20^\circ + \cos^2 20^\circ", r"\tan 45°"], [r"\sin^2 20^\circ", "45°"]),
        (r"30^\circ", ["30", "30°"], ["60"]),
    ],
    "expressions": [
        ("(x+1)^2", ["x^2+2x+1", "x²+2x+1", "(1+x)(x+1)"], ["x^2+1", "(x-1)^2", "4"]),
        (r"\pi(R^2-r^2)", [r"\pi R^2 - \pi r^2"], ["0", r"\pi(r^2-R^2)"]),
        (r"\sin^2 x", [r"1 - \cos^2 x", r"\sin(x)^2"], [r"\sin x", r"\cos^2 x"]),
        ("|x|", [r"\sqrt{x^2}"], ["x", "-x"]),
        (r"\frac{1}{3}", [r"0.\overline{3}", "0.333333", "0.3333333", "1/3"], ["0.33", "0.333334", "0.3"]),
        (r"0.1\overline{6}", ["1/6"], ["0.16"]),
        ("3+4i", ["4i+3", "(2+i)^2"], ["3-4i", "5"]),
        (r"\sqrt{2}", ["1.41421", "1.414214", r"\frac{2}{\sqrt{2}}"], ["1.4142", "1.41422", r"-\sqrt{2}"]),
        (r"\binom{5}{2}", ["10"], ["5"]),
        ("40", [r"4\binom{5}{2}", r"5(8)", "(5)(8)", r"\mathbf{40}", r"\text{40}", "= 40"], ["13", "14", "4(0)"]),
        ("9", ["(3)(3)"], ["5(4)", "(4)5"]),
        (
            r"\frac{1}{2}",
            [r"\boldsymbol{\frac{1}{2}}", r"\mathbf{\frac{1}{2}}", r"\bm{\frac{\sqrt{4}}{4}}"],
            [r"\bm{\frac13}", r"\boldsymbol{2}"],
        ),
        (r"\text{Anna}", [r"\mathbf{Anna}", r"\textbf{Anna}"], [r"\mathbf{Ann}"]),
        (r"\mathbb{R}", ["ℝ", r"(-\infty, \infty)"], [r"\mathbb{Q}"]),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", ["-2"], ["2"]),
        ("7:32", ["7 : 32", "7/32"], ["32:7", "7:33"]),
        ("12:00", [], ["1:00", "12:30"]),
        ("1:2:3", ["1 : 2 : 3"], ["1:2", "1/2"]),
        ("1/2", ["1:2"], ["1:2:3", ":", "1:", ", ."]),
    ],
}
CASES = [(kind, *row) for kind, rows in ANSWERS.items() for row in rows]


@pytest.mark.parametrize("kind, gold, right, wrong", CASES, ids=[f"{case[0]}: {case[1]}" for case in CASES])
def test_kinds_of_answers(kind, gold, right, wrong):
    verifier = MathVerifier()
    for answers, outcome in ((right, {"correct"}), (wrong, {"wrong", "unparsed"})):
        for answer in answers:
            assert verifier(Case(rf"so \boxed{{{answer}}}", gold)).outcome in outcome, answer


SAID = [
    ("The answer is √2.", r"\sqrt{2}"),
    ("it is 5½ cups", "11/2"),
    ("It costs 2,74 euros.", "2.74"),
    ("Preis: 2,74 €", "2.74"),
    ("so $4 y+7$", "7 + 4y"),
    ("so $x > -1$", "x>-1"),
    ("The solution is x < 1.", "x<1"),
    ("it is ±2", "2,-2"),
    ("The answer is $E$.", r"\text{(E)}"),
    (r"so $28$ %.", r"28\%"),
    (r"\boxed{28}\%", r"28\%"),
    (r"\boxed{10} percent", "10"),  # what stands outside counts only if the gold answer has it
    (r"\boxed{2} and \boxed{3}", "2, 3"),
    (r"$\boxed{2}$, $\boxed{3}$ or $\boxed{5}$", "2,3,5"),
    (r"The roots are \boxed{2}, \boxed{2}", "2"),
    (r"We have \boxed{9} apples. So there are \boxed{4} pears.", "4"),
    ("The answer is 9 (apples).", "9 (apples)"),
    ("The answer is infinity.", r"\infty"),
    (r"The answer is (-\infty, 2) \cup (3, \infty).", r"(3,\infty) \cup (-\infty,2)"),
    (r"The answer is \begin{pmatrix} 1 \\ 2 \end{pmatrix}, since $a=1$.", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"Thus the correct answer is therefore \text{even}", r"\text{even}"),
    ("The answer for $n$ is 34, where $m=2$", "34"),
    (r"Final Answer: The volume of $ABC$ is 120. I hope it is correct.", "120"),
    ("Since $a=3$, the answer should be $\\frac{1}{2}$, where $b=7$.", "1/2"),
    ("The answer is 5. I hope that this answer is correct.", "5"),
    ("So there are $9$ divisors of 196.", "9"),
    ("We get $2+3=5$ and\n\\begin{align*} x &= 2 \\cdot 5 \\\\ &= 10.\n\\end{align*}", "10"),
    (r"Thus $f(-2) = 5(-2)^2 - 2 = 18$.", "18"),
    (r"$n! = 2 \cdot 5!=240$", "240"),
    (r"$\Rightarrow \frac{8}{2} = 4$", "4"),
    ("Hence $17 = x$.", "17"),
    ("With $k=3$, the answer is therefore\n\\[7.\\]\nIn 2 steps.", "7"),
    ("Since $k=3$, the answer is given by:\n\n$$x = 7$$", "7"),
    ("We get our answer: \\[\n\\frac{8}{2} = 4.\\]", "4"),
    ("The answer is thus\nAnna.", "Anna"),
    ("The answer is $\\boldsymbol{6 + 9i}$.", "6+9i"),
    (
        "\\begin{align*}x &= 2a \\\\\n&= \\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}.\\end{align*}",
        r"\begin{pmatrix}1\\2\end{pmatrix}",
    ),
    ("The area is 9 m².", "9"),
    ("It falls with 9.8 m/s².", "9.8"),
    ("So\n#### 3,5 kg", "3,5 kg"),
    ("It runs 5 meters per second.", "5 meters per second"),
    (r"answer is $\boxed{12}$ cm", "12 cm"),
    ("The answer is June 20.", "June 20"),
    ("The answer is $\n9\n$", "9"),
    ("Answer \\( \n 9 \n \\)", "9"),
    ("The limit is negative infinity.", r"-\infty"),
    ("The sum tends to negative infinity.", r"-\infty"),
    ("As $n$ grows, the sum approaches infinity.", r"\infty"),
    ("It is 5 when n tends to infinity.", "5"),
    ("So n = 1, 2, and 3.", "1, 2, 3"),
    ("The solutions are $1$, $2$ and $3$.", "1, 2, 3"),
    ("From $n = 3$, $7$.", "7"),
    ("The answer is 12 by a = 5.", "12"),
    ("The answer is 12 divided by 3 = 4.", "4"),
    ("The answer is 7. The answer cannot be -7, since -7 < 0.", "7"),
    ("Is the answer 5.5? No, 3 + 4 = 7.", "7"),
    ("So 7. The answer is never 5.", "7"),
    ("The answer is not immediately clear: 5 + 7 = 12.", "12"),
    ("So the series diverges to infinity.", r"\infty"),
    ("The limit is 5 as n goes to infinity.", "5"),
    ("We meet at 5:30 p.m.", "5:30"),
    ("We meet at $5:30$ PM.", "5:30 p.m."),
    ("The limit is −∞.", r"-\infty"),
    ("Preis: 1.234,50 €", "1234.5"),
    ("x is 3.\n[asy] draw((0,0)--(1,2)); [/asy]", "3"),
]


@pytest.mark.parametrize("text, gold", SAID)
def test_answers_in_words(text, gold):
    assert MathVerifier()(Case(text, gold)).outcome == "correct", extract_answer(text)


@pytest.mark.parametrize(
    "text, gold",
    [
        ("it is √2", "2"),
        ("So n = 1, 2, 3.", "3"),
        ("The answer is not $5$.", "5"),
        ("The answer can't be 5.", "5"),
        ("The answer isn't 5.", "5"),
        ("Is the answer 5? No.", "5"),
        ("So 7. The answer is never 5, since 5 = 5.", "5"),
        ("It holds where n tends to infinity.", r"\infty"),
        ("Let n tend to infinity.", r"\infty"),
        ("We meet at 5:30 a.m.", "5:30 p.m."),
        ("5 would be the answer to another problem; here it is 6.", "5"),
        ("5 cannot be our answer. It is 6.", "5"),
        ("5 is the wrong answer. It is 6.", "5"),
        ("8 is not the answer, 7 is.", "8"),
        (r"We meet at \boxed{5:30} a.m.", "5:30 (p.m.)"),
        ("We meet at 5:30 a.m.", "5:30 (p.m.)"),
        ("The limit is not infinity.", r"\infty"),
        ("The limit is minus infinity.", r"\infty"),
        ("it is 5 pears", "5 apples"),
        ("#### 6 kg", "5 kg"),
        ("it is 5²", "5"),
        ("it is 5½", "5"),
        ("so 3x²", "3x"),
        ("It costs 2,74 euros.", "74"),
        ("so $x > -1$", "-1"),
        ("it is ±2", "2"),
        ("so $4 y+7$", "4"),
        (r"\boxed{2} and \boxed{3}", "3"),
        (r"\boxed{2} or \boxed{3}", "3"),
        (r"\boxed{}", "5"),
        (r"The answer is \boxed{}.", r"\boxed{}"),
        (r"\boxed{5}", r"\boxed{}"),
        (r"\boxed{29}\%", r"28\%"),
    ],
)
def test_half_an_answer_or_two_are_none(text, gold):
    assert judge_one(MathVerifier(), Case(text, gold)).reward == 0.0


# {}: the answer; @: another formula of the text
WORDINGS = """\
_Answer_: {} \u2014 we used @ here.
__Answer__: {} (by @)
**Final answer:** {}. It follows from @.
Answer \u2013 {}
The answer, {}, comes from @.
The answer ({}) comes from @.
We come to an answer of {} by way of @.
This gives the answer {}, with @ as before.
Dividing by @, the answer simplifies to {}.
The answer boils down to {} after we divide by @.
The answer is, as @ shows, {}.
The answer is (with @) {}.
The answer is given as {}, by @.
The answer is {} - keep in mind that @.
The answer is {}: see @.
The answer is not @ but {}.
The answer to (a) is @. The answer to (b) is {}.
One might hope that the answer is @, but the answer is {}.
Given @, the answer is then {}, as @ shows.
So {} is the answer, because @.
So {} will therefore be our final answer; @ is none.
This leaves {} as the answer, with @ as a check.
The value is {}, since @.
The value is {}. Note that @ is not needed.
The value is {}. (We could have used @.)
We get {}, using @.
And the answer? {}, thanks to @.
The answer? Well, it's {} by @.
So what is the answer? {} cm, from @.
Our final answer? {} rather than @.
Do we know the answer? @ is too small. So {}.
Can you guess the answer? With @ it is {}.
Is the answer @? No, {}.
Could the answer be @? Not quite. We get {}, since @ fails.
Does the answer equal @? Hardly: the value is {}.
Is the answer {}? Yes, since @.
The answer is {}; can you see why? Because of @.
The answer is @. Wait, no: it is {}.
The answer cannot be @. It must be {}.
The answer is never @, so we get {}.
The answer is {}. The answer cannot be @.
The final result is {}, on account of @.
What is the result? It is {} metres, because @.
The value is {} due to @, and @.
The value is {}, because we know that @.
The value is {}, which follows from @.
The value is {} (obtained from @).
The value is {}; see @.
The value is {} instead of @.
""".splitlines()


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_answer_is_found_among_other_formulas(wording):
    golds = r"12|-3|\frac{1}{2}|2x+1|(3, \frac{\pi}{2})|\text{(B)}|\begin{pmatrix} 1 \\ 2 \end{pmatrix}".split("|")
    for gold, other in zip(golds, [*golds[1:], "17"], strict=True):
        for formula in ("$n = 5$", "$40$", r"\(x \ne 0\)"):
            said = wording.format(f"${gold}$").replace("@", formula)
            assert MathVerifier()(Case(said, gold)).outcome == "correct", (said, extract_answer(said))
        said = wording.format(f"${other}$").replace("@", f"${gold}$")
        assert MathVerifier()(Case(said, gold)).outcome != "correct", (said, extract_answer(said))


def test_words_beside_a_matrix_are_not_its_factors():
    said = r"This gives $\begin{pmatrix} 1 \\ 3 \end{pmatrix}$ as our answer."
    assert MathVerifier()(Case(said, r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}")).outcome == "wrong"
    assert same_answer(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"k\begin{pmatrix} 1 \\ 2 \end{pmatrix}") is False


PIECES = r"answer |the answer is not known to me, nor to you|$5$ is the answer |answer $x$ $y$ |answer of \(|5, since "
PIECES += r"|as the a |We can check | (A b|$x$ |[asy]|\begin{align}|½√²|1.234|\boxed{1}, |2(3)"


@pytest.mark.parametrize("piece", [*"\n*_ `($", *PIECES.split("|")])
def test_the_time_grows_as_the_text(piece):
    """Twice the text takes at most about twice the time; what is too short to measure is short enough."""

    def seconds(characters):
        text = f"so 5. {piece * (characters // len(piece))} 7,50 \u20ac"
        began = time.process_time()
        MathVerifier(boxes="near")(Case(text, "5 kg"))
        return time.process_time() - began

    short, long = (min(seconds(size) for _ in range(2)) for size in (15_000, 60_000))
    assert long < 0.15 or long < 8 * short, (short, long)


def test_exact_answers_may_hold_any_sign():
    assert ExactVerifier(part="answer")(Case(r"so \boxed{√2 – l’été}", "√2 – l’été")).outcome == "correct"


def test_a_gold_answer_of_several_boxes_is_all_of_them():
    for gold in (r"\boxed{2} and \boxed{3}", r"so \(\boxed{2}\), \(\boxed{3}\)."):
        assert MathVerifier()(Case(r"\boxed{3, 2}", gold)).outcome == "correct"
        assert MathVerifier()(Case(r"\boxed{3}", gold)).outcome == "wrong"


@pytest.mark.parametrize(
    "option, gold, text",
    [
        ("percent=ignore", "28", r"\boxed{28 \%}"),
        ("percent=value", "0.28", r"\boxed{28 \%}"),
        ("percent=either", "0.28", r"\boxed{28 \%}"),
        ("units=ignore", "15", r"\boxed{15cm}"),
        ("units=spaced", "15", r"\boxed{15 cm}"),
        ("units=spaced", "15", r"\boxed{15weeks}"),
        ("decimal=comma", "1234.5", r"\boxed{1.234,5}"),
        ("decimal=either", "1.22", r"\boxed{1,22}"),
        ("decimal=either", "1234", r"\boxed{1,234.0}"),
        ("names=ignore", "AB=4, CD=5", r"\boxed{4, 5}"),
        ("names=ignore", "f(x) = 2x", r"\boxed{y = 2x}"),
        ("digits=3", r"\pi", r"\boxed{3.14}"),
        ("digits=2", r"\frac{8}{3}", r"\boxed{2.67}"),
        ("steps=last", "7", r"\boxed{2+3 = 7}"),
        ("intervals=either", "(1,2]", r"\boxed{1 < x \le 2}"),
        ("boxes=near", "1, 2", r"\boxed{1} paper and \boxed{2} bins"),
        ("boxes=last", "2", r"\boxed{1}, \boxed{2}"),
        ("thoughts=none", "4", r"<think>\boxed{4}"),
    ],
)
def test_policies_are_off_until_asked_for(option, gold, text):
    verifier = build_verifier("math", dict([option.split("=")]))
    assert verifier(Case(text, gold)).outcome == "correct"
    if option != "decimal=either" or gold != "1234":
        assert MathVerifier()(Case(text, gold)).outcome != "correct"


@pytest.mark.parametrize(
    "option, gold, text",
    [
        ("percent=value", "28", r"\boxed{28 \%}"),
        ("units=spaced", "15", r"\boxed{15cm}"),
        ("units=ignore", "3", r"\boxed{3xy}"),
        ("units=ignore", "15", r"\boxed{16 cm}"),
        ("decimal=either", "(0,9)", r"\boxed{[0,9)}"),
        ("decimal=comma", "1234.5", r"\boxed{1,234.5}"),
        ("names=ignore", "AB=4, CD=5", r"\boxed{5, 4}"),
        ("digits=3", r"\pi", r"\boxed{3.15}"),
        ("digits=2", "2.67", r"\boxed{2.66}"),
        ("steps=last", "7=11a+c", r"\boxed{11a+c}"),
        ("boxes=near", "2", r"\boxed{1} paper and \boxed{2} bins"),
    ],
)
def test_policies_forgive_no_more_than_they_say(option, gold, text):
    assert build_verifier("math", dict([option.split("=")]))(Case(text, gold)).outcome != "correct"


FRACTIONS = st.fractions(-1000, 1000, max_denominator=60)
ROOTS = st.integers(2, 60)


@given(FRACTIONS, FRACTIONS)
@settings(max_examples=200, deadline=None)
def test_fractions_are_exact_in_every_spelling(gold, said):
    sign, top, bottom = "-" if said < 0 else "", abs(said.numerator), said.denominator
    spellings = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"{sign}\dfrac {{{top}}}{{{bottom}}}"]
    spellings += [f"{sign}{top // bottom} {top % bottom}/{bottom}"] if top % bottom and top > bottom else []
    for spelling in spellings:
        assert parse_number(spelling.replace("dfrac", "frac")) == said
        assert same_answer(f"{gold.numerator}/{gold.denominator}", spelling) is (gold == said)


@given(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=3), min_size=2, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_matrix_equals_itself_alone(rows, data):
    width = min(map(len, rows))
    rows = [row[:width] for row in rows]

    def spell(cells, end, separator):
        return r"\begin{pmatrix}" + end.join(separator.join(map(str, row)) for row in cells) + r"\end{pmatrix}"

    gold = spell(rows, r" \\ ", " & ")
    assert same_answer(gold, spell(rows, r"\\", "&")) is True
    other = data.draw(st.permutations(rows))
    assert same_answer(gold, spell(other, r"\\", "&")) is (other == rows)
    turned = [list(row) for row in zip(*rows, strict=True)]
    assert same_answer(gold, spell(turned, r"\\ ", " &")) is (turned == rows)


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=4, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_order_counts_in_tuples_and_not_in_lists(values, data):
    other = data.draw(st.permutations(values))
    assert same_answer(", ".join(map(str, values)), ", ".join(map(str, other))) is True
    assert same_answer(f"({', '.join(map(str, values))})", f"({','.join(map(str, other))})") is (values == other)
    assert same_answer(", ".join(map(str, values)), ", ".join(map(str, values[1:]))) is False


@given(ROOTS, ROOTS, st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_roots_and_powers_keep_their_size(inside, other, factor):
    gold = rf"{factor}\sqrt{{{inside}}}"
    assert same_answer(gold, rf"\sqrt{{{factor * factor * inside}}}") is True
    assert same_answer(gold, f"{factor}√{other}") is (inside == other)
    assert same_answer(rf"{factor} \cdot 10^{{-{inside * 20}}}", rf"{factor} \cdot 10^{{-{other * 20}}}") is (
        inside == other
    )


@given(st.text(alphabet="\\{}$^_0123456789.,-=<>()[]|&%±√½²xyn fracsqrtpmle", max_size=60))
@example(", .")
@example(":")
@settings(max_examples=400, deadline=None)
def test_no_answer_breaks_the_comparison(answer):
    for gold in ("5", "x<1", "(1,2]", r"\begin{pmatrix}1\\2\end{pmatrix}", "n=1,2"):
        assert same_answer(gold, answer, Policies(units="ignore", names="ignore", decimal="either")) in (
            True,
            False,
            None,
        )


def test_thirds_are_rounded_or_cut_and_nothing_else():
    for digits in range(1, 12):
        cut = Fraction(10**digits // 3, 10**digits)
        assert same_answer("1/3", str(float(cut))) is (digits >= 6)
        assert same_answer("1/3", f"0.{'3' * (digits - 1)}4") is False
        assert same_answer("2/3", f"0.{'6' * (digits - 1)}7") is (digits >= 6)


def joined(pair, how):
    """Two pairs of LaTeX and value as one: a sum, a product as people write it, a fraction, a power."""
    (left, a), (right, b) = pair
    if how == "frac":
        return (rf"\frac{{{left}}}{{{right}}}", a / b) if b else (left, a)
    if how == "power":
        return f"({left})^{{2}}", a * a
    forms = {
        "+": ("{} + ({})", a + b),
        "-": ("{} - ({})", a - b),
        "()()": ("({})({})", a * b),
        "cdot": (r"({}) \cdot ({})", a * b),
        "*": ("({})*({})", a * b),
    }
    form, value = forms[how]
    return form.format(left, right), value


CALCULATIONS = st.recursive(
    st.integers(0, 12).map(lambda n: (str(n), Fraction(n)))
    | st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(6, 9)).map(
        lambda t: (rf"{t[0]}\frac{{{t[1]}}}{{{t[2]}}}", t[0] + Fraction(t[1], t[2]))
    )
    | st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda t: (f"{t[0]}({t[1]})", Fraction(t[0] * t[1])))
    | st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)).map(
        lambda t: (rf"\frac{{{t[0]}}}{{{t[1]}}}({t[2]})", Fraction(t[0] * t[2], t[1]))
    ),
    lambda inner: st.builds(
        joined, st.tuples(inner, inner), st.sampled_from(["+", "-", "()()", "cdot", "*", "frac", "power"])
    ),
    max_leaves=5,
)


@given(CALCULATIONS, st.integers(-3, 3))
@settings(max_examples=150, deadline=None)
def test_calculations_have_the_value_that_people_read(calculation, off):
    text, value = calculation
    gold = value + off
    assert same_answer(f"{gold.numerator}/{gold.denominator}", text) is (off == 0)
