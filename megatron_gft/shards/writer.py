"""Writing group shards: whole or not at all, the same bytes for the same groups.

Files of a shard ``PREFIX``, all immutable:

    PREFIX.bin, PREFIX.idx            Megatron IndexedDataset, int32: document = group, sequence 0 = prompt, then the
                                      responses; int8 mode of a sequence = source code (prompt: -1)
    PREFIX.meta.bin, PREFIX.meta.idx  IndexedDataset, uint8: JSON {"id", "answer", "models"} of each group
    PREFIX.rewards.npy                float32 [responses], NaN = no reward
    PREFIX.outcomes.npy               int8 [responses], code of the verifier's outcome (only when there are any)
    PREFIX.logprobs.npy               float32 [response tokens], NaN = unknown (only when there are any)
    PREFIX.json                       manifest, written last
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

import megatron_gft
from megatron_gft.atomic import fsync_path, temporary_name
from megatron_gft.errors import InputError
from megatron_gft.groups import GroupRecord, ResponseRecord
from megatron_gft.objectives import SOURCES
from megatron_gft.shards.encoded import PROMPT_MODE, UNKNOWN_OUTCOME, EncodedGroups, sequence_counts
from megatron_gft.shards.manifest import (
    FORMAT,
    FORMAT_VERSION,
    Counts,
    Judgement,
    RewardStats,
    ShardManifest,
    ShardSet,
    TokenizerStamp,
    file_entry,
    manifest_path,
    write_manifest,
)
from megatron_gft.tokenizer import Tokenizer

_NANS_AT_ONCE = 1 << 20


def check_prefix(prefix: str | Path) -> None:
    """Raise InputError for a prefix (``.meta``, ``.json``) whose files would be taken for those of another shard."""
    if str(prefix).endswith((".meta", ".json")):
        other = str(prefix)[: -len(".meta")]
        raise InputError(f"{prefix}: the shard {other} has files of such names -> another prefix, such as {other}")


def tokenizer_stamp(tokenizer: Tokenizer) -> TokenizerStamp:
    """What a shard remembers of its tokenizer."""
    return TokenizerStamp(
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        chat_template=tokenizer.chat_template_fingerprint,
    )


class GroupShardWriter:
    """Writes one shard; a context manager that publishes it on success and removes every trace on failure.

    Args:
        tokenizer: which tokenizer made the tokens, see :func:`tokenizer_stamp`.
        provenance: JSON object kept in the manifest: where the responses come from.
        verifier: JSON object: what judged them.
        shard_set: place among the shards of one run.

    Raises:
        InputError: the shard exists already, its name is that of other files, or no group was added.
    """

    def __init__(
        self,
        prefix: str | Path,
        tokenizer: TokenizerStamp,
        *,
        provenance: dict[str, Any] | None = None,
        verifier: dict[str, Any] | None = None,
        shard_set: ShardSet | None = None,
    ):
        self.prefix, self.tokenizer, self.shard_set = Path(prefix), tokenizer, shard_set
        self.provenance, self.verifier = provenance or {}, verifier or {}
        check_prefix(prefix)
        if manifest_path(prefix).exists():
            raise InputError(f"{prefix}: the shard exists already -> choose another prefix, or append")
        self._folder = temporary_name(self.prefix)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._tokens = IndexedDatasetBuilder(self._path(".bin"), dtype=np.int32, multimodal=True)
        self._metas = IndexedDatasetBuilder(self._path(".meta.bin"), dtype=np.uint8)
        self._rewards: list[np.ndarray] = []
        self._outcomes: list[str | None] = []
        self._logprobs: IO[bytes] | None = None  # no file while none is known
        self.groups, self.bytes, self._response_tokens, self._truncated, self._max_token = 0, 0, 0, 0, 0

    def __enter__(self) -> "GroupShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort()

    def _path(self, suffix: str) -> str:
        return str(self._folder / f"{self.prefix.name}{suffix}")

    def add_group(
        self,
        prompt: Sequence[int],
        responses: Sequence[list[int]],
        sources: Sequence[str],
        rewards: Sequence[float | None],
        *,
        group_id: str,
        answer: str | None = None,
        outcomes: Sequence[str | None] | None = None,
        models: Sequence[str | None] | None = None,
        logprobs: Sequence[list[float] | None] | None = None,
    ) -> None:
        """Add one group of K responses; ``logprobs[k]`` has at most one float per token, the rest is unknown (EOS)."""
        none = [None] * len(responses)
        columns = zip(sources, rewards, outcomes or none, models or none, responses, logprobs or none, strict=True)
        records = [
            ResponseRecord("", source, reward, outcome, model=model, token_ids=ids, logprobs=known)
            for source, reward, outcome, model, ids, known in columns
        ]
        self.add(EncodedGroups.of_groups([(prompt, GroupRecord(group_id, "", records, answer))]))

    def add(self, groups: EncodedGroups) -> None:
        """Add many groups. Tokens go to the disk at once; Megatron's builder keeps only the index."""
        lengths, is_response = groups.sequence_lengths, groups.sequence_modes != PROMPT_MODE
        if int(lengths.min()) < 1 or int(lengths.sum()) != len(groups.tokens):
            raise ValueError("every prompt and response needs a token, and lengths must add up to the tokens")
        if int(groups.group_sizes.min()) < 2:
            raise ValueError("every group needs a response")
        # Megatron's add_document copies twice and runs once a group; its builder's parts take a whole batch.
        self._tokens.data_file.write(groups.tokens.tobytes())
        first = len(self._tokens.sequence_lengths)
        self._tokens.sequence_lengths.extend(lengths.tolist())
        self._tokens.sequence_modes.extend(groups.sequence_modes.tolist())
        self._tokens.document_indices.extend((first + np.cumsum(groups.group_sizes, dtype=np.int64)).tolist())
        self._metas.data_file.write(b"".join(groups.metas))
        self._metas.sequence_lengths.extend(map(len, groups.metas))
        self.groups += len(groups)
        self._metas.document_indices.extend(range(len(self._metas.document_indices), self.groups + 1))
        self._rewards.append(groups.rewards)
        self._outcomes.extend(groups.outcomes)
        self._add_logprobs(groups.logprobs, int(lengths[is_response].sum()))
        last_tokens = groups.tokens[np.cumsum(lengths)[is_response] - 1]
        self._truncated += int((last_tokens != self.tokenizer.eos_id).sum())
        self._max_token = max(self._max_token, int(groups.tokens.max()))
        self.bytes += groups.tokens.nbytes

    def _add_logprobs(self, values: np.ndarray | None, count: int) -> None:
        """Write ``count`` log-probs float32, None = so many unknown ones."""
        unknown = count if values is None else 0
        if values is not None and self._logprobs is None:
            self._logprobs, unknown = open(self._path(".logprobs.npy"), "wb"), self._response_tokens
            _write_logprob_header(self._logprobs, 0)
        self._response_tokens += count
        if self._logprobs is not None:
            for start in range(0, unknown, _NANS_AT_ONCE):
                self._logprobs.write(np.full(min(_NANS_AT_ONCE, unknown - start), np.nan, "<f4").tobytes())
            if values is not None:
                self._logprobs.write(values.astype("<f4", copy=False).tobytes())

    def finish(self) -> ShardManifest:
        """Complete the files, move them into place, then write the manifest."""
        try:
            if not self.groups:
                raise InputError(f"{self.prefix}: no group to write -> see the report of what was dropped")
            self._tokens.finalize(self._path(".idx"))
            self._metas.finalize(self._path(".meta.idx"))
            manifest = self._manifest()
            for name in manifest.files:
                fsync_path(self._folder / name)
            for name in manifest.files:
                os.replace(self._folder / name, self.prefix.with_name(name))
            fsync_path(self.prefix.parent)
            write_manifest(self.prefix, manifest)
            return manifest
        finally:
            self.abort()

    def abort(self) -> None:
        """Leave nothing behind."""
        for file in filter(None, (self._tokens.data_file, self._metas.data_file, self._logprobs)):
            with contextlib.suppress(OSError):  # a full disk: what cannot be written out is not wanted either
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _manifest(self) -> ShardManifest:
        lengths = np.array(self._tokens.sequence_lengths, dtype=np.int64)
        modes = np.array(self._tokens.sequence_modes, dtype=np.int8)
        rewards = np.concatenate(self._rewards)
        starts = np.array(self._tokens.document_indices[:-1], dtype=np.int64)
        sizes = np.diff(np.append(starts, len(lengths)))
        counts = Counts(
            **sequence_counts(lengths, modes, starts), truncated=self._truncated, max_token_id=self._max_token
        )
        judgement = self._judgement(rewards, reward_stats(rewards, modes[modes != PROMPT_MODE], sizes - 1))
        logprobs = None
        if self._logprobs is not None:
            self._logprobs.seek(0)
            _write_logprob_header(self._logprobs, self._response_tokens)
            self._logprobs.close()
            logprobs = f"{self.prefix.name}.logprobs.npy"
        names = [f"{self.prefix.name}{suffix}" for suffix in (".bin", ".idx", ".meta.bin", ".meta.idx")]
        names += [name for name in (judgement.rewards_file, judgement.outcomes_file, logprobs) if name is not None]
        return ShardManifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            tool_version=megatron_gft.__version__,
            files={name: file_entry(self._folder / name) for name in names},
            counts=counts,
            tokenizer=self.tokenizer,
            judgements=[judgement],
            logprobs=logprobs,
            provenance=self.provenance,
            shard_set=self.shard_set,
        )

    def _judgement(self, rewards: np.ndarray, stats: RewardStats) -> Judgement:
        """Write the files of rewards float32 [M] and of the outcomes, if there are any."""
        path = Path(self._path(".rewards.npy"))
        np.save(path, rewards, allow_pickle=False)
        outcomes, names = None, sorted({outcome for outcome in self._outcomes if outcome is not None})
        if len(names) > np.iinfo(np.int8).max:
            raise InputError(f"{self.prefix}: {len(names)} different outcomes -> a verifier should give a handful")
        if names:
            codes = {None: UNKNOWN_OUTCOME} | {outcome: code for code, outcome in enumerate(names)}
            outcomes = Path(self._path(".outcomes.npy"))
            np.save(outcomes, np.array([codes[said] for said in self._outcomes], dtype=np.int8), allow_pickle=False)
        return Judgement(
            rewards_file=path.name,
            outcomes_file=outcomes and outcomes.name,
            outcome_names=names,
            verifier=self.verifier,
            stats=stats,
        )


def _write_logprob_header(file: IO[bytes], count: int) -> None:
    """As ``np.save`` writes it, with the same size for any count: numpy leaves room for the digits."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count,)})


def reward_stats(rewards: np.ndarray, sources: np.ndarray, responses_per_group: np.ndarray) -> RewardStats:
    """Statistics of rewards float32 [M] with source codes int8 [M] and responses of each group int [G]."""
    known = ~np.isnan(rewards)
    mean = {}
    for code, name in enumerate(SOURCES):
        chosen = rewards[known & (sources == code)]
        mean[name] = float(chosen.mean(dtype=np.float64)) if len(chosen) else None
    starts = np.cumsum(responses_per_group) - responses_per_group
    equal = np.minimum.reduceat(rewards, starts) == np.maximum.reduceat(rewards, starts)  # False with a NaN
    return RewardStats(
        rewarded=int(known.sum()),
        missing=int((~known).sum()),
        mean=mean,
        minimum=float(rewards[known].min()) if known.any() else None,
        maximum=float(rewards[known].max()) if known.any() else None,
        zero_variance_groups=int((equal & (responses_per_group > 1)).sum()),
    )
