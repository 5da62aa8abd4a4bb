"""Evaluate a Hugging Face folder on problems with known answers: accuracy, pass@k, log-prob of reference answers."""

from megatron_gft.atomic import check_output
from megatron_gft.chat_template import TEMPLATE_KWARGS_HELP, template_kwargs
from megatron_gft.commands.options import add_verifier, count, taken, tool_parser
from megatron_gft.errors import TRUST_HELP, command

EPILOG = """example:
  python tools/evaluate.py --model runs/quickstart/hf --problems heldout.jsonl --samples 8 --pass-at 1 4 \\
      --max-tokens 256 --output evaluation.json
"""


@command
def main(argv: list[str] | None = None) -> None:
    parser = tool_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--problems", nargs="+", required=True, help="JSONL, parquet, group file, dataset folder")
    parser.add_argument("--output", help="write the result as JSON")
    parser.add_argument("--limit", type=count(), help="use only the first problems")
    parser.add_argument("--split", default="test", help="split of a dataset folder (default %(default)s)")
    parser.add_argument("--prompt-column", help="default: prompt, question, problem or messages")
    parser.add_argument("--answer-column", help="gold answer (default: answer)")
    parser.add_argument("--reference-column", help="worked solution (default: solution, or answer with ####)")
    parser.add_argument("--prompt-template", help="text with {prompt} in it, put around every prompt")
    parser.add_argument("--no-greedy", dest="greedy", action="store_false", help="no greedy accuracy")
    reference_help = "no log-probs of reference answers"
    parser.add_argument("--no-reference", dest="reference_logprobs", action="store_false", help=reference_help)
    parser.add_argument("--samples", type=count(0, 10**6), default=0, help="of a problem, for pass@k (default none)")
    parser.add_argument("--pass-at", type=count(), nargs="+", default=[1], help="the k of pass@k (default 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the samples (default %(default)s)")
    parser.add_argument("--max-tokens", type=count(), default=512, help="longest response (default %(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="text that ends a response; may be repeated")
    parser.add_argument("--seed", type=count(0), default=0, help="of the samples (default %(default)s)")
    parser.add_argument("--batch-size", type=count(high=10**6), default=16, help="responses (default %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU")
    parser.add_argument("--device", help="default: cuda when there is one")
    parser.add_argument("--chat-template", help="template file, or none for raw text; default: the folder's own")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    parser.add_argument("--template-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=TEMPLATE_KWARGS_HELP)
    add_verifier(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)
    if options.output:
        check_output(options.output)

    from megatron_gft.atomic import write_json, writing
    from megatron_gft.evaluation.run import EvaluationOptions, evaluate, result_table
    from megatron_gft.sampling.local_model import LocalModel
    from megatron_gft.sampling.prompts import PromptColumns, PromptSet
    from megatron_gft.scoring.judging import ScoringOptions, key_values

    measured = taken(
        EvaluationOptions,
        options,
        pass_at=tuple(options.pass_at),
        stop=tuple(options.stop),
        template_kwargs=template_kwargs(options.template_kwargs),
        scoring=taken(ScoringOptions, options, verifier_options=key_values(options.option, "--option")),
    )
    columns = PromptColumns(options.prompt_column, options.answer_column, template=options.prompt_template)
    result = evaluate(
        lambda: LocalModel(
            options.model,
            dtype=options.dtype,
            device=options.device,
            chat_template=options.chat_template,
            trust_remote_code=options.trust_remote_code,
        ),
        PromptSet(options.problems, columns, options.split, options.limit),
        measured,
        progress=not options.quiet,
    )
    print(result_table(result), flush=True)
    if options.output:
        with writing(options.output):
            write_json(options.output, result)
