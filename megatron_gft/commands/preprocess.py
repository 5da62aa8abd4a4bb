"""Turn group files into group shards: tokenized once, checked, ready for training."""

import gc
import os
import sys

from megatron_gft.chat_template import TEMPLATE_KWARGS_HELP, template_kwargs
from megatron_gft.commands.options import count, part, taken, tool_parser
from megatron_gft.errors import TRUST_HELP, command
from megatron_gft.groups.problems import describe_kinds, parse_policies

EXAMPLES = """examples:
  python tools/preprocess_groups.py --input groups.jsonl --tokenizer models/Qwen2.5-7B --output-prefix data/train
  python tools/preprocess_groups.py ... --tokenizer models/custom --trust-remote-code   (read its .py files before)
  python tools/preprocess_groups.py --input 'scored/*.jsonl' --tokenizer spm.model --chat-template none \\
      --output-prefix data/train --workers 16 --max-response-tokens 2048 --policy long_response=truncate
  sbatch --array=1-32 ... --part $SLURM_ARRAY_TASK_ID/32       (32 independent sets of shards; train on data/train*)

Parts need the same --input; a part of which no group is left writes PREFIX.empty and ends well.

problems and their policies (the default first); what is dropped or fixed is listed in PREFIX.report.ndjson:
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every shard is published, or this part of the input has none."""
    parser = tool_parser(description=__doc__, epilog=EXAMPLES + describe_kinds())
    files_help = "group files (.jsonl, .jsonl.gz, .parquet) or globs"
    parser.add_argument("--input", dest="inputs", nargs="+", required=True, metavar="FILE", help=files_help)
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or SentencePiece .model")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="shards become P, P-00001, ...")
    parser.add_argument("--chat-template", metavar="FILE|none", help="default: the tokenizer's own; none = raw text")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    parser.add_argument("--template-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=TEMPLATE_KWARGS_HELP)
    no_bos_help = "with --chat-template none: no BOS before a prompt"
    parser.add_argument("--no-bos", dest="add_bos", action="store_const", const=False, help=no_bos_help)
    parser.add_argument("--model", help="Hugging Face folder of the model: its vocabulary must hold the tokenizer")
    parser.add_argument(
        "--workers", type=count(high=1024), default=1, metavar="N", help="processes (default %(default)s)"
    )
    parser.add_argument("--policy", nargs="+", default=[], metavar="KIND=POLICY", help="what to do with bad input")
    parser.add_argument("--max-prompt-tokens", type=count(), metavar="N", help="longest prompt, template included")
    parser.add_argument("--max-response-tokens", type=count(), metavar="N", help="longest response, EOS included")
    parser.add_argument("--append", action="store_true", help="add further shards to those of the prefix")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="take every N-th row only, the I-th of N")
    parser.add_argument("--max-groups-per-shard", type=count(), default=1_000_000, metavar="N")
    parser.add_argument(
        "--max-mib-per-shard", type=count(), default=4096, metavar="N", help="of tokens (default %(default)s)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = parser.parse_args(argv)
    policies, own_part = parse_policies(arguments.policy), part(arguments.part)
    # Megatron-Core decorates with torch.compile, which loads Inductor: 1.2 of 5.5 seconds of CPU before the first row.
    # Nothing is compiled here, and nothing trains in this process.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()  # of what an import makes nothing is garbage: looking for it costs a second of CPU
    from megatron_gft.preprocess.run import PreprocessOptions, preprocess  # imports megatron: seconds

    if os.path.isdir(arguments.tokenizer):
        import transformers.models.auto.tokenization_auto  # noqa: F401  # what reading it will import
    gc.enable()
    summary = preprocess(
        taken(
            PreprocessOptions,
            arguments,
            template_kwargs=template_kwargs(arguments.template_kwargs),
            policies=policies,
            part=own_part,
            max_bytes_per_shard=arguments.max_mib_per_shard << 20,
        ),
        progress=not arguments.quiet,
    )
    for kind, actions in summary.problems.items():
        print(f"{kind}: " + ", ".join(f"{count} {action}" for action, count in actions.items()), file=sys.stderr)
    unscored = f" ({summary.unrewarded} without a reward: enough for sft and dft only)" if summary.unrewarded else ""
    print(
        f"{summary.groups} groups, {summary.responses} responses{unscored}, {summary.tokens} tokens in "
        f"{len(summary.prefixes)} shard(s) in {summary.seconds:.1f} s; report: {summary.report}",
        file=sys.stderr,
    )
    if not summary.prefixes:
        print(f"part {arguments.part} of the input has no group: nothing to write", file=sys.stderr)
    for prefix in summary.prefixes:
        print(prefix)
    return 0
