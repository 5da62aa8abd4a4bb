"""Rewards and outcomes for the responses of group files and of existing shards.

``score_group_file`` reads groups as text and writes them with reward and outcome; ``score_shard`` decodes the
responses of a shard and adds a sidecar, leaving tokens alone. How they are judged: :mod:`megatron_gft.scoring.judging`.

While a run lasts, verdicts go into a journal beside the output or the shard, so that a killed run continues. It is
removed when the output is complete, and when it would hold no verdict. A shard's journal is named after what judges.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.atomic import sha256_json
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import GROUP_FILE_SUFFIXES, SOURCES, GroupRecord, iter_group_file, write_group_file
from megatron_gft.scoring.judging import (
    JudgedGroup,
    ScoreSummary,
    ScoringOptions,
    journal_key,
    judge_groups,
    open_journal,
)
from megatron_gft.scoring.verifiers import Case, Verdict
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer

CONTEXT_TOKENS = (8, 32, 128)  # of a prompt, to decode a response after


def score_group_file(
    inputs: Sequence[str | Path], output: str | Path, options: ScoringOptions, *, progress: bool = True
) -> ScoreSummary:
    """Judge every response of group files; write one group file with rewards and outcomes, whole or not at all.

    What judged a group is recorded in its ``meta["verifier"]``, from where it goes into the manifest of a shard; what
    stands there and is not from here moves to ``meta["verifier_before"]``.

    Raises:
        InputError: a line that is not a group, a missing gold answer, a bad verifier, an input named twice, an output
            that is an input or cannot be written.
    """
    output = Path(output)
    _check_files(inputs, output)
    summary = ScoreSummary()
    with options.pool() as pool:  # first: a verifier that does not work leaves nothing behind
        description = options.description()
        with open_journal(output.with_name(output.name + ".journal"), description) as journal:
            for left in output.parent.glob(f".{glob.escape(output.name)}.tmp-*"):  # by killed runs: we hold the lock
                left.unlink(missing_ok=True)
            judged = judge_groups(_file_groups(inputs, options), options, pool, journal, summary, progress)
            try:
                write_group_file(output, _with_verdicts(judged, options, description, summary))
            except OSError as error:
                raise InputError(
                    f"{output}: cannot be written ({error.strerror or error}) -> see to the place and its space, then "
                    "run again: verdicts are kept"
                ) from error
    return summary


def _check_files(inputs: Sequence[str | Path], output: Path) -> None:
    problems = []
    if not output.name.endswith(GROUP_FILE_SUFFIXES):
        problems.append(f"{output}: unknown kind of group file -> use {', '.join(GROUP_FILE_SUFFIXES)}")
    if output.is_dir():
        problems.append(f"{output}: is a folder -> choose another output")
    named: dict[Path, str | Path] = {}
    for path in inputs:
        real = Path(path).resolve()
        if real == output.resolve():
            problems.append(f"{output}: is an input too -> choose another output")
        if real in named:
            problems.append(f"{path}: input named twice (as {named[real]} before) -> name each file once")
        named[real] = path
    if problems:
        raise InputErrors("cannot begin", problems)


def _file_groups(inputs: Sequence[str | Path], options: ScoringOptions) -> Iterator[JudgedGroup[GroupRecord]]:
    for path in inputs:
        for record, place in iter_group_file(path):
            can_judge = options.can_judge(record.answer)
            if not can_judge and options.missing_answer == "error":
                raise InputError(
                    f"{place}: group {record.id!r} has no gold answer -> give one, set --missing-answer null, or use "
                    "a verifier that needs none"
                )
            texts = [response.text for response in record.responses]
            key = journal_key(record.id, [record.answer, record.prompt, record.meta, texts]) if can_judge else ""
            cases = [Case(text, record.answer, record.prompt, record.meta) for text in texts]
            yield JudgedGroup(record, f"{place} id {record.id!r}", key, [r.source for r in record.responses], cases)


def _with_verdicts(
    judged: Iterable[tuple[GroupRecord, list[Verdict] | None]],
    options: ScoringOptions,
    description: dict[str, Any],
    summary: ScoreSummary,
) -> Iterator[GroupRecord]:
    for record, verdicts in judged:
        before = record.meta.pop("verifier", None)
        if before is not None and not (isinstance(before, dict) and before.keys() == description.keys()):
            record.meta["verifier_before"] = before
            summary.verifiers_moved += 1
        if verdicts is None:
            summary.rewards_removed += sum(response.reward is not None for response in record.responses)
            for response in record.responses:
                response.reward = response.outcome = None
        else:
            record.meta["verifier"] = description
            for response, verdict in zip(record.responses, verdicts, strict=True):
                response.outcome, response.reward = verdict.outcome, options.reward(verdict)
        yield record


# --- shards ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Problem:
    """What a group file adds to a group of a shard."""

    answer: str | None
    prompt: str | list[dict[str, Any]]
    meta: dict[str, Any]


def score_shard(
    prefix: str | Path,
    tokenizer: str | Path,
    options: ScoringOptions,
    *,
    groups: Sequence[str | Path] = (),
    progress: bool = True,
) -> ScoreSummary:
    """Judge the responses of an existing shard anew; adds a reward sidecar, which is then the one in force.

    Args:
        prefix: of the shard.
        tokenizer: the one that made it (checked); responses are decoded from their tokens.
        groups: group files that give prompts, ``meta`` and gold answers by id; without them the gold answer is the
            shard's and the prompt its decoded text.

    Raises:
        InputError: another tokenizer, a group that is in the shard but not in ``groups``, an id that stands for
            different groups there, or a missing gold answer.
    """
    from megatron_gft.shards import GroupShard, add_rewards_sidecar  # imports megatron and torch: seconds

    shard = GroupShard(prefix)
    text_of = load_tokenizer(tokenizer, NO_TEMPLATE)
    if text_of.fingerprint != shard.manifest.tokenizer.fingerprint:
        raise InputError(f"{prefix}: made by another tokenizer than {tokenizer} -> give that one")
    known = _problems_of(shard, groups, options)
    summary = ScoreSummary()
    rewards = np.full(shard.manifest.counts.responses, np.nan, dtype=np.float32)
    outcomes: list[str | None] = [None] * len(rewards)
    first = shard.response_offsets
    with options.pool() as pool:
        description = options.description()
        name = f"{Path(shard.prefix).name}.scoring-{sha256_json(description)[:12]}.journal"
        with open_journal(Path(shard.prefix).with_name(name), description) as journal:
            stream = _shard_groups(shard, text_of, known, options)
            for i, verdicts in judge_groups(stream, options, pool, journal, summary, progress, len(rewards)):
                for position, verdict in enumerate(verdicts or (), start=int(first[i])):
                    reward = options.reward(verdict)
                    rewards[position] = np.nan if reward is None else reward
                    outcomes[position] = verdict.outcome
            add_rewards_sidecar(prefix, rewards, outcomes=outcomes, verifier=description)
    return summary


def _problems_of(shard: Any, groups: Sequence[str | Path], options: ScoringOptions) -> dict[str, _Problem]:
    """What the group files say of the shard's groups, by id; nothing else of them is kept.

    Raises:
        InputErrors: see :func:`score_shard`.
    """
    answers = {meta["id"]: meta["answer"] for meta in map(shard.meta, range(len(shard)))}
    known: dict[str, _Problem] = {}
    for path in groups:
        for record, place in iter_group_file(path):
            problem = _Problem(record.answer, record.prompt, record.meta)
            if record.id in answers and known.setdefault(record.id, problem) != problem:
                raise InputError(
                    f"{place}: group {record.id!r} has another prompt, answer or meta than before -> ids must differ"
                )
    absent = [name for name in answers if name not in known]
    if groups and absent:
        raise InputError(
            f"{shard.prefix}: group {absent[0]!r} and {len(absent) - 1} more are in none of the group files"
        )
    answers |= {name: problem.answer for name, problem in known.items()}
    missing = [name for name, answer in answers.items() if not options.can_judge(answer)]
    if missing and options.missing_answer == "error":
        raise InputError(
            f"{shard.prefix}: group {missing[0]!r} and {len(missing) - 1} more have no gold answer -> give --groups, "
            "set --missing-answer null, or use a verifier that needs none"
        )
    return known


def _shard_groups(
    shard: Any, tokenizer: Tokenizer, known: Mapping[str, _Problem], options: ScoringOptions
) -> Iterator[JudgedGroup[int]]:
    for i in range(len(shard)):
        group, meta = shard[i], shard.meta(i)
        problem = known.get(meta["id"])
        answer = problem.answer if problem else meta["answer"]
        key = ""
        if options.can_judge(answer):
            said = [answer, problem and [problem.prompt, problem.meta], tokenizer.fingerprint]
            key = journal_key(str(i), said, group.prompt.tobytes(), *(ids.tobytes() for ids in group.responses))
        sources = [SOURCES[code] for code in group.sources]
        yield JudgedGroup(i, f"{shard.prefix} group {i}", key, sources, _decoded(group, answer, problem, tokenizer))


def _decoded(group: Any, answer: str | None, problem: _Problem | None, tokenizer: Tokenizer) -> Iterator[Case]:
    """The responses of a group of a shard as text, its end token left out."""
    prompt = group.prompt.tolist()
    text = tokenizer.decode(prompt)
    context = response_context(tokenizer, prompt, text)
    for response in group.responses:
        ids = response.tolist()
        said = tokenizer.decode_response(context, ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids)
        yield Case(said, answer, problem.prompt if problem else text, problem.meta if problem else {})


def response_context(tokenizer: Tokenizer, prompt: list[int], text: str) -> list[int]:
    """The end of a prompt after which responses decode as after all of it, for a fraction of the time.

    A response depends on its prompt only at the boundary: its leading space is dropped when no text is before it, and
    bytes may join. So the end must hold text, and spell what it spells within the prompt: no character is cut.

    Args:
        prompt: token ids.
        text: what they spell.
    """
    for size in CONTEXT_TOKENS:
        end = prompt[-size:]
        spelled = tokenizer.decode(end)
        ordinary = tokenizer.decode([id_ for id_ in end if id_ not in tokenizer.special_ids])
        if ordinary.strip() and "\ufffd" not in spelled and text.endswith(spelled):
            return end
    return prompt
