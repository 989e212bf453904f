"""What the program's messages advise, and what the tests follow: see `tests/test_advice.py`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

# how an advice begins: after `; ` or `: `, or in a text that is added to a message
VERBS = (
    "add|audit|build|change|choose|continue|convert|copy|correct|crop|delete|double|end each|"
    "fetch|finish|generate fewer|give|install|leave|lower(?! with)|make|mend|name|pip|put|raise|"
    "remove|rename|restore|return|run|save|say|set(?! by)|start|take|train both|try|type|unpack|"
    "use(?! the weights)|wait|write"
)
ADVICE = re.compile(rf"(?:^(?:,? ?or )?|[;:] (?:or )?)((?:{VERBS}) .+)", re.DOTALL)
VALUE = "{}"  # stands for a value in a text of the source


def advises(message: object, advice: str) -> None:
    """The message has this advice, which the calling test follows."""
    assert advice in str(message)


def advice_in(text: str) -> str:
    """The advice of a message; empty if it has none."""
    found = ADVICE.search(text)
    return found[1] if found else ""


def texts(tree: ast.AST) -> Iterator[str]:
    """Each text of the code, with {} for its values; without docstrings and texts of help."""
    skipped: set[ast.AST | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg == "help"):
            skipped.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
        elif isinstance(node, ast.FormattedValue):
            skipped.add(node.format_spec)
        if node in skipped:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = (one.value if isinstance(one, ast.Constant) else VALUE for one in node.values)
            yield "".join(map(str, parts))


def followed(tree: ast.AST) -> Iterator[str]:
    """The texts of a test file's tables of advice, and of its calls of `advises`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id.endswith(("REMEDY", "REMEDIES")):
                yield from texts(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "advises":
            yield from texts(node.args[1])


def matches(advice: str, text: str) -> bool:
    """Whether a text of a test has an advice of the source."""
    pattern = re.escape(advice).replace(re.escape(VALUE), ".*")
    return re.search(rf"\b{pattern}$", text, re.DOTALL) is not None
