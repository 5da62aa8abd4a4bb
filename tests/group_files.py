"""Random scored groups as text, for tests and benchmarks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_gft.groups import GroupRecord, ResponseRecord
from megatron_gft.groups.records import RESPONSE_FIELDS


def random_records(count: int, seed: int = 0, responses: int = 4) -> list[GroupRecord]:
    """Groups of one expert and ``responses - 1`` other responses, arithmetic word problems."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        a, b = rng.randrange(100), rng.randrange(100)
        made = [ResponseRecord(f"The answer is {a + b}.\n#### {a + b}", "expert", 1.0, "correct", "stop")]
        for k in range(responses - 1):
            said = a + b + (k % 2)
            text = f"Let us think {k}: {a} plus {b} is {said}." + " step." * rng.randrange(6)
            outcome = "correct" if said == a + b else "wrong"
            source = ("teacher", "self")[k % 2]
            sampling = {"temperature": 1.0, "seed": rng.randrange(1000)}
            record = ResponseRecord(text, source, float(said == a + b), outcome, "stop", model=f"{source}-7b")
            record.sampling = sampling
            if rng.random() < 0.1:
                record.finish_reason = "length"
            made.append(record)
        prompt = f"Question {i}: what is {a} plus {b}?"
        records.append(GroupRecord(f"q{i}", prompt, made, answer=str(a + b)))
    return records


def write_parquet(path: Path, records: list[GroupRecord]) -> None:
    """Write groups as an earlier version of megatron_gft did: messages apart, objects as JSON text."""
    text, numbers = pyarrow.string(), pyarrow.list_(pyarrow.float64())
    kinds = dict.fromkeys((*RESPONSE_FIELDS, "extra"), text)
    kinds |= {"reward": pyarrow.float64(), "token_ids": pyarrow.list_(pyarrow.int32()), "logprobs": numbers}
    message = pyarrow.struct([("role", text), ("content", text), ("extra", text)])
    schema = pyarrow.schema(
        [("id", text), ("prompt", text), ("messages", pyarrow.list_(message)), ("answer", text), ("meta", text)]
        + [("responses", pyarrow.list_(pyarrow.struct(list(kinds.items()))))]
    )
    rows = [
        {
            "id": record.id,
            "prompt" if isinstance(record.prompt, str) else "messages": _cell(record.prompt),
            "answer": record.answer,
            "responses": [
                {name: _cell(getattr(response, name)) for name in RESPONSE_FIELDS} | _extra(response.extra)
                for response in record.responses
            ],
            "meta": _cell(record.meta or None),
        }
        for record in records
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def _cell(value):
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{name: item.pop(name) for name in ("role", "content")} | _extra(item) for item in map(dict, value)]
    return json.dumps(value) if isinstance(value, dict) else value


def _extra(fields):
    return {"extra": json.dumps(fields) if fields else None}
