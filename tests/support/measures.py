"""Figures of the source: how much a reader has to keep in mind at once.

    python tests/support/measures.py              # the table, of the package beside this file
    python tests/support/measures.py path/to/fedgpt

`tests/test_layers.py` holds the limits. Figures of two versions are compared by running this on
both.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fedgpt"


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualified name, function) of every function and method."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(ast.parse(path.read_text()), "")


def arguments(path: Path) -> dict[str, int]:
    """Function -> number of its arguments, without self and cls."""
    found = {}
    for name, function in functions(path):
        a = function.args
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        found[name] = sum(argument.arg not in ("self", "cls") for argument in every)
    return found


def attributes(path: Path) -> dict[str, int]:
    """Class -> number of its attributes: the fields that it declares, as those of a dataclass, and
    what its methods set on self. What belongs to the class (ClassVar) is not counted, nor what a
    base class declares.
    """
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            declared = {
                line.target.id
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                if "ClassVar" not in ast.unparse(line.annotation)
            }
            stored = {
                inner.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                if isinstance(inner.value, ast.Name) and inner.value.id == "self"
            }
            found[node.name] = len(declared | stored)
    return found


def internal_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fedgpt":
            names = [f"fedgpt.{alias.name}" for alias in node.names]
            found |= set(names) if node.module == "fedgpt" else {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("fedgpt.")}
    return found


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


def figures(package: Path = PACKAGE) -> dict[str, str]:
    """The figures of a package, each with the place of the largest one."""

    def largest(table: dict[str, int]) -> str:
        name = max(table, key=table.__getitem__)
        return f"{table[name]} ({name})"

    paths = modules(package)
    named = {str(path.relative_to(package)): path for path in paths}
    args = {f"{f}:{k}": n for f, p in named.items() for k, n in arguments(p).items()}
    attrs = {f"{f}:{k}": n for f, p in named.items() for k, n in attributes(p).items()}
    lengths = {
        f"{file}:{name}": (function.end_lineno or 0) - function.lineno + 1
        for file, path in named.items()
        for name, function in functions(path)
    }
    text = [line for path in paths for line in lines(path)]
    widths = {file: max(map(len, lines(path)), default=0) for file, path in named.items()}
    return {
        "files": str(len(paths)),
        "lines with text": str(len(text)),
        "mean line width": f"{sum(map(len, text)) / len(text):.1f}",
        "widest line": largest(widths),
        "most arguments": largest(args),
        "functions with more than 6 arguments": str(sum(n > 6 for n in args.values())),
        "most attributes": largest(attrs),
        "most internal imports": largest({f: len(internal_imports(p)) for f, p in named.items()}),
        "longest function": largest(lengths),
        "longest file": largest(
            {file: len(path.read_text().splitlines()) for file, path in named.items()}
        ),
    }


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1]) if sys.argv[1:] else PACKAGE).items():
        print(f"{name:<38} {value}")
