"""Options of the tools reach the settings that are called like them: none is dropped in silence."""

import dataclasses
import importlib
import shlex

import pytest

import megatron_gft.evaluation.run
import megatron_gft.preprocess.run
import megatron_gft.scoring.score
from megatron_gft.commands.options import part
from megatron_gft.errors import InputError

VERIFIER = "--option tolerance=1 --workers 3 --time-limit 5 --verifier"
CASES = {
    "preprocess": (
        megatron_gft.preprocess.run,
        "preprocess",
        "--input a --tokenizer t --output-prefix p --chat-template none --trust-remote-code --template-kwargs a=1 "
        "--no-bos --model m --workers 3 --policy truncated=drop --max-prompt-tokens 5 --max-response-tokens 6 "
        "--append --part 2/3 --max-groups-per-shard 7 --max-mib-per-shard 8",
        {"rows_per_chunk"},
    ),
    "score": (
        megatron_gft.scoring.score,
        "score_group_file",
        f"--input {{file}} --output o {VERIFIER} m:f --reward wrong=-1 --missing-answer null --memory-limit 2",
        set(),
    ),
    "evaluate": (
        megatron_gft.evaluation.run,
        "evaluate",
        f"--model m --problems p --no-greedy --no-reference --samples 4 --pass-at 2 --temperature 0.5 --top-p 0.5 "
        f"--max-tokens 7 --stop X --seed 3 --batch-size 2 --reference-column c --template-kwargs a=1 {VERIFIER} m:f",
        {"memory_limit_gib", "rewards", "missing_answer"},
    ),
}


class Taken(Exception):
    """Ends a tool where its work would begin."""


@pytest.mark.parametrize("name", CASES)
def test_every_setting_has_an_option(tmp_path, monkeypatch, name):
    module, function, text, without = CASES[name]
    (tmp_path / "groups.jsonl").touch()
    seen = []

    def take(*given, **others):
        seen.extend(value for value in (*given, *others.values()) if dataclasses.is_dataclass(value))
        raise Taken

    monkeypatch.setattr(module, function, take)
    with pytest.raises(Taken):
        importlib.import_module(f"megatron_gft.commands.{name}").main(
            shlex.split(text.format(file=tmp_path / "groups.jsonl"))
        )
    settings = [one for one in seen if type(one).__name__.endswith("Options")]
    settings += [inner for one in settings for inner in vars(one).values() if type(inner).__name__ == "ScoringOptions"]
    left = {
        field.name
        for one in settings
        for field in dataclasses.fields(one)
        if getattr(one, field.name) == default(field)
    }
    assert settings and left == without


def default(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "-1/2", "1/2/3", ""])
def test_a_part_that_is_none_is_refused(text):
    assert part("2/3") == (2, 3)
    with pytest.raises(InputError, match="I/N"):
        part(text)
