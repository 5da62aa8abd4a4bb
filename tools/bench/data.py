"""Benchmarks of the data path: preprocessing against the way of Megatron-LM, reading shards.

``bench_preprocess`` compares with a loop that does what Megatron-LM's ``tools/preprocess_data.py`` does for each
line: parse JSON, call the Hugging Face tokenizer on the text, ``IndexedDatasetBuilder.add_document``. In the way of
Megatron-LM a group is one document per response, each with its prompt.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_gft.dataset import build_group_datasets
from megatron_gft.groups import GroupRecord, ResponseRecord, read_chunks, write_group_file
from megatron_gft.groups.problems import DEFAULT_POLICIES
from megatron_gft.preprocess.encode import ChunkEncoder
from megatron_gft.preprocess.run import PreprocessOptions, preprocess
from megatron_gft.shards import GroupShard, GroupShardWriter, TokenizerStamp, tokenizer_stamp
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer
from tools.bench.timing import interleaved_seconds, lockstep_seconds, summary, wall_seconds

STAMP = TokenizerStamp(fingerprint="0" * 64, vocab_size=32000, eos_id=2, bos_id=None, chat_template="none")


def synthetic_records(count: int, responses: int, seed: int = 0) -> list[GroupRecord]:
    """Groups of made-up words with the frequencies of natural language (Zipf): 60 words a prompt, 110 a response."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ion")]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(20_000)]
    frequencies = [1 / (rank + 3) for rank in range(len(words))]

    def text(mean: int) -> str:
        drawn = rng.choices(words, frequencies, k=rng.randint(mean // 2, 3 * mean // 2))
        return " ".join(drawn) + f" {rng.randrange(1000)}."

    records = []
    for i in range(count):
        made = [ResponseRecord(text(110), "expert" if k == 0 else "self", float(k == 0)) for k in range(responses)]
        records.append(GroupRecord(str(i), text(60), made))
    return records


def synthetic_tokenizer(folder: Path, records: Sequence[GroupRecord], vocab_size: int = 8192) -> Path:
    """Byte-level BPE trained on the records, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|end|>"], show_progress=False)
    texts = (response.text for record in records for response in record.responses)
    backend.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


def _megatron_way(lines: Sequence[bytes], tokenizer: Any, prefix: Path, pieces: int) -> Iterator[int]:
    """Tokenize each line by itself, one document each; yields the tokens of each of so many pieces."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    size = -(-len(lines) // pieces)
    for start in range(0, len(lines), size):
        tokens = 0
        for line in lines[start : start + size]:
            ids = tokenizer(json.loads(line)["text"]).input_ids
            ids.append(tokenizer.eos_token_id)
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
        yield tokens
    builder.finalize(f"{prefix}.idx")


def _our_way(path: Path, tokenizer: Tokenizer, prefix: Path) -> Iterator[int]:
    """What one process of preprocessing does, reading and writing included; yields the tokens of each chunk."""
    encoder = ChunkEncoder(tokenizer, DEFAULT_POLICIES)
    shutil.rmtree(prefix.parent, ignore_errors=True)
    with GroupShardWriter(prefix, tokenizer_stamp(tokenizer)) as writer:
        for chunk in read_chunks(path):
            groups = encoder.encode(chunk).groups
            writer.add(groups)
            yield len(groups.tokens)


def compare_preprocessing(
    records: Sequence[GroupRecord], tokenizer_folder: Path, chat_template: str | None, *, repeats: int = 15
) -> dict[str, Any]:
    """Time both ways on the same text (process CPU seconds, one core), in turns of one chunk.

    Returns:
        ``speed_up``: their seconds / ours for the same groups, median of the rounds, with quartiles; million tokens
        written per second of each (fastest round); and ``token_ratio``: tokens of our shard / tokens of theirs.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(tokenizer_folder, chat_template)
    plain_tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_group_file(folder / "groups.jsonl", records)
        lines = [
            json.dumps({"text": tokenizer.render_prompt(record.prompt) + response.text}).encode()
            for record in records
            for response in record.responses
        ]
        pieces = sum(1 for _ in read_chunks(folder / "groups.jsonl"))
        ways: dict[str, Callable[[], Iterator[int]]] = {
            "ours": lambda: _our_way(folder / "groups.jsonl", tokenizer, folder / "ours" / "shard"),
            "theirs": lambda: _megatron_way(lines, plain_tokenizer, folder / "theirs", pieces),
        }
        tokens = {way: sum(run()) for way, run in ways.items()}
        times = lockstep_seconds(ways, repeats=repeats)
    compared = summary(times, "ours")["theirs"]
    best = {way: min(seconds) for way, seconds in times.items()}
    return {
        "groups": len(records),
        "responses": len(lines),
        "speed_up": compared["ratio_median"],
        "speed_up_quartiles": [compared["ratio_quartile_low"], compared["ratio_quartile_high"]],
        "token_ratio": tokens["ours"] / tokens["theirs"],
        "mtok_per_cpu_second": {way: tokens[way] / best[way] / 1e6 for way in best},
        "groups_per_cpu_second": len(records) / best["ours"],
    }


def bench_preprocess(groups: int = 600, repeats: int = 15) -> dict[str, Any]:
    """Flat text (one response a group) and groups of 8, synthetic text and tokenizer."""
    flat, grouped = synthetic_records(4 * groups, 1), synthetic_records(groups, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = synthetic_tokenizer(Path(name) / "tokenizer", flat)
        return {
            "flat": compare_preprocessing(flat, folder, NO_TEMPLATE, repeats=repeats),
            "groups_of_8": compare_preprocessing(grouped, folder, NO_TEMPLATE, repeats=repeats),
        }


def bench_preprocess_workers(groups: int = 12_000, workers: int = 2, repeats: int = 5) -> dict[str, Any]:
    """Wall seconds with one process and with several, start and tokenizer included: some 20 s of work for one.

    Much less would measure what is the same for every size (loading the tokenizer, starting, stopping). Cores share
    caches and memory, and virtual ones their hardware with other work. ``ceiling`` shows what is left to gain: the
    speed-up of as many processes that know nothing of each other, each with its part of the input.
    """
    records = synthetic_records(groups, 8)
    with tempfile.TemporaryDirectory() as name:
        folder = synthetic_tokenizer(Path(name) / "tokenizer", records[:300])
        write_group_file(Path(name) / "groups.jsonl", records)

        def run(count: int, out: str, part: tuple[int, int] = (1, 1)) -> None:
            shutil.rmtree(f"{name}/{out}", ignore_errors=True)
            options = PreprocessOptions(
                [f"{name}/groups.jsonl"], str(folder), f"{name}/{out}/shard", NO_TEMPLATE, workers=count, part=part
            )
            preprocess(options, progress=False)

        def run_apart() -> None:
            context = multiprocessing.get_context("fork")
            processes = [
                context.Process(target=run, args=(1, f"apart{i}", (i, workers))) for i in range(1, workers + 1)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise RuntimeError("a process that preprocesses a part failed")

        runs = {"one": lambda: run(1, "one"), "several": lambda: run(workers, "several"), "apart": run_apart}
        times = interleaved_seconds(runs, repeats=repeats, measure=wall_seconds)
    of_one = {way: [one / other for one, other in zip(times["one"], times[way], strict=True)] for way in times}
    return {
        "workers": workers,
        "wall_seconds": {way: statistics.median(seconds) for way, seconds in times.items()},
        "speed_up": statistics.median(of_one["several"]),
        "speed_up_quartiles": statistics.quantiles(of_one["several"], n=4)[::2],
        "ceiling": statistics.median(of_one["apart"]),
        "ceiling_quartiles": statistics.quantiles(of_one["apart"], n=4)[::2],
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def _write_random_shard(prefix: Path, groups: int, responses: int, mean_length: int) -> None:
    rng = np.random.default_rng(0)
    with GroupShardWriter(prefix, STAMP) as writer:
        for i in range(groups):
            lengths = rng.integers(mean_length // 2, 3 * mean_length // 2, responses + 1)
            tokens = rng.integers(3, 32000, int(lengths.sum())).tolist()
            ends = np.cumsum(lengths).tolist()
            parts = [tokens[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
            writer.add_group(parts[0], parts[1:], ["self"] * responses, [0.0] * responses, group_id=str(i))


def bench_shard_reading(groups: int = 4000, responses: int = 8, mean_length: int = 300) -> dict[str, Any]:
    """Groups read per CPU second in random order from a warm page cache, and groups planned from bulk arrays."""
    with tempfile.TemporaryDirectory() as name:
        _write_random_shard(Path(name) / "shard", groups, responses, mean_length)
        shard = GroupShard(f"{name}/shard")
        split = build_group_datasets([f"{name}/shard"]).train
        order = np.random.default_rng(1).permutation(groups)
        steps = [order[i : i + 128] for i in range(0, groups, 128)]
        runs = {
            "shard": lambda: [shard[i] for i in order.tolist()],
            "dataset": lambda: [split[i] for i in order.tolist()],
            "table of 128 groups": lambda: [split.table(step) for step in steps],
        }
        times = {run: min(seconds) for run, seconds in interleaved_seconds(runs, repeats=5).items()}
        tokens = shard.manifest.counts.prompt_tokens + shard.manifest.counts.response_tokens
    return {
        "groups_per_cpu_second": {run: groups / seconds for run, seconds in times.items()},
        "mtok_per_cpu_second": tokens / times["shard"] / 1e6,
        "tokens_per_group": tokens / groups,
    }
