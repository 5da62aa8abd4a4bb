"""Judge the responses of group files: writes a new group file with a reward and an outcome for each response."""

from megatron_gft.commands.options import add_verifier, taken, tool_parser
from megatron_gft.errors import InputError, command

EPILOG = """examples:
  python tools/score_groups.py --input groups.jsonl --output scored.jsonl --verifier math --workers 8
  python tools/score_groups.py --input groups.jsonl --output scored.jsonl --verifier my_package.rewards:judge
  python tools/score_groups.py --input groups.jsonl --output scored.jsonl --verifier math --option units=ignore

verifiers: math (options percent=off|ignore|value, units=off|ignore), exact (part=whole|answer, case=sensitive|ignore),
choice (letters=ABCDE), module:function. Outcomes: correct, wrong, unparsed, timeout, error.

Killed or failed: run the same command again. Verdicts are kept meanwhile in OUTPUT.journal.
"""
MISSING_HELP = "groups without gold answer, if the verifier needs one: an error, or left without reward and outcome"


def reward_values(settings: list[str]) -> dict[str, float | None]:
    """``["wrong=-1", "timeout=null"]`` -> numbers, ``None`` for null."""
    from megatron_gft.scoring.judging import key_values

    pairs = key_values(settings, "--reward").items()
    try:
        return {outcome: None if text == "null" else float(text) for outcome, text in pairs}
    except ValueError as error:
        raise InputError(f"--reward: {error} -> OUTCOME=NUMBER or OUTCOME=null") from None


@command
def main(argv: list[str] | None = None) -> None:
    parser = tool_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--input", nargs="+", required=True, help="group files")
    parser.add_argument("--output", required=True, help="group file to write")
    add_verifier(parser)
    parser.add_argument("--reward", action="append", default=[], metavar="OUTCOME=VALUE", help="e.g. wrong=-1")
    parser.add_argument("--missing-answer", choices=("error", "null"), default="error", help=MISSING_HELP)
    parser.add_argument("--memory-limit", type=float, default=8.0, help="GiB per worker (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)

    from megatron_gft.groups import expand_inputs
    from megatron_gft.scoring.judging import ScoringOptions, key_values
    from megatron_gft.scoring.score import score_group_file

    scoring = taken(
        ScoringOptions,
        options,
        verifier_options=key_values(options.option, "--option"),
        memory_limit_gib=options.memory_limit,
        rewards=reward_values(options.reward),
    )
    summary = score_group_file(expand_inputs(options.input), options.output, scoring, progress=not options.quiet)
    print(f"{options.output}: {summary.groups} groups, {summary.responses} responses\n{summary.table()}")
