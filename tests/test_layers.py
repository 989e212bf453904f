"""The house's rules over its own source: imports point down, heavy libraries stay in their rooms,
nothing unsafe.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fedgpt"
FLOORS = {
    "core": 0,
    "data": 1, "model": 1, "privacy": 1, "update": 1, "aggregate": 1,
    "tasks": 2,
    "local": 3, "evaluate": 3,
    "storage": 4,
    "client": 5, "simulate": 5,
    "server": 6,
    "audit": 7, "report": 7, "config": 7,
    "assemble": 8, "flower": 9, "api": 10, "cli": 11, "__main__": 12, "__init__": 12,
}  # fmt: skip
ROOMS = {
    "flwr": {"flower"},
    "ray": set(),
    "opacus": {"local", "privacy"},
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli", "flower"},
    "matplotlib": {"report"},
    "transformers": set(),
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, is it at the top level) for every import statement."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "fedgpt"
                else []
            )
            found += [(name, node in tree.body) for name in names or [str(node.module)]]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down_and_siblings_do_not_know_each_other(path):
    here = room(path)
    for name, _ in imports(path):
        if not name.startswith("fedgpt."):
            continue
        there = name.split(".")[1]
        if there in FLOORS and there != here:
            assert FLOORS[there] < FLOORS[here], f"{here} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path):
    for name, _ in imports(path):
        package = name.split(".")[0]
        assert package not in ROOMS or room(path) in ROOMS[package], f"{path} imports {name}"


def test_every_library_is_declared():
    """What another package happens to bring today is gone when it changes its mind."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["ray"], *extras["hf"]]
    declared = {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines}
    brings = packages_distributions()
    used = (
        {name.split(".")[0] for path in MODULES for name, _ in imports(path)}
        - {"fedgpt"}
        - sys.stdlib_module_names
    )
    assert not [
        name
        for name in sorted(used)
        if not declared & {canonical(d) for d in brings.get(name, [name])}
    ]


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_strategies_and_configuration_are_free_of_torch():
    rooms = [*PACKAGE.glob("aggregate/*.py"), *PACKAGE.glob("core/*.py")]
    for path in [*rooms, *PACKAGE.glob("config/*.py")]:
        top = {name.split(".")[0] for name, at_top in imports(path) if at_top}
        assert "torch" not in top, path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unsafe_is_called(path):
    banned = {"eval", "exec", "torch.load", "yaml.load", "pickle.load", "pickle.loads", "os.system"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in banned, f"{path}:{node.lineno}"
            for keyword in node.keywords:
                assert (
                    keyword.arg not in ("allow_pickle", "shell")
                    or ast.unparse(keyword.value) == "False"
                )
    assert not {name.split(".")[0] for name, _ in imports(path)} & {
        "pickle",
        "dill",
        "cloudpickle",
        "marshal",
    }


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text())), "a module says its place in the flow"
