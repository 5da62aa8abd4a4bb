"""Group files out of rows that others stored: read by a mapping, put together by a key, checked, counted.

Rows pass one by one. Where several make a group, their parts wait in a database on the disk, and no order of the rows
is needed. Groups stand in the order of their first rows: the same rows give the same bytes, in whatever format.
"""

import contextlib
import functools
import hashlib
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gft import __version__
from megatron_gft.atomic import sha256_file, working_folder, write_json, writing
from megatron_gft.errors import InputErrors, refuse
from megatron_gft.groups.files import output_problems, read_all, refuse_problems, write_group_file
from megatron_gft.groups.mapping import Dropped, Mapping, Part, RowReader
from megatron_gft.groups.problems import DROP, KEEP, KINDS, ProblemLog
from megatron_gft.groups.records import GroupRecord, check_group, id_digest, parse_group
from megatron_gft.groups.rows import iter_rows
from megatron_gft.progress import ProgressBar, total_bytes

LEAST_RESPONSES = 2  # one alone has no advantage
_SURE_AFTER = 1000  # rows: a column that none of them has is a wrong name
_UNITS = ("rows", "groups", "responses")
_DROPPED = "wrong_type missing_field empty_prompt empty_response no_responses duplicate_response nonfinite_reward"
POLICIES = dict.fromkeys(_DROPPED.split(), DROP)


@dataclass
class ImportSummary:
    """What an import made and left out; written beside the group file.

    Every response that was found is counted in ``responses``, or by its reason in ``dropped["responses"]``.
    """

    output: str
    mapping: dict[str, Any]
    inputs: list[str]
    rows: int = 0
    groups: int = 0
    responses: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    rewarded: int = 0  # responses
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in _UNITS})
    notes: Counter[str] = field(default_factory=Counter)  # kept, but not as one might expect
    first: dict[str, str] = field(default_factory=dict)  # reason -> where it was first met
    sha256: str = ""
    version: str = __version__

    def drop(self, what: str, reason: str, place: str, number: int = 1) -> None:
        """Count what is left out (``rows``, ``groups``, ``responses``), or only noted (``notes``)."""
        self.dropped.get(what, self.notes)[reason] += number
        self.first.setdefault(reason, place)

    def table(self) -> list[str]:
        """Counts for people, a line each."""
        said = ", ".join(f"{name} {count}" for name, count in sorted(self.sources.items()))
        lines = [
            f"{self.rows} rows: {self.groups} groups, {self.responses} responses ({said}), {self.rewarded} rewards"
        ]
        dropped = {f"dropped {name}": counts for name, counts in self.dropped.items()}
        for what, counts in (dropped | {"note": self.notes}).items():
            found = sorted((reason, count) for reason, count in counts.items() if count)
            lines += [f"{what}: {count} {reason} (first: {self.first[reason]})" for reason, count in found]
        return lines


def import_groups(
    inputs: Sequence[str], output: str | Path, mapping: Mapping, *, progress: bool = True
) -> ImportSummary:
    """Write a group file of the rows of ``inputs``, whole or not at all, and ``OUTPUT.summary.json`` beside it.

    Raises:
        InputError: an output that exists or cannot be written, an unreadable row, a mapping that does not fit the rows
            (a column that none has, a list that is none), or no group left.
    """
    output = Path(output)
    summary_file = output.with_name(output.name + ".summary.json")
    there = [path for path in (output, summary_file) if path.exists()]
    problems = output_problems(output) + [f"{path}: exists -> remove it, or choose another output" for path in there]
    refuse("cannot begin", problems)
    summary = ImportSummary(str(output), mapping.model_dump(mode="json"), list(inputs))
    with writing(output), working_folder(output) as folder:
        parts = _parts(inputs, mapping, summary, progress)
        together = _by_key(parts, folder / "rows") if mapping.group_by else ([part] for part in parts)
        write_group_file(made := folder / output.name, _records(together, summary))
        summary.sha256 = sha256_file(made)
        write_json(folder / summary_file.name, vars(summary))
        for file in (output, summary_file):
            os.replace(folder / file.name, file)
    return summary


def _parts(inputs: Sequence[str], mapping: Mapping, summary: ImportSummary, progress: bool) -> Iterator[Part]:
    reader, problems = RowReader(mapping, functools.partial(summary.drop, "responses")), ProblemLog()
    with ProgressBar(desc="importing", total=total_bytes(inputs), unit="B", show=progress) as bar:
        for row, place in (item for chunk in read_all(inputs, bar) for item in iter_rows(chunk, problems)):
            refuse_problems(problems)
            try:
                yield reader.part(row, place)
            except Dropped as reason:
                summary.drop("rows", str(reason), place)
            summary.rows += 1
            bar.set_postfix_str(f"{summary.rows} rows", refresh=False)
            bar.update(0)
            if summary.rows == _SURE_AFTER:
                _refuse_unseen(reader, place, row)
    refuse_problems(problems)
    _refuse_unseen(reader, inputs[-1], row if summary.rows else {})
    for name in reader.unseen:
        summary.drop("notes", f"no column {name}", inputs[0])


def _refuse_unseen(reader: RowReader, place: str, row: dict[str, Any]) -> None:
    if missing := [name for name, must in reader.unseen.items() if must]:
        problems = [f"no row has a column {name!r} -> name another, or leave it out" for name in missing]
        raise InputErrors(f"{place}: the mapping does not fit (this row has: {', '.join(row)})", problems)


def _by_key(parts: Iterable[Part], file: Path) -> Iterator[list[Part]]:
    """The parts of each group, in the order of the rows; groups in the order of their first rows."""
    with contextlib.closing(sqlite3.connect(file)) as waiting:
        waiting.execute("PRAGMA synchronous = OFF")  # nobody reads it after a crash
        waiting.execute("CREATE TABLE part (row INTEGER PRIMARY KEY, key TEXT, value TEXT)")
        for part in parts:
            key = hashlib.blake2b(part.key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            value = json.dumps(part._replace(key=key))
            waiting.execute("INSERT INTO part (key, value) VALUES (?, ?)", (key, value))
        waiting.execute("CREATE INDEX by_key ON part (key, row)")
        for (key,) in waiting.execute("SELECT key FROM part GROUP BY key ORDER BY min(row)"):
            values = waiting.execute("SELECT value FROM part WHERE key = ? ORDER BY row", (key,))
            yield [Part(*json.loads(value)) for (value,) in values]


def _records(groups: Iterable[list[Part]], summary: ImportSummary) -> Iterator[GroupRecord]:
    problems, ids = ProblemLog(POLICIES), set[bytes]()
    for parts in groups:
        value, place = _value(parts, summary), parts[0].place
        record = parse_group(value, place, problems)
        if record is not None and not check_group(record, problems.of_group(place, record.id)):
            record = None
        left = len(value["responses"]) - _count_problems(problems, summary)
        if record is not None and len(record.responses) < LEAST_RESPONSES:
            summary.drop("groups", "few_responses", place)
            record = None
        if record is None:
            summary.drop("responses", "group_dropped", place, left)
            continue
        rewarded = sum(response.reward is not None for response in record.responses)
        if 0 < rewarded < left:
            summary.drop("notes", "partly_rewarded", place)
        if (digest := id_digest(record.id)) in ids:
            summary.drop("notes", "duplicate_id", place)  # preprocessing has a policy for them
        ids.add(digest)
        summary.groups += 1
        summary.responses += left
        summary.rewarded += rewarded
        summary.sources.update(response.source for response in record.responses)
        yield record
    if not summary.groups:
        raise InputErrors("no group is left -> see to the mapping", summary.table())


def _count_problems(problems: ProblemLog, summary: ImportSummary) -> int:
    """Count what was found wrong with a group; return how many responses it cost alone."""
    alone = 0
    for problem in problems.take():
        single = problem.response is not None and KINDS[problem.kind].drops == "response"
        what = "notes" if problem.action == KEEP else "responses" if single else "groups"
        summary.drop(what, problem.kind, problem.place)
        alone += what == "responses"
    return alone


def _value(parts: list[Part], summary: ImportSummary) -> dict[str, Any]:
    """A group of the first row's prompt, the first answer, and the responses of all rows that agree with these."""
    first = parts[0]
    answer = next((part.answer for part in parts if part.answer is not None), None)
    responses: list[dict[str, Any]] = []
    for part in parts:
        if part.prompt == first.prompt and part.answer in (answer, None):
            responses += part.responses
        elif part.responses:
            other = "other_prompt" if part.prompt != first.prompt else "other_answer"
            summary.drop("responses", other, part.place, len(part.responses))
    content = json.dumps([first.key or first.prompt, answer, [item["text"] for item in responses if not first.key]])
    id_ = first.id or hashlib.sha256(content.encode()).hexdigest()[:16]
    return {"id": id_, "prompt": first.prompt, "answer": answer, "responses": responses, "meta": first.meta}
