r"""Final answers of responses: where a text says what its answer is, and the answer as written there.

docs/verifiers.md says where it is looked for. A box that is never closed means that the response was cut off: there is
no answer, whatever numbers stand before it. Numbers and formulas are taken whole (``10^5``, ``2x+3``, ``1 1/2``): half
of a formula is another answer. "5 or 7" is both: to hedge must not pay.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_gft.scoring.boxes import BoxPolicy, boxed_answer
from megatron_gft.scoring.spelling import MAGNITUDE, MULTIPLIERS, plain_latex, with_sign_after, without_delimiters

_DRAWING = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!\s*)(?=\d{3})")
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{\s*\}")

# --- numbers and formulas: every repetition is bounded or possessive, so that no text takes more than a moment --------

_CURRENCY = r"\\?[$\u20ac\u00a3\u00a5]"
_NUMBER = (
    rf"(?:{_CURRENCY} ?)?(?:-(?=\d))?"
    rf"(?>\d{{1,3}} \d{{1,3}}/\d{{1,3}}(?![\d/.])|{MAGNITUDE}(?:\s(?:{'|'.join(MULTIPLIERS)})\b)?)"
    r"(?:\s?\\?%| per ?cent\b)?(?!(?:st|nd|rd|th)\b)"
)
_BRACED = r"\{(?:[^{}]|\{[^{}]{0,60}\}){1,100}+\}"
_COMMAND = (
    rf"\\[dt]?frac\s?(?:{_BRACED}|\d)\s?(?:{_BRACED}|\d(?!\d))|\\sqrt\s?(?:\[\d\])?(?:{_BRACED}|\d)"
    r"|\\(?:pi|infty)(?![A-Za-z])"
)
_LETTER = (
    r"(?<![A-Za-z\\])(?![aI] +[A-Za-z])(?!(?:(?<=\d )m(?:/s)?|(?<=\d m/)s)\^)"  # 9 m^2 is an area
    r"(?:[xyz]{2,3}|pi|[A-Za-z\u03c0])(?![A-Za-z\d'\u2019])(?:_(?:\w|\{\w{1,4}\}))?"
)
_FUNCTION = r"(?<![A-Za-z\\])(?:sqrt|sin|cos|tan|log|ln|exp)"
_NO_WORD = r"(?:sqrt|sin|cos|tan|log|ln|exp|pi|(?![A-Za-z]{2})[^()\[\]\n])"
_GROUP = rf"[(\[](?:{_NO_WORD}|[(\[]{_NO_WORD}{{0,60}}+[)\]]){{1,80}}+[)\]]"
_POWER = r"\^(?:\{[^{}]{1,30}\}|\([^()\n]{1,30}\)|-?\d+|[A-Za-z](?![A-Za-z]))"
_FACTORS = rf"(?:{_POWER}|{_FUNCTION}{_GROUP}|{_GROUP}|{_LETTER}| ?(?:{_COMMAND})){{0,20}}+"
_TERM = rf"(?:{_NUMBER}|{_COMMAND}|{_FUNCTION}{_GROUP}|{_LETTER}|{_GROUP}){_FACTORS}"
_LINK = (
    r"(?: ?(?:[-+/=<>]|[<>!]=|\*(?!\*)|\\(?:times|cdot|div|pm|mp|leq?|geq?|neq?|in)(?![A-Za-z])) ?-?"
    r"| [xX] (?=[\d$])|(?<=\d)[:,](?=\d))"
)
_PLAIN = r"(?:(?! [A-Za-z]{2}|[A-Za-z]{2} )[^$\n\\])"  # no word: "$5 and $6" are two prices
_SPAN = (
    r"\\begin\{(?:align|equation|gather|eqnarray)\*?\}.{1,1500}?\\end\{(?:align|equation|gather|eqnarray)\*?\}|"
    r"\$\$(?:\\.|[^$\\]){1,400}+\$\$|\\\(.{1,400}?\\\)|\\\[.{1,400}?\\\]|(?<![\\\d$])\$"
    r"(?:[\d\s.,+\-*/()]{1,400}+|(?=[^$\n]{0,400}?[\\^_={])(?:\\.|[^$\\\n]){1,400}+|" + _PLAIN + r"{1,100}+)\$(?!\d)"
)
_RUN = re.compile(
    rf"(?P<span>{_SPAN})|"
    rf"(?:(?<![\w)\]}}%.,])-|\\pm ?)?(?:(?=\\)(?:{_COMMAND}){_FACTORS}|(?<![\w^\\{{}}.)]){_TERM})"
    rf"(?:{_LINK}{_TERM}){{0,60}}+",
    re.DOTALL,
)

# --- where answers stand ----------------------------------------------------------------------------------------------

_ONLY_WORDS = re.compile(r"[A-Za-z\s.,;:'*]*")
_UNIT_WORDS = re.compile(r"(?: +(?![A-Z][a-z])[A-Za-z]+){0,3}[\s*.!]*")  # a capital begins the title of a heading
_HEADING = r"[ \t#*_>]{0,12}(?:final[ \t]+)?answer[ \t*_:.]{0,8}$"
_NUMBERED = re.compile(r"\W*(?:(?:step|part|case)\s*\d|\(?\d+[.):]\s+\S)", re.IGNORECASE)
_NUMBERING = re.compile(
    r"^(?:[ \t]*[#*_]+[ \t]*)?(?:step|part|case)[ \t]+\d{1,3}\b|^#+[ \t]*\**\d{1,3}[.):](?=[ \t]+\S)",
    re.IGNORECASE | re.MULTILINE,
)
_FORMULA = r"(?:\$|\\[(\[]|-?\d[\d.,/]*+(?=[;!?)]|\s*$))"
_SAID_OF = rf"(?![\s,(*_]{{1,4}}{_FORMULA})(?:[^.;\n:=$\\\d]|\$[^$\n]{{1,40}}\$|\\\([^\n]{{1,40}}?\\\)){{0,60}}?"
_ADMITTED = r"(?:(?:well|why|of course|clearly|simply|just)[\s,]{1,2})?(?:it(?:'s|\s(?:is|equals|must be))\s{1,4})?"
_VERB = (
    r"(?:is|are|was|were|does|do|can(?:not)?|could|would|might|may|must|will|has|had|(?:seem|fail|work|look|give|yield|"
    r"lead|come|exceed|follow|hold|tell|show|mean|make)s?)\b"
)
_ANCHOR = re.compile(
    rf"(?P<anchor>^{_HEADING}|(?<![A-Za-z])(?:answers?|final\sresult)(?![A-Za-z])(?:"
    r"[ \t*_`]{0,6}(?:[:=|>]|-{1,2}>?(?=\s)|\u2014|\\to(?![A-Za-z]))"
    rf"|[ \t*_]{{0,6}}(?P<asked>\?)[\s*_]{{1,4}}{_ADMITTED}(?={_FORMULA})(?!(?:{_SPAN}|-?\d\S*)\s?{_VERB})"
    rf"|{_SAID_OF}\b(?:(?:is|are)(?:n't)?|be|equals|becomes|[a-z]{{3,}}s(?:\sout|\sdown)?\sto)\b"
    rf"|(?:\sof|\sbeing)?[\s,(*_]{{1,4}}(?={_FORMULA})))(?:(?![.!?]\s+(?-i:[A-Z])|, but\b)[^\n])*",
    re.IGNORECASE | re.MULTILINE,
)
_YES_OR_NO = re.compile(r"(?:\A|[.?!:,\n])\W*(?:do|does|did|can|could|would|is|are|has|have)\s[^.?!:,\n]*\Z", re.I)
_DENIED = re.compile(r"\s*(?:not|never|neither)\b(?![^\n]*\bbut\b)", re.I)
_QUESTION = re.compile(
    r"(?:[^?.!\n]|\.\d){1,80}(?:\?|[.!]{1,3}(?=\s+(?:wait,? no|no,? wait|oops)\b))\W{0,5}"
    r"(?:(?P<yes>yes|yep|indeed|right|correct|exactly|sure|of course|it is)\b"
    r"|(?P<no>no(?:t|pe)?|wait|oops|hardly|never|wrong|impossible)\b)?",
    re.IGNORECASE,
)
_AT_ONCE = re.compile(r"\W*(?:(?:not|never|neither)\s)?(?:[a-z]+\s)?\W*")
_NEGATED = re.compile(r"(?:n't|(?:\bnever|not|n't)\s(?:[a-z]{1,12}\s)?[a-z]{2,8})\Z", re.I)
_STATED = re.compile(
    r"\b(?:(?:will|must|should)\s(?:[a-z]+\s)?)?(?:is|are|be|as|for)\s{1,4}(?:(?!not\b)[a-z]+\s{1,4})?"
    r"(?:the|our|my)\s{1,4}(?:(?!not\b|wrong\b)[a-z]+\s{1,4}){0,3}(?P<anchor>answers?)(?![A-Za-z])",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[\s,(*_]*(?:as|since|because|for|when|with|if|given(?! as| by)|where|by|from|after|using|once)\b", re.IGNORECASE
)
_MAIN_CLAUSE = re.compile(
    r"[^.;]*?(?:,\s|[:)]|\b(?:we|it|this|one)\b)(?!.*\b(?:as|since|because|when|with|if|where)\b).*"
)
_MAX_ANCHOR_FILLER = 40
_MAX_TAIL = 1000
_MAX_ANCHORS = 20
_FILLERS = r"^[\s*_:,]*(?:(?:therefore|thus|then|hence|so|simply|just|now|again|given by|the following)[\s*,:]+)*"
_FILLER = re.compile(_FILLERS, re.IGNORECASE)
_ON_NEXT_LINE = re.compile(rf"{_FILLERS}[\s*_:]*(\$\$?|\\[(\[])?\s*", re.IGNORECASE)
_NO_ANSWER = re.compile(r"(?:in)?correct|right|wrong|clear|as follows|below|above|given|found", re.IGNORECASE)
_NAME_ALONE = re.compile(r"\\?[A-Za-z]{1,9}(?:_\w|\([a-z]\))?")
_IS = re.compile(r"[\s*]*(?:is|are|equals|must|=)(?![A-Za-z])")
_SENTENCE_END = re.compile(
    r"\.(?=\s|\*|$)|[;\n!]|,?\s(?:because|since|as|where|when|if|so|which|with|for)\b|\s\((?=[^()]*(?:=|(?<![A-Za-z\\])[A-Za-z]{2}))"
)
_OUTSIDE = r"(?!(?:(?!\\begin).){0,400}?\\end)"  # of a matrix in the row
_SENTENCES = re.compile(r"[.?!][$)\]\\]{0,2}\s|\n")
_COMMAND_NAME = re.compile(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname|begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(
    r"(?<![A-Za-z])(?!(?:sqrt|sin|cos|tan|log|ln|exp|pi|[xyz]{2,3}|[A-Z]{2})(?![A-Za-z]))[A-Za-z]{2}"
    r"|\d [A-Za-z](?![A-Za-z])"
)
_OR = re.compile(r"[\s*]*(?:[a-z]{1,20}\s+){0,2}or\s+(?:[a-z]{1,20}\s+)?[\s*]*")
_AND = re.compile(r"[\s*]*(?:,|,?\s+and\s)[\s*]*")
_ASSIGNED = re.compile(r"[A-Za-z](?:_\w)?\s?=(?!.*=)")
_PREMISE = re.compile(r"\b(?:as|at|by|for|from|given|if|since|using|when|where|with)\s\Z", re.I)
_LINKS = re.compile(f"{_OR.pattern}|{_AND.pattern}")
_END = re.compile(r"[\s*_`]*(?:$|[.!?;](?:\s|$))")
_CLAUSE_END = re.compile(
    r"[;\n]|\s\(|,\s|\.(?:\s|$)|\b(?:because|since|as|where|when|if|so|which|with|for|(?:by|from|using|via)(?=\s[a-z]\s?=))\b"
)
_REMARK = re.compile(
    r"(?<=[.!?)\]}$\s])(?:(?<=\s)\((?=[A-Z][a-z]* [a-z])|(?<=[;:,-]\s)(?:see|use|recall|note|compare|check)\b"
    r"|(?:Note|Notice|Remark|Remember|Recall|Alternatively"
    r"|(?:To|(?:We|You) (?:can|may|could)(?: also)?) (?:check|verify|confirm))\b)"
)
_REASON = re.compile(
    r"(?<=[\d%$)\]}])(?:"
    r"(?:\s[a-z]+){0,2},?\s(?:because|since|thanks|due|owing|rather than|instead of)"
    r"|(?:\s[a-z]+){0,2},\s(?:as|where|when|if|from|by|given|considering|seeing|assuming|provided|unlike|obtained"
    r"|in view|in contrast|on account|which (?:follows|comes|we)|(?:and )?not(?=[^.,;\n]{1,60}\W*\Z))"
    r"|,?\s(?:where|as|when(?:ever)?|for (?:all|every|each)|after|using|via|assuming|provided)"
    r"|(?:\s(?:from|by)|,\s(?:for|with))(?=\s(?:\$|\\[(\[])?\s?[A-Za-z](?:_\w)?\s?(?:[=<>]|\\[gln]e))"
    r"|\s\((?!or\b)[a-z]+(?=(?:\\[()]|[^()]|\([^()]{0,60}\)){0,200}+\)\W*\Z))\s"
    r"(?![^\n]*\b(?:which|we(?!\s(?:know|used?|saw)\b)|it(?!\sis\s(?:known|given)\b))\b)"
)
_GOES_ON = re.compile(
    r"[.?!]\s+(?=\S)|, (?!and (?:\$|\\\())[a-z]"
    r"|\b(?:so|then|thus|hence|therefore|giv(?:es|ing)|but|however|instead|actually|answer|must|need|get|obtain|find)\b",
    re.IGNORECASE,
)
_INFINITE = re.compile(
    r"(?:\b(?:is|are|be|equals|diverges to)|(?:\A|[.;:,\n])(?![^.;:,\n]*\b(?:as|when|where|while|if|for|let)\b)"
    r"[^.;:,\n]{0,99}[^.;:,\n]{2}\s(?:tends|goes|grows|approaches)(?: to)?)"
    r"\s((?:(?:positive|negative|plus|minus)\s)?infinity)\W*\Z",
    re.IGNORECASE,
)


class _Run(NamedTuple):
    """A number or formula at ``start:end`` of a text; ``text`` is without delimiters and currency signs."""

    start: int
    end: int
    text: str
    is_result: bool  # set as a formula, or behind an "="


def extract_answer(text: str, boxes: BoxPolicy = "listed") -> str | None:
    """The final answer of ``text``, as written there, but for signs outside of ASCII, which become LaTeX.

    ``None``: there is none, or its box was cut off.
    """
    text = plain_latex(_DRAWING.sub("", text) if "[/asy]" in text else text)
    if (boxed := boxed_answer(text, boxes)) is not None:
        return boxed or None
    text = _EMPTY_BOX.sub("", text)
    if (marked := _marked_answer(text)) is not None:
        return marked
    text = _NUMBERING.sub("", text)
    anchors = [*_STATED.finditer(text), *_ANCHOR.finditer(text)]
    for anchor in sorted(anchors, key=lambda match: match.start("anchor"), reverse=True)[:_MAX_ANCHORS]:
        before = text[max(0, anchor.start() - _MAX_TAIL) : anchor.start()]
        answer = _stated_answer(before) if anchor.re is _STATED else _introduced_answer(anchor, before)
        if answer:
            return answer
        text = text if answer is None else text[: anchor.start()]  # all that stands there is denied
    return _last_value(text)


def with_words_around(text: str, answer: str) -> Iterator[str]:
    """``answer`` with a word before, or up to three after it in ``text``: "June 20", "5 meters per second"."""
    around = re.findall(
        rf"(?:\b([A-Za-z]+) )?(?<!\w){re.escape(answer)}[}}$)\\]{{0,4}} *((?:[A-Za-z]+ ?){{0,3}})", text
    )
    before, after = around[-1] if around else ("", "")
    words = after.split()
    yield from (f"{answer} {' '.join(words[: count + 1])}" for count in range(len(words)))
    if before:
        yield f"{before} {answer}"


def _marked_answer(text: str) -> str | None:
    """The last line marked ``####`` that is an answer: a value, or words where nothing follows."""
    later = ""
    for tail in reversed(text.split("####")[1:]):
        line, _, rest = tail.strip().partition("\n")
        line, later = line.strip(), rest.strip() + later
        if not line or re.match(_HEADING, line, re.IGNORECASE) or _NUMBERED.match(line):
            later += line
            continue
        runs = list(_runs(line))
        if len(runs) == 1:
            before, after = line[: runs[0].start], line[runs[0].end :]
            if _ONLY_WORDS.fullmatch(before + after):
                if not later or (_UNIT_WORDS.fullmatch(after) and not re.search(r"\w", before)):
                    return runs[0].text
        bare = re.sub(r"\\[A-Za-z]+", " ", line)
        if not later or (re.search(r"\d", line) and not re.search(r"[A-Za-z]{2}|\d[.)]$", bare)):
            return line
        later += line
    return None


def _stated_answer(before: str) -> str | None:
    """The value, or those joined by "or", right before "is the answer"."""
    before = _THOUSANDS.sub(",", before).rstrip(" *_\n")
    said = _alternatives(before, list(_runs(before)), _OR)
    return ", ".join(_result(run.text) for run in said) if said and said[-1].end == len(before) else None


def _introduced_answer(anchor: re.Match[str], before: str) -> str | None:
    """What follows "the answer is", or where that is asked and denied ("Is the answer 5? No, 7."), the last value."""
    text = anchor.string[anchor.end("anchor") :]
    if anchor["asked"] and _YES_OR_NO.search(before):
        return None
    question = _QUESTION.match(text)
    asked = question and not question["yes"] and _YES_OR_NO.search(before)
    denied = _NEGATED.search(anchor["anchor"]) or _DENIED.match(text) or (question and question["no"])
    if denied or asked:
        return _other_answer(text, bool(denied))
    tail, _, after = text.partition("\n")
    if opening := _ON_NEXT_LINE.fullmatch(tail + " "):
        tail = (opening[1] or "") + after.lstrip("*_: \t\n").partition("\n\n")[0]
    return _anchored_answer(tail[:_MAX_TAIL]) or None


def _other_answer(text: str, denied: bool) -> str | None:
    """The last value of ``text``, but not that which stands first; "" where that alone is there, and denied."""
    if (first := next(_runs(text), None)) and (last := _last_value(text)) != _result(first.text):
        return last
    return "" if denied and first and _AT_ONCE.fullmatch(text, 0, first.start) else None


def _anchored_answer(tail: str) -> str | None:
    """What "the answer is" introduces: a formula, values close by (or what they come to), or a few words."""
    tail = _FILLER.sub("", _THOUSANDS.sub(",", tail))
    formula = _formula(tail)
    if formula:
        return formula
    runs = [run for run in _runs(tail) if not (_NAME_ALONE.fullmatch(run.text) and _IS.match(tail, run.end))]
    if not runs:
        words = tail.strip(" .*:!\t\n")
        return words if 0 < len(words) <= _MAX_ANCHOR_FILLER and not _NO_ANSWER.match(words) else None
    if begin := _main_clause(tail, runs):
        return _anchored_answer(tail[begin:])
    filler = tail[: runs[0].start]
    if len(filler) > _MAX_ANCHOR_FILLER or re.search(r"\bnot\b", filler):
        return None
    listed = _listed(tail, runs)
    if len(listed) > 1:
        return ", ".join(run.text for run in listed)
    return _result(_computed(tail, runs).text)


def _computed(tail: str, runs: list[_Run]) -> _Run:
    """The first run, or what its sentence makes of it: "$2 an hour x 3 = $6"."""
    begin = runs[0].end
    clause_end = (re.compile(r"(?!\s*=)") if tail[begin - 1] in "$)]" else _CLAUSE_END).search(tail, begin)
    equals = tail.rfind("=", begin, clause_end.start() if clause_end else len(tail))
    return next((run for run in runs if run.end > equals >= 0), runs[0])


def _main_clause(tail: str, runs: list[_Run]) -> int:
    """Where the answer follows in "since n = 3, 5" and "not 3 but 5"; else 0."""
    if re.match(r"\s*not\b", tail):
        but = re.search(r"\bbut\b", tail)
        return but.end() if but else 0
    if not _CLAUSE.match(tail):
        return 0
    breaks = [run for before, run in itertools.pairwise(runs) if _MAIN_CLAUSE.fullmatch(tail, before.end, run.start)]
    return next((run.start for run in breaks if "=" not in run.text), breaks[-1].start if breaks else 0)


def _formula(tail: str) -> str | None:
    """The first sentence of ``tail``, if it is one formula without delimiters and holds no word."""
    sentence = _SENTENCE_END.split(tail.strip(" *_`:\t"), maxsplit=1)[0].strip(" *_`")
    bare = _COMMAND_NAME.sub(" ", sentence)
    if not re.search(r"\w|\\", sentence) or _WORD.search(bare) or re.search(r"(?<!\\)\$|\\[(\[]", sentence):
        return None
    return _result(re.sub(rf"(?<![\d,]){_CURRENCY} ?(?=[\d.])", "", sentence))


def _listed(tail: str, runs: list[_Run]) -> list[_Run]:
    """The first run and those that are listed with it: by "or", or by commas and "and" up to the end of a sentence."""
    length, sure = 1, 1
    while length < len(runs):
        between = tail[runs[length - 1].end : runs[length].start]
        if not (_OR.fullmatch(between) or _AND.fullmatch(between)):
            break
        sure += sure == length and _OR.fullmatch(between) is not None
        length += 1
    return runs[:length] if _END.match(tail[runs[length - 1].end :]) else runs[:sure]


def _last_value(text: str) -> str | None:
    text = _conclusion(_THOUSANDS.sub(",", text))
    if infinite := _INFINITE.search(text):
        return infinite[1]
    runs = list(_runs(text))
    runs = [run for run in runs if re.search(r"\d|\\[A-Za-z]|[-+=<>]", run.text)] or runs  # $x$ names, but says nothing
    if not runs:
        return None
    last = len(runs) - 1
    if len(joined := _alternatives(text, runs, _LINKS)) > 1:
        return ", ".join(run.text for run in joined)
    while last and not runs[last].is_result and not _SENTENCES.search(text[runs[last - 1].end - 3 : runs[last].start]):
        last -= 1  # "there are $9$ divisors of 196", "2 + 3 = 5 for 4 days": what is set as a formula goes before
    return _result(runs[last if runs[last].is_result else -1].text)


def _conclusion(text: str) -> str:
    """``text`` up to its last value, without a remark ("Note that ...") and a reason ("since ...") after that."""
    text = text.rstrip()
    for begins in (_REMARK, _REASON):
        start = max(0, len(text) - _MAX_TAIL)
        if begins is _REASON:  # of the last sentence
            start = max((match.end() for match in _SENTENCES.finditer(text, start)), default=start)
        for match in reversed(list(begins.finditer(text, start))):
            if _GOES_ON.search(text, match.end()) or not re.search(r"[\d$\\]", text[start : match.start()]):
                break
            text = text[: match.start()].rstrip()
    return text


def _alternatives(text: str, runs: list[_Run], link: re.Pattern[str]) -> list[_Run]:
    """The last run, with those that an "or" joins to it, or that are listed before it at the end: n = 1, 2, 3."""
    first = max(0, len(runs) - 1)
    while first and link.fullmatch(text, runs[first - 1].end, runs[first].start):
        first -= 1
    said = runs[first:]
    links = [text[run.end : after.start] for run, after in itertools.pairwise(said)]
    several = links and (
        len(links) > 1 or (_ASSIGNED.match(said[0].text) and not _PREMISE.search(text, 0, said[0].start))
    )
    if several and not any("=" in run.text for run in said[1:]) and _END.match(text, said[-1].end):
        return said
    return said if any(map(_OR.fullmatch, links)) else said[-1:]


def _runs(text: str) -> Iterator[_Run]:
    """Numbers and formulas; variables alone, outside of formulas, and empty formulas ("$ $") say nothing."""
    text = _THOUSANDS.sub(",", text)
    for match in _RUN.finditer(text):
        written, end = match[0], match.end()
        if match["span"]:
            value = _last_row(without_delimiters(written))
            value, end = with_sign_after(value, text, end)
        elif re.search(r"\d|\\infty", written):
            value = re.sub(_CURRENCY + " ?", "", written)
            value = re.sub(r"^\(([^(),]*)\)$", r"\1", value)
            value, end = with_sign_after(value, text, end)
        else:
            continue
        if value.strip():
            yield _Run(match.start(), end, value, bool(match["span"]) or "=" in value)


def _last_row(formula: str) -> str:
    """What several rows, or steps with arrows between them, come to."""
    environment = re.fullmatch(r"\\begin\{(\w+)\*?\}(.*)\\end\{\1\*?\}", formula, re.DOTALL)
    if environment and environment[1] not in ("array", "matrix", "cases", "pmatrix", "bmatrix"):
        rows = [row for row in re.split(rf"\\\\{_OUTSIDE}", environment[2], flags=re.DOTALL) if row.strip()]
        formula = re.sub(f"&{_OUTSIDE}", "", rows[-1], flags=re.DOTALL)
    formula = re.split(r"\\(?:Long)?(?:[Rr]ightarrow|implies|therefore|iff|equiv)(?![A-Za-z])", formula)[-1]
    return formula.strip().rstrip(".,;").lstrip("=").strip()


def _result(formula: str) -> str:
    """What a calculation comes to, or a name stands for: after the last "=". Equations are left alone."""
    left, _, right = formula.rpartition("=")
    if "\\" in formula or re.fullmatch(r"\s*[A-Za-z]", right):
        return formula
    if re.search(r"[A-Za-z]", left) and not re.fullmatch(r"\s*[A-Za-z](_\w)?\s*", left):
        return formula
    return right.strip()
