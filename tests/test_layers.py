"""Rules for the source: which room imports which, and how much a file may ask of its reader.

The package is built in layers. A file may import from the layers above it in this list and from its
own room, never from the layers below it nor from another room on its own line. When a test here
fails for your change, one of these helps:

- Move what both rooms need up into `core/` (words), or into the lower of the two rooms.
- Pass the thing in as an argument: `assemble.py` is where a run is put together from its parts.
- If the import is really right, the layer is wrong: change LAYERS, and say why in the commit.

docs/architecture.md has the same list with what is in each room.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support import measures

PACKAGE = measures.PACKAGE
LAYERS = [
    ["core"],
    ["data", "model", "privacy", "update", "aggregate"],
    ["tasks"],
    ["local", "evaluate"],
    ["storage"],
    ["client", "simulate"],
    ["server"],
    ["audit", "report"],
    ["config"],
    ["assemble"],
    ["flower"],
    ["api"],
    ["cli"],
    ["__main__", "__init__"],
]
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# heavy or special libraries -> the only rooms that may import them
LIBRARIES = {
    "flwr": {"flower"},
    "ray": set(),
    "opacus": {"local", "privacy"},
    "hydra": {"config", "cli"},
    "omegaconf": {"config", "cli", "flower"},
    "matplotlib": {"report"},
    "transformers": set(),
}
MODULES = measures.modules()
MOST_ARGUMENTS, MOST_ATTRIBUTES, MOST_IMPORTS = 6, 15, 15
# what may exceed a limit, and why
EXCEPTIONS = {
    "assemble.py": "puts a run together, so it imports the parts of a run",
    "server/loop.py": "the loop calls one file for each concern of the server",
    "client/work.py": "puts a job together, so it imports the parts of a job",
    "audit/attacks.py": "attacks the production code of clients and of the server",
    "core/options/__init__.py": "one import for each group of options",
    "core/options/run.py": "one import for each group of options",
    "model/generate.py:generate": "the arguments of generate in transformers",
    "local/trainer.py:Trainer.__init__": "one buffer for each of its parts",
    "evaluate/held_out.py:HeldOut.__init__": "one argument for each part of an evaluation",
}
every_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported at the top level) for every import statement."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in tree.body) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = names if node.module == "fedgpt" else [str(node.module)]
            found += [(name, node in tree.body) for name in modules]
    return found


@every_module
def test_a_file_imports_only_from_the_layers_above_it(path):
    own = room(path)
    for name, _ in imports(path):
        other = name.split(".")[1] if name.startswith("fedgpt.") else None
        if other in LAYER_OF and other != own:
            assert LAYER_OF[other] < LAYER_OF[own], (
                f"{path.relative_to(PACKAGE)} imports {name}, but {own}/ is built before {other}/:"
                " see the top of this file for what to do"
            )


@every_module
def test_a_library_is_imported_in_its_rooms_only(path):
    for name, _ in imports(path):
        library = name.split(".")[0]
        rooms = LIBRARIES.get(library)
        assert rooms is None or room(path) in rooms, (
            f"{path.relative_to(PACKAGE)} imports {name}; {library} belongs to"
            f" {', '.join(sorted(rooms or ())) or 'tests only'}"
        )


@every_module
def test_arguments_attributes_and_imports_are_within_their_limits(path):
    """At most 6 arguments a function, 15 attributes a class, 15 internal imports a file."""
    file = str(path.relative_to(PACKAGE))
    for name, count in measures.arguments(path).items():
        assert count <= MOST_ARGUMENTS or f"{file}:{name}" in EXCEPTIONS, (
            f"{file}: {name} has {count} arguments; bundle those that belong together"
        )
    for name, count in measures.attributes(path).items():
        assert count <= MOST_ATTRIBUTES or f"{file}:{name}" in EXCEPTIONS, (
            f"{file}: {name} has {count} attributes; split it by what changes together"
        )
    count = len(measures.internal_imports(path))
    assert count <= MOST_IMPORTS or file in EXCEPTIONS, (
        f"{file} imports {count} modules of this package; it does more than one thing"
    )
    assert ast.get_docstring(ast.parse(path.read_text())), f"{file}: say what the module is for"


def test_the_figures_can_be_printed():
    """They are compared before and after a rearrangement, see CONTRIBUTING.md."""
    figures = measures.figures()
    assert float(figures["mean line width"]) < 60
    assert int(figures["widest line"].split()[0]) <= 100


def test_every_library_is_declared():
    """A library that only another package requires may disappear with an update of that package."""
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


@every_module
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


def test_strategies_options_and_configuration_are_free_of_torch():
    rooms = ("aggregate", "core", "config")
    for path in [path for room in rooms for path in (PACKAGE / room).rglob("*.py")]:
        top = {name.split(".")[0] for name, at_top in imports(path) if at_top}
        assert "torch" not in top, (
            f"{path.relative_to(PACKAGE)}: a typo must be reported without importing torch"
        )
