"""Kinds of bad input in group data, the policy of each, and the record of what was done.

Nothing is silent: each problem that is found becomes one :class:`Problem` with place, id and reason. The policy of
its kind says what happens to the data:

    error   stop with a message that lists the problems of the same chunk
    drop    leave out the group or the response (the kind says which)
    fix     repair it (the kind says how)
    keep    use it as it is, only counted
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from megatron_gft.errors import nearest, refuse

ERROR, DROP, FIX, KEEP = "error", "drop", "fix", "keep"
Found = Callable[..., str]  # notes a problem of one group; see ProblemLog.of_group


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of bad input; its ways are the policies that it may have, the default first."""

    meaning: str
    ways: str
    drops: str = "group"  # what `drop` leaves out: "group" or "response"
    fix: str = ""  # what `fix` does

    @property
    def choices(self) -> list[str]:
        return sorted(self.ways.split(), key=(ERROR, DROP, FIX, KEEP).index)


KINDS: dict[str, Kind] = {
    "invalid_json": Kind("the line is not a JSON object", "error drop"),
    "invalid_utf8": Kind("bytes or escapes that are not Unicode text", "error drop fix", fix="replace them by U+FFFD"),
    "wrong_type": Kind("a field has another type or value than the format says", "error drop"),
    "missing_field": Kind("a required field is absent", "error drop"),
    "empty_prompt": Kind("the prompt has no text", "error drop"),
    "empty_response": Kind("a response has no text", "error drop", "response"),
    "no_responses": Kind("the group has no response", "error drop"),
    "nonfinite_reward": Kind(
        "reward is NaN, infinite or beyond float32", "error drop fix", "response", "set it to null"
    ),
    "unknown_source": Kind("source is none of expert, teacher, self", "error drop", "response"),
    "duplicate_id": Kind("the id was seen before", "error drop fix", fix="append #2, #3, ... to the id"),
    "duplicate_response": Kind("the same text, or token_ids without text, twice", "keep error drop", "response"),
    "truncated": Kind("finish_reason is length: the response has no EOS", "keep error drop", "response"),
    "no_expert": Kind("no response of the group is an expert's", "keep error drop"),
    "equal_rewards": Kind("all rewards are equal: the group has no advantage", "keep error drop"),
    "expert_wrong": Kind(
        "the verifier judged an expert response wrong", "keep error drop fix", "response", "set its reward to 1"
    ),
    "long_prompt": Kind("the prompt has more tokens than max_prompt_tokens", "error drop"),
    "long_response": Kind(
        "a response has more tokens than max_response_tokens", "error drop fix", "response", "cut it, without EOS"
    ),
    "special_tokens": Kind(
        "a text spells a special token (EOS, a second BOS, a role marker, ...), or token_ids hold one; "
        "drop of a prompt drops its group",
        "error drop fix keep",
        "response",
        "a prompt loses it, a response loses a final EOS and the rest becomes ordinary text, in place of such "
        "token_ids too; keep: encode as special tokens",
    ),
    "template_failed": Kind("the chat template cannot render this prompt, its tools or its kwargs", "error drop"),
    "lost_prompt": Kind("the chat template leaves out text of the prompt", "error drop keep"),
    "bad_template": Kind(
        "the chat template ignores add_generation_prompt, or has a byte-order mark", "error keep", "nothing"
    ),
    "turn_end": Kind(
        "the chat template ends turns with another token than the tokenizer's EOS", "error keep", "nothing"
    ),
    "tokenizer_class": Kind(
        "the class that transformers chose gives other tokens than tokenizer.json", "error keep", "nothing"
    ),
    "thoughts_twice": Kind(
        "the rendered prompt opens thoughts and the response opens them again",
        "error drop fix keep",
        "response",
        "the response loses its opening tag",
    ),
    "thoughts_open": Kind(
        "the rendered prompt opens thoughts, which a finished response never closes", "error drop keep", "response"
    ),
    "other_rendering": Kind(
        "the response was sampled after a prompt with other tools or template kwargs, or, of source self, with "
        "another template or tokenizer",
        "error drop keep",
        "response",
    ),
    "bad_token_ids": Kind(
        "token_ids outside of the vocabulary, or with BOS or EOS inside",
        "error drop fix",
        "response",
        "tokenize the text instead, without log-probs",
    ),
    "bad_logprobs": Kind(
        "logprobs do not match token_ids one to one, have none, or are not finite and <= 0",
        "error drop fix",
        "response",
        "leave them out",
    ),
    "foreign_rendering": Kind(
        "an expert's or teacher's prompt was rendered by another template or tokenizer", "keep error drop", "response"
    ),
    "unverified_rendering": Kind(
        "of source self, from a chat server whose template is not known and which gave no prompt_token_ids",
        "keep error drop",
        "response",
    ),
    "mismatched_token_ids": Kind(
        "token_ids spell something else than the text: the text is tokenized, log-probs are left out",
        "keep error drop",
        "response",
    ),
    "foreign_token_ids": Kind(
        "token_ids of another or an unknown tokenizer: the text is tokenized, log-probs are left out",
        "keep error drop",
        "response",
    ),
}
DEFAULT_POLICIES: dict[str, str] = {name: kind.ways.partition(" ")[0] for name, kind in KINDS.items()}
_ALIASES = {"truncate": FIX}  # `long_response=truncate` reads better than `fix`


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: where, what, and what was done with it."""

    kind: str
    action: str
    place: str
    id: str | None
    detail: str
    response: int | None = None  # position in the group's list of responses as read

    def __str__(self) -> str:
        where = "" if self.id is None else f" id {self.id!r}"
        which = "" if self.response is None else f" response {self.response}"
        return f"{self.place}:{where}{which} {self.kind}: {self.detail}"


class ProblemLog:
    """Applies the policies (kind -> policy; kinds not named keep their default) and keeps every finding, in order."""

    def __init__(self, policies: Mapping[str, str] | None = None):
        self.policies = {**DEFAULT_POLICIES, **(policies or {})}
        self.problems: list[Problem] = []

    def found(self, place: str, group_id: str | None, kind: str, detail: str, response: int | None = None) -> str:
        """Note one problem and return what to do with the data: ``error``, ``drop``, ``fix`` or ``keep``."""
        action = self.policies[kind]
        self.problems.append(Problem(kind, action, place, group_id, detail, response))
        return action

    def of_group(self, place: str, group_id: str) -> Found:
        """:meth:`found` for one group: ``(kind, detail, response)``."""
        return functools.partial(self.found, place, group_id)

    def take(self) -> list[Problem]:
        """Hand over the findings so far and forget them."""
        taken, self.problems = self.problems, []
        return taken


def problem_table(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """Counts of findings by kind and action as ``{kind: {action: count}}``, sorted."""
    table: dict[str, dict[str, int]] = {}
    for (kind, action), count in sorted(counts.items()):
        table.setdefault(kind, {})[action] = count
    return table


def parse_policies(settings: Sequence[str]) -> dict[str, str]:
    """``["long_response=truncate", "equal_rewards=drop"]`` -> policies of all kinds.

    Raises:
        InputErrors: unknown kind (names the nearest), or a policy that the kind does not have.
    """
    policies = dict(DEFAULT_POLICIES)
    wrong = []
    for setting in settings:
        name, _, policy = setting.partition("=")
        policy = _ALIASES.get(policy, policy)
        if name not in KINDS:
            near = nearest(name, KINDS)
            hint = f"did you mean {near!r}?" if near else f"kinds: {', '.join(KINDS)}"
            wrong.append(f"unknown kind of problem {name!r} -> {hint}")
        elif policy not in KINDS[name].choices:
            wrong.append(f"{name}={policy!r} -> set one of {', '.join(KINDS[name].choices)}")
        else:
            policies[name] = policy
    refuse("bad policies", wrong)
    return policies


def raise_errors(problems: Iterable[Problem]) -> None:
    """Raise InputErrors with the first problems whose policy says ``error``, and the way out of each."""
    lines = []
    for found in (problem for problem in problems if problem.action == ERROR):
        ways_out = "|".join(choice for choice in KINDS[found.kind].choices if choice != ERROR)
        lines.append(f"{found} -> correct it, or set {found.kind}={ways_out}")
    refuse("bad group data", lines, shown=20)


def report_lines(problems: Iterable[Problem]) -> str:
    """JSON lines of everything that changed the data (``keep`` is only counted)."""
    changed = (p for p in problems if p.action != KEEP)
    return "".join(json.dumps(asdict(p), ensure_ascii=True) + "\n" for p in changed)


def describe_kinds() -> str:
    """Table of kinds, choices (default first) and meanings for ``--help``."""
    rows = []
    for name, kind in KINDS.items():
        choices = kind.ways.replace(" ", "|")
        fix = f"; fix: {kind.fix}" if kind.fix else ""
        rows.append(f"  {name:20} {choices:22} {kind.meaning} (drops the {kind.drops}{fix})")
    return "\n".join(rows)
