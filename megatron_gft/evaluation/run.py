"""How good is a model on a set of problems: accuracy, pass@k and the log-probability of reference answers.

    problems = PromptSet(["heldout.jsonl"])
    result = evaluate(lambda: LocalModel("models/student"), problems, EvaluationOptions(samples=8, pass_at=(1, 4)))
    print(result_table(result))

Problems are read as ``tools/generate_groups.py`` reads prompts; a reference answer is an expert response of a group, or
the column of worked solutions. Every share comes with its number of problems and a 95 % interval: Wilson's for greedy
accuracy, the normal approximation over problems for pass@k and for log-probabilities per answer, and for the mean per
token that of a ratio (problems are the independent units, tokens are not).
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_gft import __version__
from megatron_gft.chat_template import TemplateOptions
from megatron_gft.errors import InputError, refuse
from megatron_gft.evaluation.intervals import mean_interval, pass_at_k_summary, ratio_interval, wilson_interval
from megatron_gft.groups import cell
from megatron_gft.progress import ProgressBar
from megatron_gft.sampling.local_backends import TransformersBackend, encode_prompt
from megatron_gft.sampling.local_model import LocalModel
from megatron_gft.sampling.prompts import PromptRow, PromptSet, scalar_text
from megatron_gft.sampling.settings import (
    Sample,
    SampleFailure,
    SampleRequest,
    SamplingParams,
    model_fingerprint,
    sample_seed,
)
from megatron_gft.sampling.written import prompt_opens
from megatron_gft.scoring.judging import ScoringOptions
from megatron_gft.scoring.thoughts import unfit_thoughts
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
        template_kwargs: variables of the chat template; those of a row go before.
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
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)

    def of_row(self, row: PromptRow) -> TemplateOptions:
        """What the chat template gets for a problem."""
        return TemplateOptions.of_row(row.meta, self.template_kwargs)

    def __post_init__(self) -> None:
        needs = f"pass@{list(self.pass_at)} with {self.samples} samples -> each k in 1..samples"
        problems = {
            f"max_tokens={self.max_tokens} -> at least 1": self.max_tokens < 1,
            f"batch_size={self.batch_size} -> at least 1": self.batch_size < 1,
            f"samples={self.samples} -> 0 for none, or more": self.samples < 0,
            f"temperature={self.temperature} -> a number, 0 or more": not 0 <= self.temperature < math.inf,  # nor NaN
            f"top_p={self.top_p} -> more than 0, at most 1": not 0 < self.top_p <= 1,
            "an empty stop text would end every response -> leave it out": not all(self.stop),
            "samples at temperature 0 are all the same -> set a temperature": self.samples and self.temperature == 0,
            needs: self.samples and not (self.pass_at and all(1 <= k <= self.samples for k in self.pass_at)),
            "nothing to measure -> greedy, samples or reference_logprobs": not (self.judges or self.reference_logprobs),
        }
        refuse("evaluation", [problem for problem, is_so in problems.items() if is_so])

    @property
    def judges(self) -> bool:
        """Whether responses are sampled and judged."""
        return self.greedy or self.samples > 0


def evaluate(
    load_model: Callable[[], LocalModel], problems: PromptSet, options: EvaluationOptions, *, progress: bool = True
) -> dict[str, Any]:
    """Measure a model on problems.

    Problems, verifier and references are checked before the model is loaded, lengths before it works.

    Returns:
        JSON object: ``num_problems``, and as asked for ``greedy`` (``accuracy``, ``interval``, ``outcomes``, ...),
        ``pass_at_k`` (``{k: {value, interval}}``) and ``reference`` (``logprob_per_token``, ``logprob_per_answer``,
        each with ``interval``); lineage and options beside them. ``by_problem`` and ``by_answer`` hold each one's
        result in the order of the problems, for paired comparisons of two models.

    Raises:
        InputErrors: no problems, problems without gold answer for a verifier that needs one, a verifier that cannot
            be built, no such reference column, prompts that do not fit the model.
    """
    with contextlib.ExitStack() as stack:
        rows, pool = _prepare(problems, options, stack)
        model = load_model()
        result: dict[str, Any] = {
            "model": model.path,
            "checkpoint": model_fingerprint(model.path),
            "problems": [str(path) for path in problems.inputs],
            "num_problems": len(rows),
            "version": __version__,
            "findings": [f"{kind}: {detail}" for kind, detail in model.tokenizer.problems()],
            "options": asdict(options) | {"scoring": options.scoring.description() if options.judges else None},
        }
        if pool is not None:
            result |= _Responses(model, rows, pool, options, progress).measured()
    if options.reference_logprobs:
        result["reference"] = _reference(model, rows, options, progress)
    return result


def _prepare(
    prompts: PromptSet, options: EvaluationOptions, stack: contextlib.ExitStack
) -> tuple[list[PromptRow], VerifierPool | None]:
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
    found += itertools.islice((problem for row in rows for problem in _row_problems(row, options)), SHOWN_PROBLEMS)
    pool = None
    if options.judges:
        try:
            pool = stack.enter_context(VerifierPool(options.scoring))
        except InputError as error:
            found.append(str(error))
    refuse("cannot begin", found)
    return rows, pool


def _row_problems(row: PromptRow, options: EvaluationOptions) -> Iterator[str]:
    try:
        options.of_row(row)
    except InputError as error:
        yield f"{row.place}: {error}"
    if options.judges and not options.scoring.can_judge(row.answer):
        yield f"{row.place}: id {row.id!r} has no gold answer -> set --answer-column, or measure log-probs only"
    if options.reference_logprobs:
        try:
            list(reference_texts(row, options.reference_column))
        except InputError as error:
            yield str(error)


@dataclass(frozen=True)
class _Responses:
    """What makes judged responses of a model to problems."""

    model: LocalModel
    rows: Sequence[PromptRow]
    pool: VerifierPool
    options: EvaluationOptions
    progress: bool

    def measured(self) -> dict[str, Any]:
        """What is measured of judged responses: ``greedy``, ``sampled`` and ``pass_at_k``, as asked for."""
        options, result = self.options, dict[str, Any]()
        self.check_lengths()
        params = SamplingParams(0.0, max_tokens=options.max_tokens, stop=options.stop)
        if options.greedy:
            verdicts, samples = self.judged("greedy", params, 1)
            correct = sum(verdict.outcome == "correct" for verdict in verdicts)
            result["greedy"] = {
                "accuracy": correct / len(verdicts),
                "interval": wilson_interval(correct, len(verdicts)),
                "correct": correct,
                "by_problem": [verdict.outcome for verdict in verdicts],
                **_outcomes(verdicts, samples),
            }
        if options.samples:
            params = replace(params, temperature=options.temperature, top_p=options.top_p)
            verdicts, samples = self.judged("sampling", params, options.samples)
            right = [verdict.outcome == "correct" for verdict in verdicts]
            by_problem = [sum(right[i : i + options.samples]) for i in range(0, len(right), options.samples)]
            result["sampled"] = _outcomes(verdicts, samples)
            result["pass_at_k"] = {str(k): pass_at_k_summary(options.samples, by_problem, k) for k in options.pass_at}
        return result

    def check_lengths(self) -> None:
        longest, tokenizer = self.model.max_positions - self.options.max_tokens, self.model.tokenizer
        problems = (
            f"{row.place}: {problem}" + " -> lower --max-tokens or leave the problem out" * (" -> " not in problem)
            for row in self.rows
            if (problem := encode_prompt(tokenizer, row.prompt, longest, self.options.of_row(row))[1]) is not None
        )
        refuse("problems that the model cannot be asked", itertools.islice(problems, SHOWN_PROBLEMS))

    def judged(self, name: str, params: SamplingParams, count: int) -> tuple[list[Verdict], list[Sample]]:
        """``count`` responses for each problem and their verdicts, in the problems' order."""
        owners = [(row, k) for row in self.rows for k in range(count)]
        requests = [
            SampleRequest(str(i), row.prompt, sample_seed(self.options.seed, row.id, name, k), self.options.of_row(row))
            for i, (row, k) in enumerate(owners)
        ]
        found: dict[str, Sample] = {}
        backend, tokenizer = TransformersBackend(self.model, self.options.batch_size), self.model.tokenizer
        with ProgressBar(None, name, total=len(requests), unit="response", show=self.progress) as bar:
            for outcome in backend.generate(requests, params, lambda key: False):
                if isinstance(outcome, SampleFailure):
                    row, _ = owners[int(outcome.key)]
                    raise InputError(f"{row.place}: {outcome.reason} -> leave the problem out")
                found[outcome.key] = outcome
                bar.update()
        samples = [found[request.key] for request in requests]
        cases = (
            Case(said.text, row.answer, row.prompt, row.meta, prompt_opens(tokenizer, row.prompt, asked.options, False))
            for said, asked, (row, _) in zip(samples, requests, owners, strict=True)
        )
        bar = ProgressBar(self.pool.judge(cases), "judging", total=len(samples), unit="response", show=self.progress)
        return list(bar), samples


def _outcomes(verdicts: Sequence[Verdict], samples: Sequence[Sample]) -> dict[str, Any]:
    return {
        "num_responses": len(verdicts),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts)),
        "truncated": sum(said.finish_reason == "length" for said in samples),
        "mean_tokens": sum(len(said.token_ids or ()) for said in samples) / len(samples),
        "examples": [
            {"text": said.text, "outcome": verdict.outcome, "judged": verdict.detail}
            for said, verdict in list(zip(samples, verdicts, strict=True))[:SHOWN_SAMPLES]
        ],
    }


def _reference(
    model: LocalModel, rows: Sequence[PromptRow], options: EvaluationOptions, progress: bool
) -> dict[str, Any] | None:
    """Teacher-forced log-probs of reference answers, EOS included; ``None`` when the problems have none."""
    pairs: list[tuple[list[int], list[int]]] = []
    too_long, unfit = 0, Counter[str]()
    for row in rows:
        rendered = model.tokenizer.render_prompt(row.prompt, options.of_row(row))
        prompt = model.tokenizer.encode(rendered)
        for text in reference_texts(row, options.reference_column):
            unfit.update(filter(None, [unfit_thoughts(rendered, text)]))
            response = [*model.tokenizer.encode_response(text), model.tokenizer.eos_id]
            if len(prompt) + len(response) > model.max_positions:
                too_long += 1
            else:
                pairs.append((prompt, response))
    if not pairs:
        return None
    with ProgressBar(None, "reference answers", total=len(pairs), unit="answer", show=progress) as bar:
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
        "unfit": dict(unfit),
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
        if not (text := scalar_text(cell(row.columns, column), row.place, column)):
            raise InputError(f"{row.place}: no column {column!r} -> set --reference-column")
        yield text
        return
    for name in REFERENCE_COLUMNS:
        text = row.columns.get(name)
        if isinstance(text, str) and (name == "solution" or "####" in text):
            yield text
            return


def result_table(result: dict[str, Any]) -> str:
    """The result of :func:`evaluate` for people."""
    lines = [f"{result['model']} on {result['num_problems']} problems", *(f"  {it}" for it in result["findings"])]

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
        for kind, count in reference["unfit"].items():
            lines.append(f"  {kind}: {count} reference answers do not fit the thoughts that the prompt opens")
        if reference["too_long"]:
            lines.append(f"  reference answers too long for the model, left out: {reference['too_long']}")
    return "\n".join(lines)


def _outcome_note(counts: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {number}" for name, number in counts["outcomes"].items())
    return f"{said}; truncated {counts['truncated']}; {counts['mean_tokens']:.0f} tokens on average"
