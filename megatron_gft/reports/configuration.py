"""Every key that a user can set, from the descriptions of its fields: for ``--help``, and as a page of the docs.

``python -m megatron_gft.reports.configuration > docs/configuration.md`` makes the page anew.
"""

import itertools
import textwrap
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from megatron_gft.config import Config, Section
from megatron_gft.objectives import OBJECTIVES

HEAD = """# Configuration

`python -m megatron_gft.train --config FILE [section.key=value ...]` reads one tree of settings. Several
`--config` files are laid over each other, and the later one wins key by key; an override on the command line
wins over all files. An unknown key is an error that names the nearest known one. All problems are reported at
once, before any process starts. The resolved tree is written to `RUN/config.yaml`, that of a later start to
`config-0002.yaml` and so on. In YAML:

```yaml
model: {config: models/Qwen2.5-1.5B}
data: {train: [data/train], groups_per_step: 64}
optimizer: {lr: 1e-6}
```

The last four sections are the kinds of source of `tools/generate_groups.py`, whose keys stand behind `--source` or in
the file of `--config`. This page is made from the code; a test keeps it in step.
"""
KeyFacts = tuple[str, str, str, str]  # name, values, default as YAML or "required", meaning


def sections() -> Iterator[tuple[str, str, list[KeyFacts]]]:
    """Each section's name, meaning and keys, in order."""
    for section, of in Config.model_fields.items():
        assert isinstance(of.annotation, type) and issubclass(of.annotation, Section)
        yield section, *_meaning_and_keys(of.annotation, f"{section}.")


def _meaning_and_keys(section: type[Section], prefix: str = "") -> tuple[str, list[KeyFacts]]:
    return (section.__doc__ or "").splitlines()[0], [
        (f"{prefix}{name}", kind_text(field.annotation), _default_text(field), field.description or "")
        for name, field in section.model_fields.items()
        if name != "kind"
    ]


def kind_text(annotation: Any) -> str:
    """``Literal["a", "b"] | None`` -> ``a, b or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        names = [kind_text(argument) for argument in arguments]
        return f"{', '.join(names[:-1])} or {names[-1]}"
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is dict and arguments[1] is Any:
        return "mapping"
    if origin is dict:
        return f"{'one' if get_origin(arguments[1]) is Literal else kind_text(arguments[1])} by source"
    if origin is list:
        return f"list of {kind_text(arguments[0])}"
    if hasattr(annotation, "__metadata__"):  # PositiveInt and the like
        return kind_text(arguments[0])
    return {type(None): "null", str: "text", bool: "true, false"}.get(annotation, annotation.__name__)


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return yaml.safe_dump(field.get_default(call_default_factory=True)).removesuffix("\n...\n").strip()


def help_text() -> str:
    """All keys for ``--help``."""
    lines = []
    for section, meaning, keys in sections():
        lines.append(f"\n{section}: {meaning}")
        if section == "objective":
            lines += [f"  {name}: {o.formula} [{o.paper}]; {o.use}" for name, o in OBJECTIVES.items()]
        for name, values, default, description in keys:
            text = f"{description} ({values}; default {default})".replace("default required", "required")
            lines.append(f"  {name}")
            lines += textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def page() -> str:
    """All keys as Markdown."""
    from megatron_gft.sampling.sources import KINDS  # not for --help, which is to be quick

    parts = [HEAD]
    of_sources = ((f"kind={kind}", *_meaning_and_keys(section)) for kind, section in KINDS.items())
    for section, meaning, keys in itertools.chain(sections(), of_sources):
        parts.append(f"## {section}\n\n{meaning}\n\n| key | values | default | meaning |\n|---|---|---|---|")
        parts += [f"| `{name}` | {values} | {default} | {description} |" for name, values, default, description in keys]
        parts.append("")
    return "\n".join(parts).replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
