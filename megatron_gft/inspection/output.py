"""Reports and groups for people: text for the terminal, and one self-contained HTML page.

Colour of a response token says what training does with it: green is made more likely (advantage > 0), red less
likely, grey is not trained (prompt, or advantage 0). On the page its strength is A*u*c, or A*u where c is not known.
Neighbouring tokens alternate in underlining, so that boundaries are visible; special tokens are inverted.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.table import Table

from megatron_gft.groups.problems import KINDS
from megatron_gft.inspection.views import GroupView, TokenView
from megatron_gft.objectives import HeadSettings

_STYLES = {"plus": "green", "minus": "red", "zero": "bright_black", "prompt": "bright_black"}
_NUMERIC = re.compile(r"[-\d.,%x]+")
_UNLIMITED = 100_000  # columns of what is no terminal: nothing is wrapped

# Text of models and files must not steer a terminal: control characters and turns of direction are spelled.
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_SPELLED |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
_SPELLED_IN_LINES = {code: text for code, text in _SPELLED.items() if chr(code) not in "\t\n"}


def _visible(value: Any) -> Any:
    return value.translate(_SPELLED_IN_LINES) if isinstance(value, str) else value


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def group_text(view: GroupView, colour: bool) -> str:
    """A group for the terminal; without colour, token boundaries are marked by ``|``."""

    def styled(text: str, style: str) -> str:
        return Style.parse(style).render(_visible(text), color_system=ColorSystem.STANDARD if colour else None)

    def line(tokens: Sequence[TokenView], role: str) -> str:
        looks = (f"{_STYLES[role]}{' underline' * (i % 2)}{' reverse' * t.special}" for i, t in enumerate(tokens))
        return ("" if colour else "|").join(styled(t.text, look) for t, look in zip(tokens, looks, strict=True))

    lines = [styled(view.title, "bold"), styled(f"gold answer: {view.answer}", ""), ""]
    lines += [styled(f"prompt: {view.prompt_length:,} {view.unit}", "bold"), line(view.prompt, "prompt")]
    for number, response in enumerate(view.responses):
        lines += ["", styled(f"response {number}: {response.headline}", "bold"), line(response.tokens, response.role)]
    return "\n".join(lines) + "\n"


def report_text(report: dict[str, Any], colour: bool = False, columns: int | None = None) -> str:
    """The report as tables, folded into so many ``columns`` of a terminal; None = as wide as they are."""
    console = Console(
        force_terminal=colour,
        color_system="standard" if colour else None,
        width=columns or _UNLIMITED,
        markup=False,  # what looks like markup or an emoji's name is text of the data
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    with console.capture() as captured:
        for title, (heading, *rows) in _tables(report):
            console.print(title, style="bold")
            table = Table(box=None, show_header=any(heading), header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
            cells = [[cell.translate(_SPELLED) for cell in row] for row in rows]
            for i, name in enumerate(heading):
                numeric = all(_NUMERIC.fullmatch(row[i]) for row in cells)
                table.add_column(name, justify="right" if numeric else "left", overflow="fold")
            for row in cells:
                table.add_row(*row)
            console.print(table, "")
    return re.sub(r" +$", "", captured.get(), flags=re.MULTILINE).rstrip()


def _tables(report: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows (the first is the heading) of each table."""
    unit = report["unit"]
    names = ("groups", "responses", "missing_rewards", "zero_variance_groups", "zero_variance_share")
    counts = [[name.replace("_", " "), _number(report[name])] for name in names]
    counts += [[f"{what} {unit}", _number(report[f"total_{what}_length"])] for what in ("prompt", "response")]
    yield "Counts", [["", ""], *counts]
    heading = ["", "mean", "min", "median", "p90", "p99", "max"]
    spans = {
        f"prompt ({unit})": report["prompt_length"],
        f"response ({unit})": report["response_length"],
        "responses (per group)": report["responses_per_group"],
        "reward (known)": report["rewards"],
    }
    rows = [[title, *(_number(of[column]) for column in heading[1:])] for title, of in spans.items() if of]
    yield "Lengths and rewards", [heading, *rows]
    sources = [["source", "responses", f"mean {unit}", "mean reward", "cut off", "outcomes"]]
    for name, of in report["by_source"].items():
        outcomes = ", ".join(f"{outcome} {n}" for outcome, n in of["outcomes"].items()) or "-"
        numbers = [of["responses"], of["length"]["mean"], of["mean_reward"], of["truncated"]]
        sources.append([name, *map(_number, numbers), outcomes])
    yield "Sources", sources
    if report.get("incomplete_sets"):
        yield "Incomplete sets", [["shards"], *([line] for line in report["incomplete_sets"])]
    if "packing" in report:
        yield "Packing", [["", ""], *map(list, _packing(report["packing"]).items())]
    if report["problems"]:
        problems = [[kind, _number(count), KINDS[kind].meaning] for kind, count in report["problems"].items()]
        yield "Problems", [["kind", "found", "meaning"], *problems]
        examples = [[kind, line] for kind, lines in report["examples"].items() for line in lines]
        yield "Examples", [["kind", "where"], *examples]


def _packing(packing: dict[str, Any]) -> dict[str, str]:
    rows = {
        "max tokens per pack": _number(packing["max_tokens_per_pack"]),
        "groups per step": _number(packing["groups_per_step"]),
        "groups planned (sample)": _number(packing["sampled_groups"]),
    }
    if packing["unfit_groups"]:
        rows["groups that do not fit a pack"] = _number(packing["unfit_groups"])
    rows |= {f"fill, {form}": f"{fill:.1%}" for form, fill in packing["fill"].items()}
    if packing["token_ratio"] is not None:
        rows["shared prefix: fewer tokens"] = f"{packing['token_ratio']:.2f}x"
        rows["shared prefix: fewer FLOPs"] = f"{packing['flop_ratio']:.2f}x"
    return rows


def html_page(report: dict[str, Any], views: Sequence[GroupView] = ()) -> str:
    """One page without any other file: tables, plots (inline SVG) and groups. Text of the data is escaped."""
    unit = report["unit"]  # what is drawn: title, horizontal axis, vertical axis, values
    plots = [
        ("prompts", unit, "groups", report["prompt_length"]),
        ("group size", "responses", "groups", report["responses_per_group"]),
        ("rewards", "reward", "responses", report["rewards"]),
        *((f"responses, {s}", unit, "responses", of["length"]) for s, of in report["by_source"].items()),
    ]
    template = page_environment().from_string((files(__package__) / "page.html.j2").read_text(encoding="utf-8"))
    tau = HeadSettings().tau
    return template.render(report=report, plots=plots, tables=list(_tables(report)), views=views, tau=tau)


def page_environment() -> Environment:
    """What pages are made with: values are escaped, ``css`` is their style."""
    # finalize: every value goes through it before it is escaped.
    environment = Environment(
        autoescape=True, finalize=_visible, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.tests["numeric"] = _NUMERIC.fullmatch
    environment.globals["css"] = (files(__package__) / "page.css").read_text(encoding="utf-8")
    return environment
