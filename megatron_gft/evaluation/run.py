"""How good is a model on a set of problems: accuracy, pass@k and the log-probability of reference answers.

    result = evaluate("models/student", ["heldout.jsonl"], EvaluationOptions(samples=8, pass_at=(1, 4)))
    print(result_table(result))

Problems are read as ``tools/generate_groups.py`` reads prompts; a reference answer is an expert response of a group, or
the column of worked solutions. Every share comes with its number of problems and a 95 % interval: Wilson's for greedy
accuracy, the normal approximation over problems for pass@k and for log-probabilities per answer, and for the mean per
token that of a ratio (problems are the independent units, tokens are not).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_gft import __version__
from megatron_gft.errors import InputError, InputErrors
from megatron_gft.evaluation.intervals import mean_interval, pass_at_k_summary, ratio_interval, wilson_interval
from megatron_gft.sampling.local_backends import TransformersBackend, encode_prompt
from megatron_gft.sampling.local_model import LocalModel
from megatron_gft.sampling.prompts import PromptColumns, PromptRow, PromptSet
from megatron_gft.sampling.settings import SampleFailure, SampleRequest, SamplingParams, model_fingerprint, sample_seed
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.verifier_pool import VerifierPool
from megatron_gft.scoring.verifiers import Case, Verdict

REFERENCE_COLUMNS = ("solution", "answer")
SHOWN_SAMPLES = 5
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure.

    Args:
        greedy: one response at temperature 0 per problem.
        samples: responses per problem at ``temperature`` for pass@k; 0 for none.
        pass_at: the k of pass@k, each at most ``samples``.
        reference_logprobs: teacher-force the reference answers.
        reference_column: of the worked solution; default ``solution``, else an ``answer`` that holds ``####``.
        scoring: verifier, workers and limits.

    Raises:
        InputErrors: settings that cannot be, or nothing to measure.
    """

    greedy: bool = True
    samples: int = 0
    pass_at: tuple[int, ...] = (1,)
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 16
    reference_logprobs: bool = True
    reference_column: str | None = None
    scoring: ScoringOptions = field(default_factory=ScoringOptions)

    def __post_init__(self) -> None:
        problems = []
        for name, value in (("max_tokens", self.max_tokens), ("batch_size", self.batch_size)):
            if value < 1:
                problems.append(f"{name}={value} -> at least 1")
        if self.samples < 0:
            problems.append(f"samples={self.samples} -> 0 for none, or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.append(f"temperature={self.temperature} -> a number, 0 or more")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p} -> more than 0, at most 1")
        if any(not text for text in self.stop):
            problems.append("an empty stop text would end every response -> leave it out")
        if self.samples and self.temperature == 0:
            problems.append("samples at temperature 0 are all the same -> set a temperature")
        if self.samples and (not self.pass_at or max(self.pass_at) > self.samples or min(self.pass_at) < 1):
            problems.append(f"pass@{list(self.pass_at)} with {self.samples} samples -> each k in 1..samples")
        if not (self.greedy or self.samples or self.reference_logprobs):
            problems.append("nothing to measure -> greedy, samples or reference_logprobs")
        if problems:
            raise InputErrors("evaluation", problems)

    @property
    def judges(self) -> bool:
        """Whether responses are sampled and judged."""
        return self.greedy or self.samples > 0


def evaluate(
    model: str | Path | LocalModel | Callable[[], LocalModel],
    problems: Sequence[str | Path],
    options: EvaluationOptions | None = None,
    *,
    columns: PromptColumns | None = None,
    split: str = "test",
    limit: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a Hugging Face folder on problem files.

    Problems, verifier and references are checked before the model is loaded, lengths before it works.

    Args:
        model: folder, or a model (with another dtype, device or chat template), or a function that loads it.
        problems: JSONL, parquet or group files, or dataset folders.

    Returns:
        JSON object: ``num_problems``, and as asked for ``greedy`` (``accuracy``, ``interval``, ``outcomes``, ...),
        ``pass_at_k`` (``{k: {value, interval}}``) and ``reference`` (``logprob_per_token``, ``logprob_per_answer``,
        each with ``interval``); lineage and options beside them. ``by_problem`` and ``by_answer`` hold each one's
        result in the order of the problems, for paired comparisons of two models.

    Raises:
        InputErrors: no problems, problems without gold answer for a verifier that needs one, a verifier that cannot
            be built, no such reference column, prompts that do not fit the model.
    """
    options = options or EvaluationOptions()
    prompts = PromptSet(problems, columns or PromptColumns(), split, limit)
    with contextlib.ExitStack() as stack:
        rows, pool = _prepare(prompts, options, stack)
        local = model if isinstance(model, LocalModel) else model() if callable(model) else LocalModel(model)
        _check_lengths(local, rows, options)
        result: dict[str, Any] = {
            "model": local.path,
            "checkpoint": model_fingerprint(local.path),
            "problems": [str(path) for path in problems],
            "num_problems": len(rows),
            "version": __version__,
            "options": asdict(replace(options, scoring=ScoringOptions()))
            | {"scoring": options.scoring.description() if options.judges else None},
        }
        params = SamplingParams(0.0, max_tokens=options.max_tokens, stop=options.stop)
        if options.greedy:
            verdicts, texts = _answer(local, rows, params, 1, options, pool, "greedy", progress)
            result["greedy"] = _accuracy([verdict for (verdict,) in verdicts], texts)
        if options.samples:
            params = replace(params, temperature=options.temperature, top_p=options.top_p)
            verdicts, texts = _answer(local, rows, params, options.samples, options, pool, "sampling", progress)
            result["sampled"] = _outcomes([verdict for group in verdicts for verdict in group], texts)
            correct = [sum(verdict.outcome == "correct" for verdict in group) for group in verdicts]
            result["pass_at_k"] = {str(k): pass_at_k_summary(options.samples, correct, k) for k in options.pass_at}
    if options.reference_logprobs:
        result["reference"] = _reference(local, rows, options.reference_column, progress)
    return result


def _prepare(
    prompts: PromptSet, options: EvaluationOptions, stack: contextlib.ExitStack
) -> tuple[list[PromptRow], VerifierPool]:
    """The problems and the workers of the verifier (only if there is something to judge).

    Raises:
        InputErrors: all that is wrong with them.
    """
    found: list[str] = []
    rows: list[PromptRow] = []
    try:
        rows = list(prompts)
        if not rows:
            found.append(f"{', '.join(map(str, prompts.inputs))}: no problems in there -> check the files")
    except InputError as error:
        found.append(str(error))
    found += itertools.islice(_row_problems(rows, options), SHOWN_PROBLEMS)
    pool: Any = None
    if options.judges:
        try:
            pool = stack.enter_context(VerifierPool(options.scoring))
        except InputError as error:
            found.append(str(error))
    if found:
        raise InputErrors("cannot begin", found)
    return rows, pool


def _row_problems(rows: Iterable[PromptRow], options: EvaluationOptions) -> Iterator[str]:
    for row in rows:
        if options.judges and not options.scoring.can_judge(row.answer):
            yield f"{row.place}: id {row.id!r} has no gold answer -> set --answer-column, or measure log-probs only"
        if options.reference_logprobs:
            try:
                list(reference_texts(row, options.reference_column))
            except InputError as error:
                yield str(error)


def _check_lengths(model: LocalModel, rows: Iterable[PromptRow], options: EvaluationOptions) -> None:
    if not options.judges:
        return
    longest = model.max_positions - options.max_tokens
    problems = (
        f"{row.place}: {problem} -> lower --max-tokens or leave the problem out"
        for row in rows
        if (problem := encode_prompt(model.tokenizer, row.prompt, longest)[1]) is not None
    )
    if shown := list(itertools.islice(problems, SHOWN_PROBLEMS)):
        raise InputErrors("problems that the model cannot be asked", shown)


@dataclass(frozen=True)
class _Text:
    text: str
    finish_reason: str
    tokens: int


def _answer(
    model: LocalModel,
    rows: Sequence[PromptRow],
    params: SamplingParams,
    count: int,
    options: EvaluationOptions,
    pool: VerifierPool,
    name: str,
    progress: bool,
) -> tuple[list[list[Verdict]], list[_Text]]:
    """``count`` judged responses for each problem, in the problems' order."""
    requests = [
        SampleRequest(f"{i}/{k}", row.prompt, sample_seed(options.seed, row.id, name, k))
        for i, row in enumerate(rows)
        for k in range(count)
    ]
    texts: dict[str, _Text] = {}
    backend = TransformersBackend(model, options.batch_size)
    with tqdm(total=len(requests), desc=name, unit="response", disable=not progress) as bar:
        for outcome in backend.generate(requests, params, lambda key: False):
            if isinstance(outcome, SampleFailure):
                row = rows[int(outcome.key.split("/")[0])]
                raise InputError(f"{row.place}: {outcome.reason} -> leave the problem out")
            length = len(outcome.token_ids) if outcome.token_ids is not None else 0
            texts[outcome.key] = _Text(outcome.text, outcome.finish_reason, length)
            bar.update()
    ordered = [texts[request.key] for request in requests]
    owners = [row for row in rows for _ in range(count)]
    cases = (Case(said.text, row.answer, row.prompt, row.meta) for said, row in zip(ordered, owners, strict=True))
    judged = tqdm(pool.judge(cases), total=len(ordered), desc="judging", unit="response", disable=not progress)
    verdicts = list(judged)
    return [verdicts[i : i + count] for i in range(0, len(verdicts), count)], ordered


def _outcomes(verdicts: Sequence[Verdict], texts: Sequence[_Text]) -> dict[str, Any]:
    return {
        "num_responses": len(verdicts),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts)),
        "truncated": sum(said.finish_reason == "length" for said in texts),
        "mean_tokens": math.fsum(said.tokens for said in texts) / len(texts),
        "examples": [
            {"text": said.text, "outcome": verdict.outcome, "judged": verdict.detail}
            for said, verdict in list(zip(texts, verdicts, strict=True))[:SHOWN_SAMPLES]
        ],
    }


def _accuracy(verdicts: Sequence[Verdict], texts: Sequence[_Text]) -> dict[str, Any]:
    correct = sum(verdict.outcome == "correct" for verdict in verdicts)
    return {
        "accuracy": correct / len(verdicts),
        "interval": wilson_interval(correct, len(verdicts)),
        "correct": correct,
        "by_problem": [verdict.outcome for verdict in verdicts],
        **_outcomes(verdicts, texts),
    }


def _reference(
    model: LocalModel, rows: Sequence[PromptRow], column: str | None, progress: bool
) -> dict[str, Any] | None:
    """Teacher-forced log-probs of reference answers, EOS included; ``None`` when the problems have none."""
    pairs: list[tuple[list[int], list[int]]] = []
    too_long = 0
    for row in rows:
        prompt = model.prompt_ids(row.prompt)
        for text in reference_texts(row, column):
            response = [*model.tokenizer.encode_response(text), model.tokenizer.eos_id]
            if len(prompt) + len(response) > model.max_positions:
                too_long += 1
            else:
                pairs.append((prompt, response))
    if not pairs:
        return None
    with tqdm(total=len(pairs), desc="reference answers", unit="answer", disable=not progress) as bar:
        logprobs = model.response_logprobs(pairs, bar.update)
    sums, lengths = [math.fsum(values) for values in logprobs], [len(values) for values in logprobs]
    per_token, token_interval = ratio_interval(sums, lengths)
    per_answer, answer_interval = mean_interval(sums)
    return {
        "logprob_per_token": per_token,
        "logprob_per_token_interval": token_interval,
        "logprob_per_answer": per_answer,
        "logprob_per_answer_interval": answer_interval,
        "num_answers": len(pairs),
        "num_tokens": sum(lengths),
        "by_answer": [{"logprob": total, "tokens": length} for total, length in zip(sums, lengths, strict=True)],
        "too_long": too_long,
    }


def reference_texts(row: PromptRow, column: str | None) -> Iterator[str]:
    """Worked answers of a problem: expert responses of a group, or the text of a column.

    Raises:
        InputError: the column was named and is not there.
    """
    if row.responses:
        yield from (response.text for response in row.responses if response.source == "expert")
        return
    if column is not None:
        if not row.columns.get(column):
            raise InputError(f"{row.place}: no column {column!r} -> set --reference-column")
        yield str(row.columns[column])
        return
    for name in REFERENCE_COLUMNS:
        text = row.columns.get(name)
        if isinstance(text, str) and (name == "solution" or "####" in text):
            yield text
            return


def result_table(result: dict[str, Any]) -> str:
    """The result of :func:`evaluate` for people."""
    lines = [f"{result['model']} on {result['num_problems']} problems"]

    def line(name: str, value: float, interval: Sequence[float] | None, note: str) -> None:
        span = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "-"
        lines.append(f"  {name:<24}{value:>10.4f}  95 % {span:<22} {note}")

    if greedy := result.get("greedy"):
        note = f"{greedy['correct']} of {greedy['num_responses']}, {_outcome_note(greedy)}"
        line("greedy accuracy", greedy["accuracy"], greedy["interval"], note)
    for k, entry in result.get("pass_at_k", {}).items():
        line(f"pass@{k}", entry["value"], entry["interval"], f"{entry['samples']} samples each")
    if sampled := result.get("sampled"):
        lines.append(f"  sampled responses: {_outcome_note(sampled)}")
    if reference := result.get("reference"):
        for unit in ("token", "answer"):
            key = f"logprob_per_{unit}"
            note = f"{reference[f'num_{unit}s']} {unit}s"
            line(f"reference log-prob/{unit}", reference[key], reference[f"{key}_interval"], note)
        if reference["too_long"]:
            lines.append(f"  reference answers too long for the model, left out: {reference['too_long']}")
    return "\n".join(lines)


def _outcome_note(counts: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {number}" for name, number in counts["outcomes"].items())
    return f"{said}; truncated {counts['truncated']}; {counts['mean_tokens']:.0f} tokens on average"
