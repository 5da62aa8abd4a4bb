"""Make a group file: expert answers from columns, teacher and self responses sampled from models."""

from megatron_gft.chat_template import TEMPLATE_KWARGS_HELP, template_kwargs
from megatron_gft.commands.options import count, tool_parser
from megatron_gft.errors import command, shown

EPILOG = """examples:
  python tools/generate_groups.py --input gsm8k/train.parquet --output groups.jsonl \\
      --source "kind=column column=answer" \\
      --source "kind=openai url=http://host:8000/v1 model=Qwen/Qwen2.5-72B-Instruct k=3 temperature=0.7" \\
      --source "kind=transformers model=models/student k=4 max_tokens=512 logprobs=true"
  python tools/generate_groups.py --input prompts.jsonl --output groups.jsonl --config sources.yaml

Killed or failed: run the same command again, finished responses are kept in OUTPUT.journal.
Values of --source: text is taken as it is (quote what has spaces: system='Answer after ####'); lists and
mappings are YAML, and quotes inside a list need quotes around it: stop='["\\n\\n", "####"]'
Kinds of source and their keys: docs/configuration.md, at its end.
"""
SETTLED_HELP = "scored group files: leave out prompts whose self responses are all right, or all wrong, in two of them"


@command
def main(argv: list[str] | None = None) -> None:
    parser = tool_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--input", nargs="+", required=True, help="JSONL, parquet, or Hugging Face dataset folder")
    parser.add_argument("--output", required=True, help="group file: .jsonl or .jsonl.gz")
    parser.add_argument("--source", action="append", default=[], help='"kind=... key=value ...", once per source')
    parser.add_argument("--config", help="YAML file with sources: [...]")
    parser.add_argument("--seed", type=count(0), default=0, help="of the whole run (default %(default)s)")
    parser.add_argument("--limit", type=count(), help="use only the first prompts")
    parser.add_argument("--draw", type=count(), metavar="N", help="use N of the prompts, drawn by the seed")
    parser.add_argument("--settled", nargs="+", default=[], metavar="SCORED", help=SETTLED_HELP)
    parser.add_argument("--split", default="train", help="split of a dataset folder (default %(default)s)")
    parser.add_argument("--prompt-column", help="default: prompt, question, problem or messages")
    parser.add_argument("--answer-column", help="gold answer (default: answer)")
    parser.add_argument("--id-column", help="default: id, else a hash of the prompt")
    parser.add_argument(
        "--duplicates",
        choices=["error", "drop", "number"],
        default="error",
        help="rows with an id (without ids: a prompt) that came before: refuse, leave out, or append #2 to the id",
    )
    parser.add_argument("--template-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=TEMPLATE_KWARGS_HELP)
    parser.add_argument("--prompt-template", help="text with {prompt} in it, put around every prompt")
    parser.add_argument("--allow-failures", action="store_true", help="write the file without responses given up")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(argv)

    from megatron_gft.sampling.generation import GenerationRun
    from megatron_gft.sampling.prompts import PromptColumns, PromptSet
    from megatron_gft.sampling.selection import choose
    from megatron_gft.sampling.sources import load_sources

    sources = load_sources(options.source, options.config)
    columns = PromptColumns(
        options.prompt_column,
        options.answer_column,
        options.id_column,
        template=options.prompt_template,
        duplicates=options.duplicates,
    )
    prompts = PromptSet(options.input, columns, options.split, options.limit)
    prompts, left_out = choose(prompts, options.draw, options.seed, options.settled)
    kwargs = template_kwargs(options.template_kwargs)
    run = GenerationRun(prompts, options.output, sources, options.seed, kwargs, left_out)
    summary = run.execute(allow_failures=options.allow_failures, progress=not options.quiet)
    counts = ", ".join(f"{name} {sum(by.values())}" for name, by in summary.responses.items())
    dropped = dict(summary.dropped) or "none"
    print(shown(f"{summary.output}: {summary.groups} groups; responses: {counts}; dropped: {dropped}"))
    for note, times in summary.notes.items():
        print(shown(f"note: {note}: {times}"))
