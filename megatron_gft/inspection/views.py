"""Reports and single groups for people: plain text, ANSI colours, one self-contained HTML page.

Colour of a response token says what training does with it: green is made more likely (advantage > 0), red less
likely, grey is not trained (prompt, or advantage 0). Neighbouring tokens alternate in underlining or border, so that
boundaries are visible; end markers are inverted.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_gft.gft import group_advantages
from megatron_gft.groups import SOURCES
from megatron_gft.groups.problems import KINDS
from megatron_gft.shards import Group
from megatron_gft.tokenizer import Tokenizer

_CONTEXT_TOKENS = 16  # a token is decoded after so many others: enough for any multi-token character
_RESET, _UNDERLINE, _INVERSE, _BOLD = "\033[0m", "\033[4m", "\033[7m", "\033[1m"
_ANSI = {"plus": "\033[32m", "minus": "\033[31m", "zero": "\033[90m", "prompt": "\033[90m"}


@dataclass(frozen=True)
class TokenView:
    """One token as text; ``special`` for tokens that are not ordinary text."""

    id: int
    text: str
    special: bool
    logprob: float | None = None


@dataclass(frozen=True)
class ResponseView:
    """One response: what it is, and its tokens."""

    source: str
    reward: float | None
    outcome: str | None
    advantage: float | None
    ends: bool  # with EOS
    tokens: list[TokenView]

    @property
    def role(self) -> str:
        """``plus``, ``minus`` or ``zero``: sign of the advantage."""
        if not self.advantage:
            return "zero"
        return "plus" if self.advantage > 0 else "minus"


@dataclass(frozen=True)
class GroupView:
    """One group, decoded."""

    title: str
    answer: str | None
    prompt: list[TokenView]
    responses: list[ResponseView]


def view_tokens(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[TokenView]:
    """Each token of ``ids`` as the text that it adds after ``before``.

    Of a character made of several tokens, the last one carries the text; so it is for U+FFFD and what follows it,
    because an unfinished character decodes to U+FFFD, too.
    """
    every = [*before, *ids]
    views: list[TokenView] = []
    shown = len(before)  # tokens whose text has been shown
    for position in range(len(before), len(every)):
        start = max(0, shown - _CONTEXT_TOKENS)
        text = tokenizer.decode(every[start : position + 1])
        final = position + 1 == len(every) or every[position + 1] in tokenizer.special_ids
        if text.endswith("\ufffd") and not final:
            added = ""  # perhaps a character that the next token goes on with
        else:
            added = text[len(tokenizer.decode(every[start:shown])) :]
            shown = position + 1
        views.append(TokenView(every[position], added, every[position] in tokenizer.special_ids))
    return views


def view_group(
    group: Group, tokenizer: Tokenizer, title: str, answer: str | None, outcomes: Sequence[str | None]
) -> GroupView:
    """Decode a group and compute its advantages (mode ``std``; None when a reward is missing)."""
    prompt = group.prompt.tolist()
    advantages: list[float | None] = [None] * len(group.responses)
    if not np.isnan(group.rewards).any():
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = list(group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.long)).tolist())
    responses = []
    for k, response in enumerate(group.responses):
        ids = response.tolist()
        tokens = view_tokens(tokenizer, prompt, ids)
        if group.logprobs is not None:
            known = [None if np.isnan(value) else float(value) for value in group.logprobs[k]]
            tokens = [TokenView(t.id, t.text, t.special, p) for t, p in zip(tokens, known, strict=True)]
        reward = None if np.isnan(group.rewards[k]) else float(group.rewards[k])
        source = SOURCES[group.sources[k]]
        ends = ids[-1] == tokenizer.eos_id
        responses.append(ResponseView(source, reward, outcomes[k], advantages[k], ends, tokens))
    return GroupView(title, answer, view_tokens(tokenizer, [], prompt), responses)


# Text of models and files must not steer a terminal: control characters are spelled.
_SPELLED = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_SPELLED_IN_LINES = {code: text for code, text in _SPELLED.items() if chr(code) not in "\t\n"}


def _visible(text: str) -> str:
    return text.translate(_SPELLED_IN_LINES)


def _headline(number: int, response: ResponseView) -> str:
    """``response 2: self, reward 0 (wrong), advantage -0.87, 31 tokens, cut off``."""
    parts = [response.source]
    if response.reward is not None:
        parts.append(f"reward {response.reward:g}" + (f" ({response.outcome})" if response.outcome else ""))
    if response.advantage is not None:
        parts.append(f"advantage {response.advantage:+.2f}")
    parts.append(f"{len(response.tokens)} tokens")
    parts.append("ends with EOS" if response.ends else "cut off, no EOS")
    return f"response {number}: " + ", ".join(parts)


def group_text(view: GroupView, colour: bool) -> str:
    """A group for the terminal; without colour, token boundaries are marked by ``|``."""
    lines = [_styled(_visible(view.title), _BOLD, colour), _visible(f"gold answer: {view.answer}"), ""]
    lines += [_styled(f"prompt: {len(view.prompt)} tokens", _BOLD, colour), _token_line(view.prompt, "prompt", colour)]
    for number, response in enumerate(view.responses):
        lines += ["", _styled(_visible(_headline(number, response)), _BOLD, colour)]
        lines.append(_token_line(response.tokens, response.role, colour))
    return "\n".join(lines) + "\n"


def _styled(text: str, style: str, colour: bool) -> str:
    return f"{style}{text}{_RESET}" if colour else text


def _token_line(tokens: Sequence[TokenView], role: str, colour: bool) -> str:
    if not colour:
        return "|".join(_visible(token.text) for token in tokens)
    return "".join(
        f"{_ANSI[role]}{_UNDERLINE if i % 2 else ''}{_INVERSE if token.special else ''}{_visible(token.text)}{_RESET}"
        for i, token in enumerate(tokens)
    )


# --- the report -----------------------------------------------------------------------------------------------------


def report_text(report: dict[str, Any]) -> str:
    """The report as tables."""
    tables = []
    for title, rows in _tables(report):
        lines = ("  " + "  ".join(row).rstrip() for row in _aligned(rows))
        tables.append("\n".join([title, *(line for line in lines if line.strip())]))
    return "\n\n".join(tables)


def _aligned(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    rows = [[cell.translate(_SPELLED) for cell in row] for row in rows]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.3f}"


def _tables(report: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows (the first is the heading) of each table."""
    unit = report["unit"]
    counts = [["", ""]] + [
        [name.replace("_", " "), _number(report[name])]
        for name in ("groups", "responses", "missing_rewards", "zero_variance_groups", "zero_variance_share")
    ]
    counts += [[f"{what} {unit}", _number(report[f"total_{what}_length"])] for what in ("prompt", "response")]
    heading = ["", "mean", "min", "median", "p90", "p99", "max"]
    spans = [
        [f"{title} ({of})", *(_number(report[key][column]) for column in heading[1:])]
        for title, of, key in (
            ("prompt", unit, "prompt_length"),
            ("response", unit, "response_length"),
            ("responses", "per group", "responses_per_group"),
            ("reward", "known", "rewards"),
        )
        if report[key]
    ]
    sources = [["source", "responses", f"mean {unit}", "mean reward", "cut off", "outcomes"]]
    for name, of in report["by_source"].items():
        outcomes = ", ".join(f"{outcome} {n}" for outcome, n in of["outcomes"].items()) or "-"
        cells = [of["responses"], of["length"]["mean"], of["mean_reward"], of["truncated"]]
        sources.append([name, *map(_number, cells), outcomes])
    problems = [["kind", "found", "meaning"]]
    problems += [[kind, _number(count), KINDS[kind].meaning] for kind, count in report["problems"].items()]
    tables = [("Counts", counts), ("Lengths and rewards", [heading, *spans]), ("Sources", sources)]
    if report.get("incomplete_sets"):
        tables.append(("Incomplete sets", [["shards"], *([line] for line in report["incomplete_sets"])]))
    if "packing" in report:
        tables.append(("Packing", _packing_rows(report["packing"])))
    if len(problems) > 1:
        tables.append(("Problems", problems))
        examples = [[kind, line] for kind, lines in report["examples"].items() for line in lines]
        tables.append(("Examples", [["kind", "where"], *examples]))
    return tables


def _packing_rows(packing: dict[str, Any]) -> list[list[str]]:
    rows = [["", ""], ["max tokens per pack", _number(packing["max_tokens_per_pack"])]]
    rows.append(["groups per step", _number(packing["groups_per_step"])])
    rows.append(["groups planned (sample)", _number(packing["sampled_groups"])])
    if packing["unfit_groups"]:
        rows.append(["groups that do not fit a pack", _number(packing["unfit_groups"])])
    rows += [[f"fill, {form}", f"{fill:.1%}"] for form, fill in packing["fill"].items()]
    if packing["token_ratio"] is not None:
        rows.append(["shared prefix: fewer tokens", f"{packing['token_ratio']:.2f}x"])
        rows.append(["shared prefix: fewer FLOPs", f"{packing['flop_ratio']:.2f}x"])
    return rows


# --- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#667;--line:#d5d9df;--back:#fff;--bar:#4c7bd9}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8eb;--dim:#9aa3ad;--line:#3a4048;--back:#15181c;--bar:#7aa2f7}}
body{font:14px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back)}
body{max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}h3{font-size:.95rem;margin:1rem 0 .2rem}
table{border-collapse:collapse}
td,th{border-bottom:1px solid var(--line);padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}
.plots{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{color:var(--dim)}
rect{fill:var(--bar)}text{fill:var(--dim);font-size:10px}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
pre{border:1px solid var(--line);padding:.6rem;margin:.2rem 0;border-radius:4px}
pre span:nth-child(even){text-decoration:underline dotted}
.prompt,.zero{color:var(--dim)}.plus{background:#2e9e4f33}.minus{background:#d6455d33}
.special{outline:1px solid var(--ink);font-weight:600}
"""


def _escaped(text: str) -> str:
    return html.escape(_visible(text))


def html_page(report: dict[str, Any], views: Sequence[GroupView] = ()) -> str:
    """One page without any other file: tables, plots (inline SVG) and groups. Text of the data is escaped."""
    title = "Groups: " + ", ".join(report["inputs"])
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width,initial-scale=1">',
        f"<title>{_escaped(title)}</title><style>{_STYLE}</style></head><body><h1>{_escaped(title)}</h1>",
    ]
    plots = [
        (f"prompt length ({report['unit']})", report["prompt_length"]),
        ("responses per group", report["responses_per_group"]),
        ("rewards", report["rewards"]),
    ]
    plots += [(f"{s} response length ({report['unit']})", of["length"]) for s, of in report["by_source"].items()]
    figures = "".join(_svg_histogram(name, summary) for name, summary in plots if summary)
    parts.append(f"<h2>Distributions</h2><div class=plots>{figures}</div>")
    for name, rows in _tables(report):
        parts.append(f"<h2>{_escaped(name)}</h2>{_html_table(rows)}")
    parts += [_html_group(view) for view in views]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"


def _svg_histogram(title: str, summary: dict[str, Any], width: int = 320, height: int = 120) -> str:
    counts, edges = summary["histogram"]["counts"], summary["histogram"]["edges"]
    step, tallest = width / len(counts), max(counts)
    bars = []
    for i, count in enumerate(counts):
        tall = height * count / tallest
        tip = f"{edges[i]:.6g} to {edges[i + 1]:.6g}: {count}"
        bars.append(
            f'<rect x="{i * step:.1f}" y="{height - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}">'
            f"<title>{tip}</title></rect>"
        )
    axis = f'<text x="0" y="{height + 12}">{edges[0]:.4g}</text>'
    axis += f'<text x="{width}" y="{height + 12}" text-anchor="end">{edges[-1]:.4g}</text>'
    caption = f"{_escaped(title)}; mean {_number(summary['mean'])}, median {_number(summary['median'])}"
    svg = f'<svg viewBox="0 0 {width} {height + 16}" width="{width}" role="img">{"".join(bars)}{axis}</svg>'
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _html_group(view: GroupView) -> str:
    parts = [f"<h2>{_escaped(view.title)}</h2><p>gold answer: {_escaped(str(view.answer))}</p>"]
    parts.append(f"<h3>prompt: {len(view.prompt)} tokens</h3>{_html_tokens(view.prompt, 'prompt')}")
    for number, response in enumerate(view.responses):
        parts.append(f"<h3>{_escaped(_headline(number, response))}</h3>{_html_tokens(response.tokens, response.role)}")
    return "".join(parts)


def _html_tokens(tokens: Sequence[TokenView], role: str) -> str:
    spans = []
    for token in tokens:
        tip = f"id {token.id}" + ("" if token.logprob is None else f", sampling log-prob {token.logprob:.3f}")
        style = f"{role} special" if token.special else role
        spans.append(f'<span class="{style}" title="{tip}">{_escaped(token.text)}</span>')
    return f"<pre>{''.join(spans)}</pre>"
