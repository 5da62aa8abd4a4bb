"""What a sampling backend is asked and what it gives: requests, parameters, samples, and their seeds."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_gft.chat_template import PLAIN, Prompt, TemplateOptions
from megatron_gft.errors import InputError
from megatron_gft.folders import JSON_FILES, TEXT_FILES

WEIGHT_STRIDE = 16 << 20
# Beside the weights, what decides the tokens that a model samples.
MODEL_FILES = sorted({*JSON_FILES, *TEXT_FILES, "chat_template.json", "tokenizer.model"})


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. ``temperature`` 0 is greedy; ``top_p`` 1 and ``top_k`` 0 keep the whole distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The parameters as recorded with each response."""
        value: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return value | ({"top_k": self.top_k} if self.top_k else {}) | ({"stop": list(self.stop)} if self.stop else {})


@dataclass(frozen=True)
class SampleRequest:
    """One response to sample; ``key`` names it in the journal, ``seed`` is its own."""

    key: str
    prompt: Prompt
    seed: int
    options: TemplateOptions = PLAIN


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    ``token_ids`` are the ids that were sampled (a final EOS included), or ``None`` when they are unknown or do not
    spell ``text``; ``logprobs`` are the model's at temperature 1, one per id. ``without_reasoning``: the server kept
    the model's thoughts apart from the text, and they were left out. ``note``: what else the summary should count.
    ``prompt_tokens``: of the prompt as the server rendered it, if it says so (``records.prompt_tokens``).
    """

    key: str
    text: str
    finish_reason: str  # "stop" or "length"
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    without_reasoning: bool = False
    note: str | None = None
    prompt_tokens: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What a journal keeps under ``key``: all fields that say something."""
        return {name: value for name, value in vars(self).items() if name != "key" and value not in (None, False)}


@dataclass(frozen=True)
class SampleFailure:
    """A request that was given up: what happened, in one line.

    ``transient``: another time it might work, so several in a row speak of the backend, not of their prompts.
    """

    key: str
    reason: str
    transient: bool = False


Outcome = Sample | SampleFailure


class Backend(Protocol):
    """What samples come from: ``generate`` takes the requests of a run in their order and yields, in any order, the
    outcomes of those that are not done. A backend whose samples depend on what shares their batch forms its batches
    from all requests, so that a continued run samples what an undisturbed one would have."""

    def generate(
        self, requests: Iterable[SampleRequest], params: SamplingParams, is_done: Callable[[str], bool]
    ) -> Iterator[Outcome]: ...


def with_own_eos(
    ids: list[int], logprobs: list[float] | None, end_ids: frozenset[int], eos_id: int
) -> tuple[list[int], list[float] | None]:
    """Drop a final end token that is not ``eos_id``: training appends that one."""
    if ids and ids[-1] in end_ids and ids[-1] != eos_id:
        return ids[:-1], None if logprobs is None else logprobs[:-1]
    return ids, logprobs


def sample_seed(seed: int, prompt_id: str, source: str, k: int) -> int:
    """Seed of one sample in [0, 2^31): a function of the run's seed and of what the sample is, of nothing else."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}\0{source}\0{k}".encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def model_fingerprint(path: str | Path) -> str:
    """Identity of a model folder: sha256 over its configuration, tokenizer and a sixteenth of its weights: of each file
    the size, the first MiB of every 16 MiB and the last MiB, so a change of any large matrix shows.

    Raises:
        InputError: no weights there.
    """
    folder, digest, piece = Path(path), hashlib.sha256(), 1 << 20
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not weights:
        raise InputError(f"{path}: no weights (*.safetensors, *.bin) in there -> give a Hugging Face model folder")
    for file in [folder / name for name in MODEL_FILES if (folder / name).is_file()]:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            for start in [*range(0, size, WEIGHT_STRIDE), max(0, size - piece)]:
                stream.seek(start)
                digest.update(stream.read(piece if size > WEIGHT_STRIDE else size))
    return digest.hexdigest()
