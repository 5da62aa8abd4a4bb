"""Preprocessing against the way of Megatron-LM.

``bench_preprocess`` compares with a loop that does what Megatron-LM's ``tools/preprocess_data.py`` does for each
line: parse JSON, call the Hugging Face tokenizer on the text, ``IndexedDatasetBuilder.add_document``. In the way of
Megatron-LM a group is one document per response, each with its prompt.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_gft.groups import GroupRecord, ResponseRecord, read_chunks, write_group_file
from megatron_gft.groups.problems import DEFAULT_POLICIES
from megatron_gft.preprocess.encode import ChunkEncoder
from megatron_gft.shards import GroupShardWriter, tokenizer_stamp
from megatron_gft.tokenizer import NO_TEMPLATE, Tokenizer, load_tokenizer
from tools.bench.timing import interleaved_seconds, summary


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


def _megatron_way(lines: Sequence[bytes], tokenizer: Any, prefix: Path) -> int:
    """Tokenize each line by itself, one document each; the number of tokens."""
    builder, tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer))), 0
    for line in lines:
        ids = tokenizer(json.loads(line)["text"]).input_ids
        ids.append(tokenizer.eos_token_id)
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens


def _our_way(path: Path, tokenizer: Tokenizer, prefix: Path) -> int:
    """What one process of preprocessing does, reading and writing included; the number of tokens."""
    encoder, tokens = ChunkEncoder(tokenizer, DEFAULT_POLICIES), 0
    shutil.rmtree(prefix.parent, ignore_errors=True)
    with GroupShardWriter(prefix, tokenizer_stamp(tokenizer)) as writer:
        for chunk in read_chunks(path):
            groups = encoder.encode(chunk).groups
            writer.add(groups)
            tokens += len(groups.tokens)
    return tokens


def compare_preprocessing(
    records: Sequence[GroupRecord], tokenizer_folder: Path, chat_template: str | None, *, repeats: int = 15
) -> dict[str, Any]:
    """Time both ways on the same text (process CPU seconds, one core), in turns.

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
        ways: dict[str, Callable[[], int]] = {
            "ours": lambda: _our_way(folder / "groups.jsonl", tokenizer, folder / "ours" / "shard"),
            "theirs": lambda: _megatron_way(lines, plain_tokenizer, folder / "theirs"),
        }
        tokens = {way: run() for way, run in ways.items()}
        times = interleaved_seconds(ways, repeats=repeats)
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
