"""Rules for all of the package: no unsafe code, safe file names, monotonic clocks, no installs."""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedgpt.client.state import ClientStore, safe_name
from fedgpt.core.transport import Transport

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "fedgpt").rglob("*.py"), *(ROOT / "simulations").rglob("*.py")])
UNSAFE = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.load",
    "eval",
    "exec",
    "yaml.load",
    "os.system",
    "os.popen",
    "torch.save",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(tree: ast.AST) -> list[str]:
    """The forbidden imports and calls of a source file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            name = dotted(node.func)
            on = [
                word
                for word in ("shell", "allow_pickle")
                if word in keywords and ast.unparse(keywords[word]) != "False"
            ]
            found += [name] * (name in UNSAFE) + on
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_imported_or_called(source):
    assert unsafe(ast.parse(source.read_text())) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(x)",
        "eval('1')",
        "f(shell=True)",
        "f(shell=wanted)",
        "f(a, allow_pickle=True)",
    ],
)
def test_the_scan_detects_unsafe_code(text):
    assert unsafe(ast.parse(text)) != []


def test_deadlines_do_not_use_the_wall_clock():
    """time.time() only where Flower's timestamps are turned into monotonic seconds, and for the age
    of files.
    """
    users = {path.name for path in SOURCES if re.search(r"\btime\.time\(\)", path.read_text())}
    assert users == {"grid.py", "tidy.py"}


NAMES = st.text(st.characters(), max_size=300) | st.sampled_from(
    [
        "..",
        ".",
        "/etc/passwd",
        "a/../../b",
        "\0",
        "x" * 5000,
        "." * 100,
        "漢" * 100,
        "",
        "~",
        "C:\\x",
        "\ud800",
        "é",
    ]
)


@given(NAMES, NAMES)
@example("", "~")
@example("x" * 101, safe_name("x" * 101))
def test_every_client_name_has_a_folder_of_its_own_inside_that_of_the_run(name, other):
    folder = ClientStore("/root-of-states", "run 7", name).folder
    assert folder.parent == Path("/root-of-states/run 7")
    assert (folder == ClientStore("/root-of-states", "run 7", other).folder) == (name == other)
    safe = safe_name(name)
    assert 0 < len(os.fsencode(safe)) <= 100 and not set(safe) & set("/\\\0.")
    assert (safe == safe_name(other)) == (name == other)


def test_nothing_is_installed_at_run_time():
    """Flower can install an app's dependencies; an environment variable disables that."""
    texts = {path.name: path.read_text() for path in (ROOT / "fedgpt").rglob("*.py")}
    assert not [
        name for name, text in texts.items() if re.search(r"[\"']pip[\"']|ensurepip|uv sync", text)
    ]
    assert (
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION" in texts["superlink.py"] + texts["launch.py"]
    )


def test_a_version_for_the_tests_is_exact():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines and all(re.fullmatch(r"[\w-]+==\d[\w.]*", line) for line in lines), lines


def test_the_protocol_of_a_transport_is_what_the_loop_uses():
    sources = [path.read_text() for path in (ROOT / "fedgpt" / "server").glob("*.py")]
    used = set(re.findall(r"\btransport\.(\w+)", "\n".join(sources))) - {"Transport"}
    assert {"send", "receive", "now"} <= used
    assert used <= set(Transport.__annotations__) | set(vars(Transport))


def test_the_example_of_a_transport_has_all_that_the_protocol_asks_for():
    methods = {name for name, member in vars(Transport).items() if inspect.isfunction(member)}
    public = {name for name in methods if not name.startswith("_")}
    shown = set(re.findall(r"\.\.\.     (?:def )?(\w+)(?:\(self|\ =)", str(Transport.__doc__)))
    assert {"virtual", "send", "close"} <= shown
    assert shown - {"__init__"} == public | set(Transport.__annotations__)
