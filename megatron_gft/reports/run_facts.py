"""What the folder of a run says beside its curves: configuration, data, versions, where the time went. As a page.

Nothing here is needed to go on training, so what cannot be read is said on the page.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_gft.checkpoints.starts import config_files
from megatron_gft.config import DataConfig, load_config
from megatron_gft.errors import InputError
from megatron_gft.inspection.output import page_environment
from megatron_gft.metrics import ENVIRONMENT_FILE
from megatron_gft.objectives import SOURCES
from megatron_gft.reading import read_json
from megatron_gft.shards.manifest import expand_shards, read_manifest

PHASES = ("data", "forward_backward", "optimizer", "save")
SHOWN_SHARDS = 50


@dataclass
class RunFacts:
    """Of one run; tables are rows of cells, the first of them the heading."""

    seconds: list[tuple[str, float]]  # of all recorded steps, by phase
    config: str = ""
    data: list[list[str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what could not be read


def run_facts(folder: Path, records: Sequence[Mapping[str, Any]]) -> RunFacts:
    """What is known of the run whose folder (or ``metrics.jsonl``) this is."""
    folder = folder if folder.is_dir() else folder.parent
    facts = RunFacts([*_time_split(records)])
    try:
        facts.environment = {str(name): str(value) for name, value in read_json(folder / ENVIRONMENT_FILE).items()}
    except InputError as error:
        facts.notes.append(str(error))
    if starts := config_files(folder):
        facts.config = starts[-1].read_text(encoding="utf-8", errors="replace")
        if len(starts) > 1:
            facts.notes.append(f"started {len(starts)} times; the configuration is that of {starts[-1].name}")
        try:
            facts.data += _data_rows(load_config(starts[-1:]).data)
        except InputError as error:
            facts.notes.append(f"data: {error}")
    return facts


def _time_split(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    def total(name: str) -> float:
        return sum(found for record in records if isinstance(found := record.get(f"seconds/{name}"), int | float))

    spent = {name: total(name) for name in PHASES}
    spent["other"] = max(0.0, total("step") - sum(spent.values()))
    yield from ((name, seconds) for name, seconds in spent.items() if seconds > 0)


def _data_rows(data: DataConfig) -> Iterator[list[str]]:
    """A row a shard: counts, responses and mean reward by source."""
    yield ["shard", "groups", "no signal", "prompt tokens", "response tokens", "cut off", *SOURCES]
    prefixes = expand_shards([*data.train, *data.valid])
    for prefix in prefixes[:SHOWN_SHARDS]:
        manifest = read_manifest(prefix)
        counts, rewards = manifest.counts, manifest.judgement.stats
        numbers = (counts.groups, rewards.zero_variance_groups, counts.prompt_tokens, counts.response_tokens)
        row = [prefix, *(f"{number:,}" for number in (*numbers, counts.truncated))]
        for source in SOURCES:
            mean = rewards.mean.get(source)
            row.append(f"{counts.by_source.get(source, 0):,}" + ("" if mean is None else f", reward {mean:.3f}"))
        yield row
    if len(prefixes) > SHOWN_SHARDS:
        yield [f"and {len(prefixes) - SHOWN_SHARDS} more"]


def page(**values: Any) -> str:
    """The report as one page that needs nothing else."""
    text = (files(__package__) / "run.html.j2").read_text(encoding="utf-8")
    return page_environment().from_string(text).render(**values)
