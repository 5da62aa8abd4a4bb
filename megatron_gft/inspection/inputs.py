"""Shards or group files behind one face for ``tools/inspect_groups.py``: ``verify``, ``report`` and ``groups``."""

import contextlib
import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_gft.errors import InputError, InputErrors
from megatron_gft.groups import GROUP_FILE_SUFFIXES, expand_inputs, read_all, read_chunks
from megatron_gft.groups.problems import KEEP, Problem
from megatron_gft.inspection.characters import LENIENT, CharacterEncoder
from megatron_gft.inspection.statistics import EXAMPLES_PER_KIND, Statistics
from megatron_gft.inspection.views import GroupView, view_group
from megatron_gft.preprocess.encode import ChunkEncoder
from megatron_gft.progress import ProgressBar, total_bytes
from megatron_gft.shards import GroupShard, check_sets, expand_shards, verify_shards
from megatron_gft.shards.manifest import manifest_path
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer

SHARD_FILE_SUFFIXES = (".bin", ".idx", ".npy")
PREPROCESSING_REPORT = ".report.ndjson"  # lies beside the shards; a glob that the shell expanded names it, too
GROUPS_PER_SLICE = 2048


def open_source(
    inputs: Sequence[str], tokenizer: str | None = None, chat_template: str | None = None, trust: bool = False
) -> "ShardSource | FileSource":
    """Group files when all inputs are named like them, else shards, which any of their files may stand for.

    Raises:
        InputError: missing inputs, both kinds at once, or no tokenizer where one is named.
    """
    inputs = [name for name in inputs if not name.endswith(PREPROCESSING_REPORT)] or inputs
    files = [name for name in inputs if _is_group_file(name)]
    shards = [name for name in inputs if name not in files]
    if not shards:
        loaded = None if tokenizer is None else load_tokenizer(tokenizer, chat_template, None, trust)
        return FileSource(expand_inputs(inputs), loaded)
    if files:
        raise InputError(f"{files[0]} and {shards[0]}: a group file and a shard at once -> inspect them one by one")
    prefixes = expand_shards(list(dict.fromkeys(map(_shard_prefix, shards))))
    # The template is already in the tokens of a shard.
    loaded = None if tokenizer is None else load_tokenizer(tokenizer, NO_TEMPLATE, False, trust)
    return ShardSource(prefixes, loaded)


def _is_group_file(name: str) -> bool:
    """By its name; a ``.json`` with tokens or an index beside it is a manifest, whatever became of its text."""
    if not name.endswith(".json"):
        return name.endswith((*GROUP_FILE_SUFFIXES, ".parquet"))
    if glob.has_magic(name) and not Path(name).exists():
        return bool(found := glob.glob(name)) and all(map(_is_group_file, found))
    return not any(Path(name).with_suffix(suffix).exists() for suffix in (".bin", ".idx"))


def _shard_prefix(name: str) -> str:
    """Prefix of a shard, of which ``name`` may be any file: a glob that the shell expanded names them all."""
    if not name.endswith(SHARD_FILE_SUFFIXES) or not Path(name).is_file():
        return name.removesuffix(".json")
    prefix = name
    while "." in Path(prefix).name.lstrip("."):
        prefix = prefix.rpartition(".")[0]
        if manifest_path(prefix).is_file():
            return prefix
    raise InputError(f"{name}: no manifest of a shard is beside it -> give prefixes of shards, in quotes with a glob")


def _no_such_group(number: int, total: int) -> InputError:
    numbers = f"there are groups 0 to {total - 1}" if total else "there is no usable group"
    return InputError(f"--group {number}: {numbers} -> see the report (without --group)")


class ShardSource:
    """Shards, opened when they are looked into; their groups are counted through."""

    def __init__(self, prefixes: Sequence[str], tokenizer: Tokenizer | None):
        self.prefixes, self.tokenizer = list(prefixes), tokenizer

    @contextlib.contextmanager
    def _opened(self) -> Iterator[list[GroupShard]]:
        """While what the shards hold is used: an exception that damaged bytes caused becomes what verification says."""
        shards = [GroupShard(prefix) for prefix in self.prefixes]
        for shard in shards:
            if (names := shard.manifest.logprob_files) and "sampled" not in names:
                shard.names = (min(names), None)
        try:
            yield shards
        except Exception as error:  # bytes out of range raise anything; where none is damaged, it is a bug of ours
            if error.__cause__ is not None or not isinstance(error, InputError):
                verify_shards(self.prefixes)
            raise

    def verify(self) -> list[str]:
        """Check every byte; the prefixes of what was checked."""
        verify_shards(self.prefixes)
        return self.prefixes

    def report(self, max_tokens_per_pack: int | None = None, groups_per_step: int = 128) -> dict[str, Any]:
        """Statistics and problems (JSON object).

        Raises:
            InputError: a shard is missing or damaged, or the shards are of different tokenizers.
        """
        with self._opened() as shards:
            stamps = {shard.manifest.tokenizer.fingerprint: shard for shard in shards}
            if len(stamps) > 1:
                names = ", ".join(shard.prefix for shard in stamps.values())
                raise InputError(f"{names}: of different tokenizers -> inspect them one by one")
            stamp = shards[0].manifest.tokenizer
            statistics = Statistics(stamp.eos_id, stamp.bos_id)
            with ProgressBar(None, "reading", total=sum(map(len, shards)), unit="group", leave=False) as bar:
                for shard in shards:
                    for first in range(0, len(shard), GROUPS_PER_SLICE):
                        statistics.add(groups := shard.encoded(first, first + GROUPS_PER_SLICE), shard.prefix)
                        bar.update(len(groups))
            return statistics.report("tokens", max_tokens_per_pack, groups_per_step) | {
                "problems": dict(sorted(statistics.problems.items())),
                "examples": statistics.examples,
                "inputs": [shard.prefix for shard in shards],
                "incomplete_sets": _incomplete_sets(shards),
                "tokenizer": stamp.model_dump(),
                "shards": [
                    {
                        "prefix": shard.prefix,
                        "groups": len(shard),
                        "fingerprint": shard.manifest.fingerprint,
                        "verifier": shard.manifest.judgement.verifier,
                        "provenance": shard.manifest.provenance,
                    }
                    for shard in shards
                ],
            }

    def groups(self, numbers: Sequence[int]) -> list[GroupView]:
        """Groups by number, decoded; numbers count what the report counts, from 0."""
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer, the one that made the shard")
        with self._opened() as shards:
            return [self._group(shards, number, self.tokenizer) for number in numbers]

    def first(self, count: int) -> list[GroupView]:
        """So many groups, or all; none without the tokenizer."""
        return self.groups(range(min(count, sum(self._sizes())))) if self.tokenizer else []

    def _sizes(self) -> list[int]:
        with self._opened() as shards:
            return [*map(len, shards)]

    @staticmethod
    def _group(shards: Sequence[GroupShard], number: int, tokenizer: Tokenizer) -> GroupView:
        total = sum(map(len, shards))
        if not 0 <= number < total:
            raise _no_such_group(number, total)
        for shard in shards:
            if number < len(shard):
                break
            number -= len(shard)
        if shard.manifest.tokenizer.fingerprint != tokenizer.fingerprint:
            raise InputError(f"{shard.prefix}: made with another tokenizer than {tokenizer.path} -> give that one")
        id_ = shard.meta(number)["id"]
        title = f"{shard.prefix} group {number}, id {id_}{_changes(_reported(shard.prefix, id_))}"
        groups, known = shard.encoded(number, number + 1), shard[number].logprobs
        groups.logprobs = None if known is None else np.concatenate(known)
        return view_group(groups, tokenizer, title, str(shard.names[0]))


def _reported(prefix: str, group_id: str) -> list[Problem]:
    """What preprocessing found of a group; nothing where its report was not copied with the shard."""
    report = Path(f"{prefix}{PREPROCESSING_REPORT}")
    try:
        with open(report, "rb") as lines:
            return [found for found in (Problem(**json.loads(line)) for line in lines) if found.id == group_id]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{report}: cannot be read ({error}) -> remove it, or preprocess again") from error


def _changes(problems: Iterable[Problem]) -> str:
    changed = [problem for problem in problems if problem.action != KEEP]
    return "".join(f"; {problem.action}: {str(problem).partition(f'{problem.id!r} ')[2]}" for problem in changed)


def _incomplete_sets(shards: Sequence[GroupShard]) -> list[str]:
    """One shard of several may be looked at alone; the report says that it is not all."""
    try:
        check_sets((shard.prefix, shard.manifest) for shard in shards)
        return []
    except InputErrors as error:
        return error.problems


class FileSource:
    """Group files; lengths are in tokens with a tokenizer, in characters without."""

    def __init__(self, files: Sequence[str], tokenizer: Tokenizer | None):
        self.files, self.tokenizer = list(files), tokenizer

    def verify(self) -> list[str]:
        raise InputError("--verify: group files have no manifest to compare with -> give shards")

    def report(self, max_tokens_per_pack: int | None = None, groups_per_step: int = 128) -> dict[str, Any]:
        """Statistics and problems (JSON object); bad rows are counted, not raised."""
        encoder = self._encoder()
        statistics = Statistics(encoder.tokenizer.eos_id, encoder.tokenizer.bos_id)
        problems: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        for kind, detail in encoder.tokenizer.problems():
            problems[kind], examples[kind] = 1, [detail]
        with ProgressBar(None, "reading", total=total_bytes(self.files), unit="B", leave=False) as bar:
            for chunk in read_all(self.files, bar):
                bar.update(0)
                encoded = encoder.encode(chunk)
                statistics.add(encoded.groups, chunk.path)
                for problem in encoded.problems:
                    problems[problem.kind] += 1
                    if problems[problem.kind] <= EXAMPLES_PER_KIND:
                        examples.setdefault(problem.kind, []).append(str(problem))
        if statistics.problems["duplicate_id"]:  # seen over all chunks; the encoder sees one at a time
            problems["duplicate_id"] = statistics.problems["duplicate_id"]
            examples["duplicate_id"] = statistics.examples["duplicate_id"]
        unit = "characters" if self.tokenizer is None else "tokens"
        return statistics.report(unit, max_tokens_per_pack, groups_per_step) | {
            "problems": dict(sorted(problems.items())),
            "examples": examples,
            "inputs": self.files,
        }

    def groups(self, numbers: Sequence[int]) -> list[GroupView]:
        """As of shards, in one pass: only the encoder knows which rows become groups, so all before are encoded."""
        if self.tokenizer is None:
            raise InputError("--group needs --tokenizer, to tokenize the group")
        views, total = self._views(numbers)
        for number in numbers:
            if number not in views:
                raise _no_such_group(number, total)
        return [views[number] for number in numbers]

    def first(self, count: int) -> list[GroupView]:
        """So many groups, or all; without a tokenizer as whole texts."""
        return [*self._views(range(count))[0].values()]

    def _views(self, numbers: Sequence[int]) -> tuple[dict[int, GroupView], int]:
        """Those of the groups that are there, and how many groups were seen."""
        encoder = self._encoder()
        views: dict[int, GroupView] = {}
        total = 0
        for chunk in (chunk for name in self.files for chunk in read_chunks(name)):
            encoded = encoder.encode(chunk)
            for number in numbers:
                if total <= number < total + len(encoded.groups):
                    origin = encoded.origins[number - total]
                    group = encoded.groups.select(np.arange(len(encoded.groups)) == number - total)
                    own = (problem for problem in encoded.problems if problem.place == origin.place)
                    title = f"{origin.place} group {number}, id {origin.id}{_changes(own)}"
                    views[number] = view_group(group, encoder.tokenizer, title)
            total += len(encoded.groups)
            if len(views) == len(set(numbers)):
                break
        return views, total

    def _encoder(self) -> ChunkEncoder:
        return CharacterEncoder() if self.tokenizer is None else ChunkEncoder(self.tokenizer, LENIENT)
