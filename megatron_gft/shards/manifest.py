"""The manifest ``PREFIX.json`` of a group shard: what the shard holds, and the sha256 of every file of it.

A reader opens no file that the manifest does not list with this size, and the manifest is written last. Its text is
canonical and ends with its own hash, so any changed byte of it is found when it is read. Files of more than one block
have the hash of each block, too, so that several processes can share :mod:`megatron_gft.shards.verification`.
"""

import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import pydantic

from megatron_gft.atomic import atomic_file, sha256_file, sha256_json
from megatron_gft.errors import InputError, InputErrors, refuse
from megatron_gft.folders import file_problem as link_problem
from megatron_gft.folders import is_inner_name
from megatron_gft.reading import read_json

FORMAT: Final = "megatron_gft.group_shard"
FORMAT_VERSION: Final = 2  # 1 has no hashes of blocks
BLOCK_BYTES: Final = 64 << 20


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Part):
    """Size and content of one file beside the manifest."""

    bytes: int = pydantic.Field(gt=0)
    sha256: str
    blocks: list[str] | None = None  # sha256 of each BLOCK_BYTES, of a file that has more

    @pydantic.model_serializer(mode="wrap")
    def _as_written(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``blocks`` where there are none, as earlier versions wrote it."""
        return {name: value for name, value in write(self).items() if value is not None}


class Counts(_Part):
    """What the shard holds; lengths in tokens, EOS included."""

    groups: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    truncated: int  # responses that do not end with EOS
    by_source: dict[str, int]
    max_prompt_tokens: int
    max_response_tokens: int
    max_sequence_tokens: int  # prompt + response
    max_responses: int
    max_token_id: int


class TokenizerStamp(_Part):
    """Which tokenizer and chat template made the tokens."""

    fingerprint: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    chat_template: str  # sha256, or "none"


class RewardStats(_Part):
    """Mean and count by source, None without rewards; a group has zero variance when all its rewards are equal."""

    rewarded: int
    missing: int
    mean: dict[str, float | None]
    minimum: float | None
    maximum: float | None
    zero_variance_groups: int


class Judgement(_Part):
    """Rewards float32 [responses] and, when known, outcomes int8 [responses], and what gave them."""

    # In the JSON they are called "rewards" and "outcomes", as in shards of earlier versions.
    model_config = pydantic.ConfigDict(populate_by_name=True)
    rewards_file: str = pydantic.Field(validation_alias="rewards", serialization_alias="rewards")
    outcomes_file: str | None = pydantic.Field(validation_alias="outcomes", serialization_alias="outcomes")
    outcome_names: list[str]  # of the codes in `outcomes_file`; -1 = unknown
    verifier: dict[str, Any]
    stats: RewardStats


class ShardSet(_Part):
    """Shards that one run of preprocessing made together."""

    id: str
    index: int
    count: int


class ShardManifest(_Part):
    """Contents of ``PREFIX.json``."""

    format: Literal["megatron_gft.group_shard"]
    format_version: Literal[1, 2]
    tool_version: str
    files: dict[str, FileEntry]
    counts: Counts
    tokenizer: TokenizerStamp
    judgements: list[Judgement]  # one; earlier versions added more, of which the last one is in force
    logprobs: str | dict[str, str] | None  # file name of the one called "sampled", or of each name
    provenance: dict[str, Any]
    shard_set: ShardSet | None

    @property
    def judgement(self) -> Judgement:
        """The judgement in force."""
        return self.judgements[-1]

    @property
    def tokens_file(self) -> str:
        """``PREFIX.bin``."""
        return min((name for name in self.files if name.endswith(".bin")), key=len)  # not .meta.bin

    @property
    def bulk_files(self) -> list[str]:
        """What is too large to be hashed whenever the shard is opened: tokens, and log-probs of more than a block."""
        return [self.tokens_file, *(n for n in self.logprob_files.values() if self.files[n].bytes > BLOCK_BYTES)]

    @property
    def logprob_files(self) -> dict[str, str]:
        """File of the log-probs of each name; ``sampled`` are those of the model that sampled the responses."""
        return {"sampled": self.logprobs} if isinstance(self.logprobs, str) else self.logprobs or {}

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of what training reads: tokens, index, rewards in force, log-probs. No names, no provenance."""
        names = {"rewards": self.judgement.rewards_file, "bin": self.tokens_file}
        names["logprobs"] = self.logprob_files.get("sampled", "")
        names["idx"] = self.tokens_file.removesuffix("bin") + "idx"
        hashes = {role: self.files[name].sha256 for role, name in names.items() if name}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def empty_part_path(prefix: str | Path) -> Path:
    """File of a part of the input (``--part I/N``) of which no group is left: that part is not missing."""
    return Path(f"{prefix}.empty")


def manifest_text(manifest: ShardManifest) -> str:
    """Canonical text, its hash last."""
    value = manifest.model_dump(mode="json", by_alias=True)
    return json.dumps({**value, "sha256": sha256_json(value)}, indent=1, ensure_ascii=True) + "\n"


def write_manifest(prefix: str | Path, manifest: ShardManifest) -> None:
    with atomic_file(manifest_path(prefix)) as temporary:
        temporary.write_text(manifest_text(manifest), encoding="ascii")


def read_manifest(prefix: str | Path) -> ShardManifest:
    """Read and check ``PREFIX.json``.

    Raises:
        InputError: missing, not a manifest, of another version, or changed after it was written.
    """
    path = manifest_path(prefix)
    if path.exists() and not path.is_file():  # reading a pipe would wait
        raise InputError(f"{path}: not a file -> give the prefix of a shard")
    if not os.path.lexists(path):
        if _has_data(str(prefix)):
            raise InputError(
                f"{path}: missing, so not all shards are given: its other files are there -> copy it too, or run the "
                "interrupted preprocessing again"
            )
        raise InputError(
            f"{prefix}: no such group shard ({path} is missing) -> make it with tools/preprocess_groups.py"
        )
    value = read_json(path, "preprocess again")
    if value.get("format") != FORMAT:
        raise InputError(f"{path}: not the manifest of a group shard -> give the prefix of one")
    if value.get("format_version") not in (1, FORMAT_VERSION):
        raise InputError(
            f"{path}: format version {value.get('format_version')!r}, this program reads 1 to {FORMAT_VERSION} "
            "-> preprocess again, or use the version that wrote it"
        )
    value.pop("sha256", None)
    try:
        manifest = ShardManifest.model_validate(value)
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: damaged manifest ({error}) -> preprocess again") from error
    if path.read_bytes() != manifest_text(manifest).encode() or not manifest.judgements:
        raise InputError(f"{path}: the manifest does not match its own hash -> preprocess again, do not edit it")
    _check_names(prefix, manifest)
    return manifest


def _check_names(prefix: str | Path, manifest: ShardManifest) -> None:
    """Raise InputError unless the manifest lists what it needs, and files of this prefix only."""
    path = manifest_path(prefix)
    stem, files = Path(prefix).name, manifest.files
    if not {f"{stem}.bin", f"{stem}.idx"} <= files.keys():
        raise InputError(f"{path}: lists the files of another prefix -> give it its name back, shards keep theirs")
    sidecars = [manifest.judgement.outcomes_file, *(of.rewards_file for of in manifest.judgements)]
    sidecars += manifest.logprob_files.values()
    needed = {f"{stem}.meta.bin", f"{stem}.meta.idx", *(name for name in sidecars if name is not None)}
    odd = {name for name in files if not name.startswith(f"{stem}.") or "/" in name or not is_inner_name(name)}
    if wrong := sorted((needed - files.keys()) | odd):
        raise InputError(f"{path}: lists no file {wrong[0]!r}, or one that is none of {stem}.* -> preprocess again")
    for name, entry in files.items():
        if entry.blocks is not None and len(entry.blocks) != -(-entry.bytes // BLOCK_BYTES):
            raise InputError(f"{path}: {len(entry.blocks)} blocks of {name} ({entry.bytes} bytes) -> preprocess again")


def file_entry(path: Path) -> FileEntry:
    """Describe a file as it is."""
    if (size := path.stat().st_size) <= BLOCK_BYTES:
        return FileEntry(bytes=size, sha256=sha256_file(path))
    whole, blocks = hashlib.sha256(), []
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest())
    return FileEntry(bytes=size, sha256=whole.hexdigest(), blocks=blocks)


def file_problem(path: Path, entry: FileEntry, *, contents: bool) -> str | None:
    """What is wrong with a file: missing, of another size or, when asked, with other contents."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: not a file"
        if found.st_size != entry.bytes:
            return f"{path}: {found.st_size} bytes, the manifest says {entry.bytes}"
        if contents and sha256_file(path) != entry.sha256:
            return f"{path}: content differs from the manifest"
    except FileNotFoundError:
        return f"{path}: missing"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def check_files(prefix: str | Path, manifest: ShardManifest) -> None:
    """Compare every file with the manifest: the sizes of all, the contents of those that are small.

    Raises:
        InputErrors: names each file that differs.
    """
    bulk = manifest.bulk_files
    checks = ((Path(prefix).with_name(name), entry, name not in bulk) for name, entry in manifest.files.items())
    home = Path(os.path.realpath(manifest_path(prefix))).parent  # also of a shard that is linked as a whole
    found = (
        file_problem(path, entry, contents=contents) or link_problem(path, path.parent, home)
        for path, entry, contents in checks
    )
    if problems := [problem for problem in found if problem is not None]:
        tool = f"tools/inspect_groups.py {prefix} --verify"
        raise InputErrors(f"{prefix}: damaged shard -> copy it or preprocess again; all damage: {tool}", problems)


def expand_shards(patterns: Sequence[str | Path] | str | Path) -> list[str]:
    """Prefixes of the shards that prefixes and globs name; a glob gives them sorted.

    A glob also gives shards whose manifest is damaged or gone, which reading them then reports. Of shards made with
    ``--part I/N`` it must match every part, unless it spells the part (``train-part00001-of-00003*``); a part given
    by its prefix may be used alone.

    Raises:
        InputError: a pattern names no shard, a glob misses parts, or one shard is named twice.
    """
    prefixes: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        name = str(pattern).removesuffix(".json")
        found = [name]
        if glob.has_magic(name) and not manifest_path(name).exists():
            found = _glob_shards(name)
            if not found:
                raise InputError(f"{pattern}: no group shard matches -> check the path")
            if not re.search(r"-part\d{5}", os.path.basename(name)):
                _check_parts(str(pattern), found)
        prefixes.extend(found)
    named: dict[str, str] = {}
    for prefix in prefixes:
        path = os.path.realpath(manifest_path(prefix))
        if path in named:
            raise InputError(f"{prefix}: shard named twice (as {named[path]} before) -> name each shard once")
        named[path] = prefix
    return prefixes


def _glob_shards(pattern: str) -> list[str]:
    """Prefixes of manifests, and of data files that miss theirs; not of other files that end with ``.json``."""
    manifests = {path.removesuffix(".json") for path in glob.glob(f"{pattern}.json")}
    whole = {prefix for prefix in manifests if _is_manifest(f"{prefix}.json") or _has_data(prefix)}
    orphans = {path.removesuffix(".meta.idx") for path in glob.glob(f"{pattern}.meta.idx")} - manifests
    return sorted(whole | orphans)


def _is_manifest(path: str) -> bool:
    """Whether a file begins as a shard manifest does."""
    if not os.path.isfile(path):  # reading a pipe would wait
        return False
    try:
        with open(path, "rb") as file:
            return FORMAT.encode() in file.read(100)
    except OSError:
        return False


def _has_data(prefix: str) -> bool:
    return os.path.exists(f"{prefix}.idx") or os.path.exists(f"{prefix}.bin")


def _check_parts(pattern: str, prefixes: Sequence[str]) -> None:
    """Of shards made with ``--part I/N``, all N parts are there, or are known to be empty."""
    seen: dict[tuple[str, int], set[int]] = {}
    for prefix in prefixes:
        if part := re.search(r"-part(\d{5,})-of-(\d{5,})(-\d{5})?$", prefix):
            seen.setdefault((prefix[: part.start()], int(part[2])), set()).add(int(part[1]))
    problems = []
    for (prefix, count), parts in seen.items():
        absent = sorted(set(range(1, count + 1)) - parts)
        if missing := [i for i in absent if not empty_part_path(f"{prefix}-part{i:05d}-of-{count:05d}").exists()]:
            shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            problems.append(f"{prefix}: {len(parts)} of {count} parts, missing {shown}")
    refuse(f"{pattern}: parts of shards are missing -> make them, or name each part to use", problems)


def check_sets(shards: Iterable[tuple[str, ShardManifest]]) -> None:
    """Shards of one preprocessing run come together or not at all: a missing one must not pass in silence.

    Raises:
        InputErrors: names each incomplete set; or parts (``--part I/N``) that are not of the same input.
    """
    shards = list(shards)
    refuse("incomplete sets of shards -> name them all, e.g. PREFIX*", incomplete_sets(shards))
    # Parts share the rows of one input: of two inputs, some rows would be in no part. What was appended is apart.
    seen: dict[str, dict[str, str]] = {}
    for prefix, manifest in shards:
        part = re.search(r"-part\d{5,}-of-\d{5,}$", prefix)
        if part and "input_set" in manifest.provenance:
            of_all = prefix[: part.start()] + part[0].partition("-of-")[2]
            seen.setdefault(of_all, {}).setdefault(manifest.provenance["input_set"], prefix)
    refuse(
        "parts of different inputs: rows may be missing -> make all parts with the same input",
        [" and ".join(prefixes.values()) for prefixes in seen.values() if len(prefixes) > 1],
    )


def incomplete_sets(shards: Iterable[tuple[str, ShardManifest]]) -> list[str]:
    """A line for each set of which a shard is missing."""
    seen: dict[str, tuple[str, int, set[int]]] = {}
    for prefix, manifest in shards:
        part = manifest.shard_set
        if part is not None:
            seen.setdefault(part.id, (prefix, part.count, set()))[2].add(part.index)
    return [
        f"{prefix}: {len(indices)} of its {count} shards are given, missing number "
        f"{', '.join(str(i) for i in sorted(set(range(count)) - indices))}"
        for prefix, count, indices in seen.values()
        if len(indices) < count
    ]
