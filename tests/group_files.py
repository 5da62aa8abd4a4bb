"""Random scored groups as text, for tests and benchmarks."""

from __future__ import annotations

import random

from megatron_gft.groups import GroupRecord, ResponseRecord


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
