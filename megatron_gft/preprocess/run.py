"""Group files to group shards: streaming, several processes, the same bytes for any number of them.

    read rows in chunks -> workers: parse, check, render, tokenize -> in order: duplicates, shards -> publish

Memory is bounded by chunks in flight, 60 bytes per group id (for duplicates) and the index of the shard being
written: tokens, log-probs and the report go to the disk at once. See :mod:`megatron_gft.preprocess.staging` for what an
interruption leaves.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json

import megatron_gft
from megatron_gft.atomic import check_output, sha256_json, writing
from megatron_gft.errors import InputError, refuse
from megatron_gft.groups import BYTES_PER_CHUNK, RawChunk, expand_inputs, read_all
from megatron_gft.groups.problems import DEFAULT_POLICIES, FIX, Problem, ProblemLog, problem_table, raise_errors
from megatron_gft.groups.records import id_digest
from megatron_gft.hf.config_json import check_config
from megatron_gft.preprocess.encode import ChunkEncoder, EncodedChunk, tokenizer_problems
from megatron_gft.preprocess.staging import Staging, check_existing, existing_shards
from megatron_gft.preprocess.workers import OrderedWorkers
from megatron_gft.progress import ProgressBar, total_bytes
from megatron_gft.shards import GroupShard, GroupShardWriter, TokenizerStamp, tokenizer_stamp
from megatron_gft.shards.manifest import manifest_path
from megatron_gft.shards.writer import check_prefix
from megatron_gft.tokenizer import NO_TEMPLATE, load_tokenizer

MAX_LINEAGES = 100  # distinct (source, model, sampling) listed in a manifest


@dataclass(frozen=True)
class PreprocessOptions:
    """What to make of which files.

    Args:
        inputs: group files and globs.
        chat_template: file, ``"none"``, or None for the tokenizer's own.
        template_kwargs: of the chat template; without any, those that generation recorded.
        add_bos: with template ``none``; None does what the model expects.
        model: Hugging Face folder whose vocabulary must hold the tokenizer's ids; None skips the check.
        workers: processes that tokenize; 1 works in this process.
        max_prompt_tokens, max_response_tokens: limits; None = any length.
        part: ``(i, n)``: take every n-th row, the i-th of n (from 1), into shards ``PREFIX-part...``. Which rows
            depends on nothing but a file's name and the row's number; each manifest has the hash of all inputs.
        max_groups_per_shard, max_bytes_per_shard: a shard is closed before it exceeds one of them (bytes of tokens).
        rows_per_chunk: most rows of a chunk, the unit of work of a process (see ``groups.read_chunks``); it changes
            only where shards are cut.
    """

    inputs: Sequence[str]
    tokenizer: str
    output_prefix: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_bos: bool | None = None
    trust_remote_code: bool = False
    model: str | None = None
    workers: int = 1
    policies: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_POLICIES))
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    append: bool = False
    part: tuple[int, int] = (1, 1)
    max_groups_per_shard: int = 1_000_000
    max_bytes_per_shard: int = 4 << 30
    rows_per_chunk: int = 256


@dataclass(frozen=True)
class PreprocessSummary:
    """What came out; of a part of the input that has no group, nothing."""

    prefixes: list[str]
    report: str
    groups: int
    responses: int
    tokens: int
    unrewarded: int  # responses without a reward
    problems: dict[str, dict[str, int]]  # kind -> action -> count
    seconds: float


def preprocess(options: PreprocessOptions, *, progress: bool = True) -> PreprocessSummary:
    """Make group shards from group files, all or none of them readable.

    Raises:
        InputError: bad options, bad input under policy ``error``, an output that exists, nothing left to write (of
            all the input; a part may be empty), a disk that is full, a worker process that was killed.
    """
    started = time.monotonic()
    _check_options(options)
    files = expand_inputs(options.inputs)
    if options.workers > 1:  # whatever the user's setting: threads of the library would hang in forked processes
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prefix = output_prefix(options)
    tokenizer = load_tokenizer(options.tokenizer, options.chat_template, options.add_bos, options.trust_remote_code)
    stamp = tokenizer_stamp(tokenizer)
    _check_vocabulary(options, stamp)
    existing = existing_shards(prefix)
    if not Staging.waits_to_publish(prefix):
        check_existing(prefix, existing, options.append, stamp)
    found = tokenizer_problems(tokenizer, options.chat_template or options.tokenizer, options.policies)
    encoder = ChunkEncoder(
        tokenizer, options.policies, options.max_prompt_tokens, options.max_response_tokens, options.template_kwargs
    )
    with (
        writing(prefix, "finished shards are kept"),
        contextlib.closing(Staging(prefix, _plan(options, files, stamp), len(existing))) as staging,
    ):
        unwritten: dict[str, dict[str, int]] = {}  # problems of rows of which no shard was made
        if not staging.publishing:
            builder = _ShardBuilder(options, files, stamp, staging, existing[: staging.first_index])
            if not staging.done:
                builder.note(found)
            unwritten = _write_shards(builder, encoder, progress)
        report = str(staging.report_path)
        prefixes = staging.publish() if staging.publishing else []
    manifests = [GroupShard(name).manifest for name in prefixes]
    totals = Counter(groups=0, responses=0, tokens=0, unrewarded=0)
    for manifest in manifests:
        n = manifest.counts
        totals.update(groups=n.groups, responses=n.responses, tokens=n.prompt_tokens + n.response_tokens)
        totals.update(unrewarded=manifest.judgement.stats.missing)
    problems: Counter[tuple[str, str]] = Counter()
    for table in [*(manifest.provenance["problems"] for manifest in manifests), unwritten]:
        problems.update({(kind, action): n for kind in table for action, n in table[kind].items()})
    seconds = time.monotonic() - started
    return PreprocessSummary(prefixes, report, problems=problem_table(problems), seconds=seconds, **totals)


def output_prefix(options: PreprocessOptions) -> Path:
    """Prefix of the shards, with the part in its name when there are several."""
    part, parts = options.part
    return Path(options.output_prefix + (f"-part{part:05d}-of-{parts:05d}" if parts > 1 else ""))


def _check_options(options: PreprocessOptions) -> None:
    part, parts = options.part
    problems = list(_prefix_problems(options.output_prefix))
    if options.add_bos is not None and options.chat_template != NO_TEMPLATE:
        problems.append(f"BOS {options.add_bos} with a chat template, which spells BOS itself -> chat template none")
    if not 1 <= part <= parts:
        problems.append(f"part {part}/{parts} -> I/N with 1 <= I <= N")
    sizes = ("workers", "max_groups_per_shard", "max_bytes_per_shard", "rows_per_chunk")
    for name in (*sizes, "max_prompt_tokens", "max_response_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append(f"{name}={value} -> at least 1")
    refuse("bad options", problems)


def _prefix_problems(prefix: str) -> Iterator[str]:
    """What is wrong with the name of the shards."""
    if os.path.basename(prefix) in ("", ".", ".."):
        yield f"output prefix {prefix!r}: a folder -> add a name, as in {os.path.join(prefix, 'train')!r}"
    for check in (check_prefix, lambda name: check_output(manifest_path(name))):
        try:
            check(prefix)
        except InputError as error:
            yield str(error)


def _check_vocabulary(options: PreprocessOptions, stamp: TokenizerStamp) -> None:
    if options.model is None:
        return
    rows = check_config(options.model).get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise InputError(f"{options.model}/config.json: vocab_size is {rows!r} -> it must be an integer")
    if stamp.vocab_size > rows:
        raise InputError(
            f"{options.tokenizer}: token ids go up to {stamp.vocab_size - 1}, but {options.model} has an embedding of "
            f"{rows} rows (vocab_size) -> give the model's own tokenizer; if tokens were added to it, resize the "
            "embedding first (transformers: model.resize_token_embeddings(len(tokenizer)), then save_pretrained)"
        )


def _plan(options: PreprocessOptions, files: Sequence[str], stamp: TokenizerStamp) -> str:
    """Hash of everything that decides the content of the shards; an interrupted run continues only when it is equal."""
    inputs = [[name, os.stat(name).st_size, os.stat(name).st_mtime_ns] for name in files]
    limits = [options.max_prompt_tokens, options.max_response_tokens, dict(options.policies), options.part]
    limits += filter(None, [dict(options.template_kwargs)])
    sizes = [options.max_groups_per_shard, options.max_bytes_per_shard, options.rows_per_chunk, BYTES_PER_CHUNK]
    return sha256_json([megatron_gft.__version__, inputs, stamp.model_dump(), limits, sizes, options.append])


def _rotation(name: str, parts: int) -> int:
    """The part that takes the first row of a file: another for each file, so that many small files are spread too. It
    depends on the file's name alone: parts that saw other files beside it must still share its rows."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(Path(name).name), digest_size=8).digest(), "big") % parts


def _write_shards(builder: "_ShardBuilder", encoder: ChunkEncoder, progress: bool) -> dict[str, dict[str, int]]:
    """Write all shards that are not done yet into the staging folder; problems of rows of which none was made."""
    options, (part, parts) = builder.options, builder.options.part
    rows = min(options.rows_per_chunk, options.max_groups_per_shard)
    with contextlib.ExitStack() as stack:
        stack.callback(builder.abort)
        encode_all: Callable[[Iterable[RawChunk]], Iterator[EncodedChunk]] = functools.partial(map, encoder.encode)
        if options.workers > 1:  # before the progress bar, which starts a thread
            encode_all = stack.enter_context(OrderedWorkers(encoder.encode, options.workers)).map
        bar = stack.enter_context(
            ProgressBar(desc="preprocess", total=total_bytes(builder.files), unit="B", show=progress)
        )
        every = read_all(builder.files, bar, rows, lambda name: (part - 1 + _rotation(name, parts)) % parts, parts)
        chunks = itertools.islice(every, builder.next_chunk, None)
        started, groups = time.monotonic(), 0
        for result in encode_all(chunks):
            builder.add(result)
            groups += len(result.groups)
            bar.set_postfix_str(f"{groups} groups, {groups / (time.monotonic() - started):.0f}/s", refresh=False)
            bar.update(0)
        return builder.finish()


class _ShardBuilder:
    """Puts encoded chunks into shards, in order; leaves duplicates out."""

    def __init__(
        self,
        options: PreprocessOptions,
        files: Sequence[str],
        stamp: TokenizerStamp,
        staging: Staging,
        existing: Sequence[GroupShard],
    ):
        self.options, self.files, self._stamp, self._staging = options, files, stamp, staging
        self._inputs = [{"name": Path(name).name, "bytes": os.path.getsize(name)} for name in files]
        self._seen: set[bytes] = set()
        self._next_number: dict[bytes, int] = {}  # of ids that came again: all lower numbers are taken
        self._writer: GroupShardWriter | None = None
        self.next_chunk = staging.next_chunk  # first that was not added yet
        self._begin()
        finished = (GroupShard(staging.folder / name) for name in staging.done)
        for shard in (*existing, *finished):  # ids of groups that are in a shard already are duplicates from now on
            self._seen.update(map(id_digest, shard.ids()))

    def _begin(self) -> None:
        self._problems: Counter[tuple[str, str]] = Counter()  # by kind and action
        self._lineage: Counter[str] = Counter()
        self._verifiers: Counter[str] = Counter()
        self._rows = 0

    def abort(self) -> None:
        """Leave nothing of a shard that is not finished."""
        if self._writer is not None:
            self._writer.abort()

    def add(self, chunk: EncodedChunk) -> None:
        """Add the groups of the next chunk; raises for a problem that has the policy ``error``."""
        self._leave_duplicates_out(chunk)
        raise_errors(chunk.problems)
        groups, writer = chunk.groups, self._writer
        if writer is not None and (
            writer.groups + len(groups) > self.options.max_groups_per_shard
            or writer.bytes + groups.tokens.nbytes > self.options.max_bytes_per_shard
        ):
            self._close(writer)
        self.next_chunk += 1
        self.note(chunk.problems)
        for origin in chunk.origins:
            self._lineage.update(origin.lineage)
        self._verifiers.update(origin.verifier for origin in chunk.origins if origin.verifier is not None)
        self._rows += chunk.rows
        if len(groups):
            self._writer = self._writer or GroupShardWriter(self._staging.next_prefix, self._stamp)
            self._writer.add(groups)

    def note(self, problems: Sequence[Problem]) -> None:
        """Count findings in the shard that is being written."""
        self._problems.update((problem.kind, problem.action) for problem in problems)
        self._staging.note(problems)

    def finish(self) -> dict[str, dict[str, int]]:
        """No more chunks: close the last shard. When there is none, the problems that left none; an error unless this
        is a part of the input."""
        if self._writer is not None:
            self._close(self._writer)
        if self._staging.done:
            self._staging.finish()
        elif self.options.part[1] > 1:
            self._staging.publish_empty(self._provenance())
        else:
            self._staging.write_report()
            way_out = f"see {self._staging.report_path}, relax the policies" if self._rows else "the input has no rows"
            raise InputError(f"no group is left to write -> {way_out}")
        return problem_table(self._problems)

    def _close(self, writer: GroupShardWriter) -> None:
        writer.provenance = self._provenance()
        common = self._verifiers.most_common(MAX_LINEAGES)
        verifiers = [{"verifier": json.loads(text), "groups": count} for text, count in common]
        writer.verifier = {"group_files": verifiers} if verifiers else {}
        writer.finish()
        self._writer = None
        self._staging.add(self.next_chunk)
        self._begin()

    def _provenance(self) -> dict[str, Any]:
        options = self.options
        listed = sorted(self._lineage.most_common(MAX_LINEAGES))
        return {
            "inputs": self._inputs,
            "input_set": sha256_json(sorted([i["name"], i["bytes"]] for i in self._inputs)),  # equal in all parts
            "part": "{}/{}".format(*options.part),
            "rows": self._rows,
            "responses": [{**json.loads(text), "count": count} for text, count in listed],
            "responses_unlisted": sum(self._lineage.values()) - sum(count for _, count in listed),
            "policies": {kind: way for kind, way in options.policies.items() if way != DEFAULT_POLICIES[kind]},
            "template_kwargs": dict(options.template_kwargs),
            "limits": {"prompt": options.max_prompt_tokens, "response": options.max_response_tokens},
            "problems": problem_table(self._problems),
        }

    def _leave_duplicates_out(self, chunk: EncodedChunk) -> None:
        log = ProblemLog(self.options.policies)
        keep = np.ones(len(chunk.origins), dtype=bool)
        for i, origin in enumerate(chunk.origins):
            digest = id_digest(origin.id)
            if digest in self._seen:
                if log.found(origin.place, origin.id, "duplicate_id", "the id was seen before") != FIX:
                    keep[i] = False
                    continue
                chunk.groups.metas[i], digest = self._renamed(chunk.groups.metas[i], digest)
            self._seen.add(digest)
        if log.problems:
            chunk.problems += log.take()
            chunk.groups = chunk.groups.select(keep)
            chunk.origins = list(itertools.compress(chunk.origins, keep))

    def _renamed(self, meta: bytes, own: bytes) -> tuple[bytes, bytes]:
        """The meta of a group whose id was seen (digest ``own``) with a free id, and the digest of that id."""
        value = json.loads(meta)
        for number in itertools.count(self._next_number.get(own, 2)):
            free = f"{value['id']}#{number}"
            if (digest := id_digest(free)) not in self._seen:
                break
        self._next_number[own] = number + 1
        return to_json(value | {"id": free}), digest
