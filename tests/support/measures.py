"""Figures of the source: how much a reader has to keep in mind at once, and how many files a new
member of a family touches.

    python tests/support/measures.py              # the table, of the package beside this file
    python tests/support/measures.py path/to/fedgpt

`tests/test_layers.py` holds the limits. Figures of two versions are compared by running this on
both.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "fedgpt"
# what can be added -> folder of its members in the package, and their group in conf/, if any
FAMILIES = {
    "strategy": ("aggregate", "strategy"),
    "codec": ("update/codecs", "update"),
    "corpus": ("data/corpora", "corpus"),
    "partition": ("data/partitions", "partition"),
    "task": ("tasks", "task"),
    "metric": ("evaluate/metrics", None),
    "tracker": ("report/trackers", None),
    "runtime": ("flower/runtimes", "runtime"),
    "command": ("cli", None),
}
NO_MEMBERS = {"__init__", "base", "words"}  # modules that serve the members


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


def members(kind: str, package: Path = PACKAGE) -> dict[str, list[str]]:
    """Built-in member of a family -> files of its own, relative to the repository."""
    folder, group = FAMILIES[kind]
    found = {}
    for path in sorted((package / folder).glob("*.py")):
        own = [path] if group is None else [path, package.parent / f"conf/{group}/{path.stem}.yaml"]
        if path.stem not in NO_MEMBERS and all(one.exists() for one in own):
            found[path.stem] = [str(one.relative_to(package.parent)) for one in own]
    return found


def lists_of(kind: str, package: Path = PACKAGE) -> list[str]:
    """Files of the repository that name every built-in member of a family, beside their own files.

    Whatever lists the members, such as a registry, a test's parameters or a table in a document, is
    among them. So is a file that happens to use each of them: the number is an upper bound of what
    a new member has to be added to. A name counts in quotes or backticks, as a value of an option
    (`strategy=krum`), as a command (`fedgpt run`) and in an import.
    """
    root, (folder, group) = package.parent, FAMILIES[kind]
    places = [package, root / "conf", root / "tests", root / "docs"]
    files = [p for d in places for s in ("py", "yaml", "md") for p in sorted(d.rglob(f"*.{s}"))]
    files += [root / name for name in ("README.md", "CONTRIBUTING.md")]
    named = set(files)
    module = f"{package.name}.{folder.replace('/', '.')}"
    for name, own in members(kind, package).items():
        forms = [rf"[\"'`=\[,]{name}[\"'`,\]]", rf"\b{module}\.{name}\b"]
        forms.append(rf"\bfedgpt {name}\b" if kind == "command" else rf"\b{group or kind}={name}\b")
        uses = re.compile("|".join(forms))
        named = {
            path
            for path in named
            if str(path.relative_to(root)) not in own
            and uses.search(path.read_text(encoding="utf-8"))
        }
    return sorted(str(path.relative_to(root)) for path in named)


def touched(kind: str, package: Path = PACKAGE) -> str:
    """How many files a new member of a family touches: its own, and at most how many others.

    With few members, a file that lists them cannot be distinguished from one that uses them.
    """
    known = members(kind, package)
    if not known:
        return f"no members in {FAMILIES[kind][0]}/"
    own = max(map(len, known.values()))
    if len(known) < 3:
        return f"{own} of its own"
    lists = lists_of(kind, package)
    places = {"source": (package.name, "conf"), "tests": ("tests",), "documents": ()}
    count = dict.fromkeys(places, 0)
    for file in lists:
        first = file.split("/")[0]
        count[next((k for k, folders in places.items() if first in folders), "documents")] += 1
    others = ", ".join(f"{number} {name}" for name, number in count.items())
    return f"{own} of its own, at most {others}"


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
        **{f"files of a new {kind}": touched(kind, package) for kind in FAMILIES},
    }


if __name__ == "__main__":
    for name, value in figures(Path(sys.argv[1]) if sys.argv[1:] else PACKAGE).items():
        print(f"{name:<38} {value}")
