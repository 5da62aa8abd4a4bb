"""Make a group file out of rows that others stored: lists, ratings, pairs, or one row a response."""

from pathlib import Path
from typing import get_origin

from megatron_gft.commands.options import tool_parser
from megatron_gft.errors import InputError, command

EPILOG = """examples:
  python tools/import_groups.py --input 'OpenR1-Math-220k/data/*.parquet' --mapping openr1-math --output groups.jsonl
  python tools/import_groups.py --input uf.jsonl --mapping ultrafeedback --reward overall_score --output groups.jsonl.gz
  python tools/import_groups.py --input rows.json --output groups.jsonl --prompt question \\
      --answer reward_model.ground_truth --text 'solution_*' --source teacher
  python tools/import_groups.py --input 'rollouts/*.jsonl' --output groups.jsonl --prompt input --group-by input \\
      --text output --reward score --source self

A mapping is a YAML file, or the name of one in examples/import/; options replace its values. What is left out is
counted by reason, here and in OUTPUT.summary.json. Without rewards, go on with tools/score_groups.py.
"""


@command
def main(argv: list[str] | None = None) -> None:
    from megatron_gft.commands.train import recipes
    from megatron_gft.groups import expand_inputs
    from megatron_gft.groups.importing import import_groups
    from megatron_gft.groups.mapping import Mapping, Responses, load_mapping

    parser = tool_parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL, JSON or parquet, or globs")
    parser.add_argument("--output", required=True, help="group file: .jsonl or .jsonl.gz; must not exist")
    parser.add_argument("--mapping", metavar="NAME|FILE", help="where things are in a row")
    for section in (Mapping, Responses):
        for name, field in section.model_fields.items():
            if name not in ("sources", "responses"):
                nargs = "+" if get_origin(field.annotation) is list else None
                parser.add_argument(f"--{name.replace('_', '-')}", nargs=nargs, metavar="NAME", help=field.description)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)

    file = Path(options.mapping) if options.mapping else None
    if file is not None and not file.is_file():
        presets = {path.stem: path for path in sorted((recipes() / "examples" / "import").glob("*.yaml"))}
        if (file := presets.get(options.mapping)) is None:
            known = ", ".join(presets)
            raise InputError(f"--mapping {options.mapping}: neither a file nor one of {known} -> name one of these")
    given = {name: value for name, value in vars(options).items() if value is not None}
    group, responses = ({n: given[n] for n in section.model_fields if n in given} for section in (Mapping, Responses))
    mapping = load_mapping(file, group, responses)
    summary = import_groups(expand_inputs(options.input), options.output, mapping, progress=not options.quiet)
    print("\n".join([f"{options.output}:", *summary.table()]))
