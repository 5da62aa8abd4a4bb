"""Countdown with three numbers, in characters: ``3,7,4>25:`` is answered by ``7*3=21,21+4=25``.

Every number is used once, in two steps. There are two ways to write the same steps: the common one, and a rare one
(``7*3>21;21+4>25``) that experts use. A side skill, to see what is forgotten: ``12,3,7<:`` is answered by ``3,7,12``.

Its verifier is ``--verifier examples.study.countdown:judge``.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gft.scoring.verifiers import Case

CHARACTERS = "0123456789+-*=,;<>:"
END = "<end>"
LARGEST, LARGEST_OF_ALL = 12, 19  # numbers of the study's problems; of those "with a larger number"
LARGEST_TARGET = 99
# Which problems are for what, by a hash of numbers and target: no problem is in two of these.
SHARES = {"valid": range(0, 10), "test": range(10, 30), "tune": range(30, 50), "pretrain": range(50, 100)}
STEP = re.compile(r"(\d+)([-+*])(\d+)[=>](\d+)")
STYLES = {"common": "=,", "rare": ">;"}

Step = tuple[int, str, int, int]


@dataclass(frozen=True)
class Problem:
    """Three numbers in the order of the prompt, and the number to make of them."""

    numbers: tuple[int, int, int]
    target: int

    @property
    def prompt(self) -> str:
        return f"{','.join(map(str, self.numbers))}>{self.target}:"


def apply(a: int, sign: str, b: int) -> int:
    """a sign b."""
    return a + b if sign == "+" else a - b if sign == "-" else a * b


def ways(numbers: tuple[int, ...]) -> Iterator[list[Step]]:
    """All pairs of steps without a negative result."""
    for i, j in ((i, j) for i in range(3) for j in range(3) if i != j):
        (rest,) = {0, 1, 2} - {i, j}
        for first in "+-*":
            middle = apply(numbers[i], first, numbers[j])
            for a, b in ((middle, numbers[rest]), (numbers[rest], middle)):
                for second in "+-*":
                    if middle >= 0 and apply(a, second, b) >= 0:
                        yield [(numbers[i], first, numbers[j], middle), (a, second, b, apply(a, second, b))]


def written(steps: list[Step], style: str = "common") -> str:
    """The steps as text, in one of ``STYLES``."""
    equals, then = STYLES[style]
    return then.join(f"{a}{sign}{b}{equals}{result}" for a, sign, b, result in steps)


def share_of(numbers: tuple[int, ...], target: int) -> str:
    """What a problem is for, whatever the order of its numbers."""
    digest = hashlib.sha256(f"{sorted(numbers)}{target}".encode()).digest()
    return next(name for name, range_ in SHARES.items() if int.from_bytes(digest[:4], "little") % 100 in range_)


def draw(
    rng: random.Random, share: str, *, larger: bool = False, least_ways: int = 1
) -> tuple[Problem, list[list[Step]], list[list[Step]]]:
    """A random problem of a share, its right solutions (``least_ways`` or more), and all steps that miss the target."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(3))
        if larger:
            numbers = (*numbers[:2], rng.randint(LARGEST + 1, LARGEST_OF_ALL))
        chosen = tuple(rng.sample(numbers, 3))
        found = list(ways(chosen))
        target = rng.choice(found)[1][3]
        if 1 <= target <= LARGEST_TARGET and share_of(chosen, target) == share:
            right = [steps for steps in found if steps[1][3] == target]
            wrong = [steps for steps in found if steps[1][3] != target]
            if len(right) >= least_ways:
                return Problem(chosen, target), right, wrong


def side_skill(rng: random.Random) -> tuple[str, str]:
    """Prompt and answer: numbers to be put in order."""
    numbers = [rng.randint(1, LARGEST_OF_ALL) for _ in range(3)]
    return f"{','.join(map(str, numbers))}<:", ",".join(map(str, sorted(numbers)))


def is_right(prompt: str, response: str) -> bool:
    """Whether a response answers a prompt of either kind, in either style."""
    numbers, _, target = prompt.rstrip(":").replace("<", ">").partition(">")
    pool = sorted(map(int, numbers.split(",")))
    if not target:
        return response == ",".join(map(str, pool))
    steps = re.split("[,;]", response)
    for text in steps:
        match = STEP.fullmatch(text)
        if match is None or any(len(digits) > 6 for digits in match.groups()):
            return False
        a, b, result = int(match[1]), int(match[3]), int(match[4])
        for number in (a, b):
            if number not in pool:
                return False
            pool.remove(number)
        if apply(a, match[2], b) != result:
            return False
        pool.append(result)
    return pool == [int(target)]


def judge(case: Case) -> bool:
    """The verifier ``countdown:judge``."""
    return is_right(str(case.prompt), case.response)


def pretraining_rows(count: int, seed: int, *, right: float, rare: float, side: float, larger: float) -> Iterator[dict]:
    """Rows of one response each: solutions of which a share is ``right``, a share ``rare``, and the side skill."""
    rng = random.Random(f"pretrain {seed}")
    for index in range(count):
        if rng.random() < side:
            prompt, text = side_skill(rng)
        else:
            problem, good, bad = draw(rng, "pretrain", larger=rng.random() < larger)
            steps = rng.choice(good if rng.random() < right or not bad else bad)
            prompt, text = problem.prompt, written(steps, "rare" if rng.random() < rare else "common")
        yield group_row(f"p{index}", prompt, [("expert", text)])


def group_row(name: str, prompt: str, responses: list[tuple[str, str]], **fields: Any) -> dict[str, Any]:
    """A row of a group file; rewards are the verifier's."""
    judged = [
        {"text": text, "source": source, "reward": float(right), "outcome": "correct" if right else "wrong"}
        for source, text in responses
        for right in [is_right(prompt, text)]
    ]
    return {"id": name, "prompt": prompt, "responses": judged, **fields}


def problem_rows(
    share: str,
    count: int,
    seed: int,
    *,
    teachers: int = 0,
    right: float = 0.9,
    larger: bool = False,
    least_ways: int = 1,
) -> list[dict[str, Any]]:
    """Different problems, each with an expert's solution and those of teachers, of whom a share is right."""
    rng = random.Random(f"{share} {larger} {seed}")
    rows: dict[Problem, dict[str, Any]] = {}
    while len(rows) < count:
        problem, good, bad = draw(rng, share, larger=larger, least_ways=least_ways)
        texts = [("expert", written(rng.choice(good), "rare"))]
        texts += [
            ("teacher", written(rng.choice(good if rng.random() < right or not bad else bad))) for _ in range(teachers)
        ]
        rows.setdefault(problem, group_row(f"{share}{'-larger' if larger else ''}-{len(rows)}", problem.prompt, texts))
    return list(rows.values())


def write_rows(path: Path, rows: Iterator[dict] | list[dict]) -> Path:
    """A group file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def model_folder(folder: Path, *, hidden: int, layers: int) -> Path:
    """A Hugging Face folder without weights: a Llama's config.json, and a tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    names = {name: index for index, name in enumerate([END, *CHARACTERS])}
    backend = Tokenizer(models.BPE(names, []))
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(folder)
    LlamaConfig(
        vocab_size=len(names),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    ).save_pretrained(folder)
    return folder
