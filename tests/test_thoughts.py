"""Thoughts: only what follows them is judged, whoever wrote the tags; thoughts that never end hold no answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.scoring.thoughts import TAGS, after_thoughts, unfit_thoughts
from megatron_gft.scoring.verifiers import Case, ChoiceVerifier, ExactVerifier, MathVerifier, build_verifier

OPENING_CLOSING = sorted({pair for name, pair in TAGS.items() if name != "gpt-oss"})
HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


def judge(response, answer="4", prompt="", **options):
    return MathVerifier(**options)(Case(response, answer, prompt)).outcome


@pytest.mark.parametrize("opening, closing", OPENING_CLOSING)
@pytest.mark.parametrize("inside", [r"\boxed{4}", "#### 4", "The answer is 4.", "so 4"])
def test_only_what_follows_the_thoughts_is_judged(opening, closing, inside):
    for tags in ("all", f"{opening}...{closing}"):
        assert judge(f"{opening}{inside}", thoughts=tags) == "unparsed"
        assert judge(f"{opening}{inside}{closing}", thoughts=tags) == "unparsed"
        assert judge(f"{opening}{inside}{closing}\n\\boxed{{5}}", thoughts=tags) == "wrong"
        assert judge(f"{opening}5{closing}\n{inside}", thoughts=tags) == "correct"
        assert judge(f"5{closing}{inside}", thoughts=tags) == "correct"  # opened by the prompt
        assert judge(f"{opening}5{closing}{inside}{opening}hm", thoughts=tags) == "unparsed"
        assert judge(f"{opening}{opening}4{closing} 5{closing} {inside}", thoughts=tags) == "correct"
    assert judge(f"{opening}{inside}", thoughts="none") == "correct"


@pytest.mark.parametrize(
    "response, outcome",
    [
        (HARMONY.format(r"\boxed{4}", "It is 5."), "wrong"),
        (HARMONY.format(r"\boxed{5}", "It is 4."), "correct"),
        (r"<|channel|>analysis<|message|>so \boxed{4}", "unparsed"),
        (r"<|channel|>analysis<|message|>5<|end|><|start|>assistant<|channel|>commentary<|message|>4", "unparsed"),
        (HARMONY.format("5", "4") + "<|start|>user<|message|>5", "correct"),
        ("analysisWe add. 5.assistantfinalIt is 4.", "correct"),
        ("analysisWe add. It is 4.", "unparsed"),
        ("analysis shows that it is 4.", "correct"),
    ],
)
def test_channels(response, outcome):
    assert judge(response) == judge(response, thoughts="gpt-oss") == outcome


@pytest.mark.parametrize("spell", [str.upper, str.title, lambda tag: f"{tag[0]} {tag[1:-1]} {tag[-1]}"])
@pytest.mark.parametrize("opening, closing", OPENING_CLOSING)
def test_tags_as_models_misspell_them(spell, opening, closing):
    opening, closing = spell(opening), spell(closing)
    assert judge(f"{opening}4") == judge("4", prompt=f"1+3? {opening}\n") == "unparsed"
    assert judge(f"{opening}4{closing} so 5") == "wrong"
    assert judge(f"5 {closing} so 4", prompt=f"1+3? {opening}") == "correct"
    assert unfit_thoughts(f"1+3? {opening}\n", f" {opening}3{closing}4") == "thoughts_twice"
    assert unfit_thoughts(f"1+3? {opening}\n", f"3{closing}4") is None
    assert unfit_thoughts(f"1+3? {opening}\n", "4") == "thoughts_open"


def test_a_prompt_may_open_the_thoughts():
    for prompt in ("1+3?<think>\n", [{"role": "user", "content": "1+3?"}, {"role": "assistant", "content": "<think>"}]):
        assert judge("so 4", prompt=prompt) == "unparsed"
        assert judge("so 5</think> It is 4", prompt=prompt) == "correct"
    assert judge("so 4", prompt="What does <think> mean?") == "correct"
    assert judge("so 4", prompt=[]) == "correct"


def test_the_other_verifiers_skip_thoughts_too():
    assert ExactVerifier()(Case("<think>yes</think>\nno\n", "no")).outcome == "correct"
    assert ExactVerifier()(Case("<think>no", "no")).outcome == "unparsed"
    assert ExactVerifier(part="answer")(Case(r"[THINK]\boxed{a}[/THINK]\boxed{b}", "b")).outcome == "correct"
    assert ChoiceVerifier()(Case("<think>The answer is A.</think>(B)", "B")).outcome == "correct"
    assert ChoiceVerifier()(Case("<think>The answer is B.", "B")).outcome == "unparsed"


@pytest.mark.parametrize("value", ["qwn", "a...", "...b", "a...b...c", ""])
def test_unknown_tags_are_refused_before_anything_is_judged(value):
    with pytest.raises((InputError, InputErrors), match="thoughts="):
        build_verifier("math", {"thoughts": value})


def test_some_families():
    assert after_thoughts("<think>a</think>b", "mistral") == "<think>a</think>b"
    assert after_thoughts("[THINK]a[/THINK]b", "qwen, mistral") == "b"


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "x", " ", "4"]), max_size=12))
@settings(max_examples=300, deadline=None)
def test_what_is_left_holds_no_tag(pieces):
    said = after_thoughts("".join(pieces))
    assert said is None or ("think" not in said.lower() and "".join(pieces).endswith(said))
