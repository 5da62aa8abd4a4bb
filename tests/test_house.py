"""The house: which file may import which, and how large a file or a function may be.

Counts are of the code as Python parses it, so neither dense lines nor comments change them.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megatron_gft"
# Lowest first. A file imports files of its own floor and of lower ones.
FLOORS = (
    "errors progress reading atomic folders journal objectives parallel cpu launchers runtime run_lock gft pack_layout "
    "balancing",
    "config chat_template sentencepiece_model tokenizer groups",
    "hf validation",
    "shards",
    "attention backend row_kernels head_rows vocab_parallel model optimizer group_order planning packing dataset batch "
    "pipeline timing step",
    "preprocess sampling scoring inspection evaluation",
    "checkpoints conversion",
    "metrics reports trainer job logprobs sizing rounds",
    "commands train",
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor.split()}
FILES = sorted(PACKAGE.rglob("*.py"))
MORE_FILES = [path for folder in ("tools", "examples") for path in sorted((PACKAGE.parent / folder).rglob("*.py"))]
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80
MOST_BRANCHES = 15
MOST_LINES = 24_810  # of the package; what a change adds it takes away elsewhere
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The top-level file or folder of the package that ``path`` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms of the package that a file imports, at its top or inside functions."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{PACKAGE.name}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE.name and rest and not rest.startswith("__"):
                yield rest.partition(".")[0]


def branches(function: Function) -> int:
    """1 + if, for, while, except, conditional expression, comprehension, match case, further operands of and/or."""
    kinds = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.IfExp, ast.comprehension, ast.match_case)
    nodes = list(ast.walk(function))  # with those of functions inside it
    operands = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + operands + sum(isinstance(node, kinds) for node in nodes)


def functions() -> Iterator[tuple[str, Function]]:
    for path in FILES + MORE_FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, Function):
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}", node


def test_every_file_has_a_floor():
    assert {room(path) for path in FILES} - {"__init__"} == set(FLOOR_OF)


def test_no_import_goes_up():
    upward = [
        f"{path.relative_to(PACKAGE)} -> {other}"
        for path in FILES
        if room(path) != "__init__"
        for other in imported_rooms(path)
        if FLOOR_OF[other] > FLOOR_OF[room(path)]
    ]
    assert not upward


def test_rooms_have_no_circle():
    below: dict[str, set[str]] = {}
    for path in FILES:
        below.setdefault(room(path), set()).update(set(imported_rooms(path)) - {room(path)})
    while free := {name for name, others in below.items() if not others}:
        below = {name: others - free for name, others in below.items() if name not in free}
    assert not below, f"these import each other: {below}"


def test_functions_stay_small():
    large = [
        f"{place}: {branches(function)} branches, {function.end_lineno - function.lineno + 1} lines"
        for place, function in functions()
        if branches(function) > MOST_BRANCHES or function.end_lineno - function.lineno + 1 > MOST_LINES_OF_A_FUNCTION
    ]
    assert not large


def test_what_other_releases_of_megatron_leave_out_is_there():
    text = (PACKAGE.parent / ".ci" / "versions").read_text(encoding="utf-8")
    names = re.findall(r"\btest_\w+", text.partition("left_out=(")[2].partition("\n)")[0])
    assert names and not [name for name in names if not (PACKAGE.parent / "tests" / f"{name}.py").exists()]


def test_files_stay_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES + MORE_FILES}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES_OF_A_FILE}
    assert sum(lines[path] for path in FILES) <= MOST_LINES


def test_no_exception_is_swallowed():
    """``except Exception`` raises, or does something with the exception it names."""
    silent = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.type, (ast.Name, type(None))):
                broad = node.type is None or node.type.id in ("Exception", "BaseException")
                used = any(
                    isinstance(inner, ast.Raise) or (isinstance(inner, ast.Name) and inner.id == node.name)
                    for inner in ast.walk(node)
                )
                if broad and not used:
                    silent.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not silent


@pytest.mark.parametrize("name", ["gft", "vocab_parallel", "shards", "planning", "groups"])
def test_public_modules_document_what_they_export(name):
    place = PACKAGE / name / "__init__.py" if (PACKAGE / name).is_dir() else PACKAGE / f"{name}.py"
    undocumented = [
        node.name
        for node in tree(place).body
        if isinstance(node, (Function, ast.ClassDef)) and node.name[0] != "_" and not ast.get_docstring(node)
    ]
    assert not undocumented
