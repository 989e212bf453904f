"""Rules for the source: which folder imports which, and how much a file may ask of its reader.

The package is built in layers. A file may import from the layers above it in this list and from its
own folder, never from the layers below it nor from another folder on its own line. When a test here
fails for your change, one of these helps:

- Move what both folders need into `core/`, or into the one of the two that is listed first.
- Pass the object in as an argument: `assemble.py` connects the parts of a run.
- If the import is really right, the layer is wrong: change LAYERS, and say why in the commit.

docs/architecture.md has the same list with what is in each folder.
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
LAYER_OF = {folder: number for number, folders in enumerate(LAYERS) for folder in folders}
# heavy or special libraries -> the only folders that may import them
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
# what may exceed a limit -> up to which number, and why
EXCEPTIONS = {
    "assemble.py": (36, "puts a run together, so it imports the parts of a run"),
    "server/loop.py": (18, "the loop calls one file for each concern of the server"),
    "client/work.py": (20, "puts a job together, so it imports the parts of a job"),
    "audit/attacks.py": (24, "attacks the production code of clients and of the server"),
    "core/options/__init__.py": (18, "one import for each group of options"),
    "core/options/run.py": (16, "one import for each group of options"),
    "core/options/run.py:RunOptions": (28, "one field for each group and each option of a run"),
    "model/generate.py:generate": (10, "the arguments of generate in transformers"),
    "local/trainer.py:Trainer.__init__": (7, "one buffer for each of its parts"),
    "evaluate/held_out.py:HeldOut.__init__": (7, "one argument for each part of an evaluation"),
}
# the only files that import a module whose name they compute: no rule here sees such an import
BY_NAME = {
    "core/targets.py": "classes that the user names, from an allow-list",
    "core/members.py": "built-in members, which are the files of a folder",
    "cli/__init__.py": "the file of the command that was typed",
    "flower/pool/worker.py": "the ClientApp that the pool was given",
}
IMPORTERS = {
    *("import_module", "__import__", "exec_module", "load_module", "resolve_name"),
    *("run_module", "run_path"),
}
every_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


def limit(what: str, limit_of_all: int) -> int:
    """The limit of a file, or of a function or class in it, `file:name`."""
    return EXCEPTIONS.get(what, (limit_of_all, ""))[0]


def folder(path: Path) -> str:
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


def folder_of(module: str) -> str | None:
    """The folder of an imported module; None if it is of another package.

    What `fedgpt` itself exports, as in `from fedgpt import run`, is of its __init__.py, which is
    below all; its version is a constant that every folder may use.
    """
    package, _, inside = module.partition(".")
    if package != "fedgpt" or inside == "__version__":
        return None
    first = inside.partition(".")[0]
    return first if first in LAYER_OF else "__init__"


def test_every_folder_has_a_layer_and_every_layer_its_folders():
    assert {folder(path) for path in MODULES} == set(LAYER_OF)


@every_module
def test_a_file_imports_only_from_the_layers_above_it(path):
    own = folder(path)
    for name, _ in imports(path):
        other = folder_of(name)
        if other is not None and other != own:
            assert LAYER_OF[other] < LAYER_OF[own], (
                f"{path.relative_to(PACKAGE)} imports {name}, but {own}/ is built before {other}/:"
                " see the top of this file for what to do"
            )


@pytest.mark.parametrize(
    "module, found",
    [
        ("fedgpt.server.loop", "server"),
        ("fedgpt.server", "server"),
        ("fedgpt.run", "__init__"),
        ("fedgpt", "__init__"),
        ("fedgpt.__version__", None),
        ("fedgpts.server", None),
    ],
)
def test_the_folder_of_an_import_is_known(module, found):
    assert folder_of(module) == found


def importers(tree: ast.AST) -> set[str]:
    """Functions in a file that import a module by name."""
    mentioned = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            mentioned.add(node.id)
        elif isinstance(node, ast.Attribute):
            mentioned.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            mentioned |= {alias.name for alias in node.names}
    return mentioned & IMPORTERS


@every_module
def test_a_module_is_imported_by_name_in_few_files_only(path):
    file = str(path.relative_to(PACKAGE))
    assert bool(importers(ast.parse(path.read_text()))) == (file in BY_NAME), (
        f"{file}: write an import statement, which the rules in this file can check"
    )


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module('fedgpt.server')",
        "from importlib import import_module as load",
        "__import__('fedgpt.server')",
        "f = __import__",
    ],
)
def test_imports_by_name_are_found(text):
    assert importers(ast.parse(text))


@every_module
def test_a_library_is_imported_in_its_folders_only(path):
    for name, _ in imports(path):
        library = name.split(".")[0]
        folders = LIBRARIES.get(library)
        assert folders is None or folder(path) in folders, (
            f"{path.relative_to(PACKAGE)} imports {name}; {library} belongs to"
            f" {', '.join(sorted(folders or ())) or 'tests only'}"
        )


@every_module
def test_arguments_attributes_and_imports_are_within_their_limits(path):
    """At most 6 arguments a function, 15 attributes a class, 15 internal imports a file."""
    file = str(path.relative_to(PACKAGE))
    for name, count in measures.arguments(path).items():
        assert count <= limit(f"{file}:{name}", MOST_ARGUMENTS), (
            f"{file}: {name} has {count} arguments; bundle those that belong together"
        )
    for name, count in measures.attributes(path).items():
        assert count <= limit(f"{file}:{name}", MOST_ATTRIBUTES), (
            f"{file}: {name} has {count} attributes; split it by what changes together"
        )
    count = len(measures.internal_imports(path))
    assert count <= limit(file, MOST_IMPORTS), (
        f"{file} imports {count} modules of this package; it does more than one thing"
    )
    assert ast.get_docstring(ast.parse(path.read_text())), f"{file}: say what the module is for"


def test_every_exception_is_as_small_as_it_can_be_and_needed():
    found = {}
    for path in MODULES:
        file = str(path.relative_to(PACKAGE))
        counted = [
            ({file: len(measures.internal_imports(path))}, MOST_IMPORTS),
            ({f"{file}:{k}": n for k, n in measures.arguments(path).items()}, MOST_ARGUMENTS),
            ({f"{file}:{k}": n for k, n in measures.attributes(path).items()}, MOST_ATTRIBUTES),
        ]
        found |= {k: n for table, most in counted for k, n in table.items() if n > most}
    assert found == {what: most for what, (most, _) in EXCEPTIONS.items()}


def test_fields_of_a_dataclass_and_attributes_of_self_are_counted(tmp_path):
    (tmp_path / "m.py").write_text(
        "class A:\n    a: int\n    b: ClassVar[int] = 1\n    c: list[int] = field()\n"
        "    def f(self):\n        self.a = self.d = 1\n"
    )
    assert measures.attributes(tmp_path / "m.py") == {"A": 3}


def test_the_figures_can_be_printed():
    """They are compared before and after a rearrangement, see CONTRIBUTING.md."""
    figures = measures.figures()
    assert float(figures["mean line width"]) < 60
    assert int(figures["widest line"].split()[0]) <= 100
    assert {k.split()[-1] for k in figures if k.startswith("files of a new")} == set(
        measures.FAMILIES
    )


@pytest.mark.parametrize("kind", measures.FAMILIES)
def test_a_new_member_of_a_family_touches_few_files(kind):
    """Its own files are those in the table of docs/extending.md; the source has no other list of
    members than the commands'. Options that only some members have may name all of them.
    """
    guide = (PACKAGE.parent / "docs" / "extending.md").read_text()
    (row,) = re.findall(rf"^\| \[{kind}\].*$", guide, re.M)
    files = re.findall(r"`((?:fedgpt|conf)/[\w/.]+)`", row.split("|")[-2])
    own = {len(paths) for paths in measures.members(kind).values()}
    assert own == {len([file for file in files if "__init__" not in file])}
    if len(measures.members(kind)) >= 3:
        source = [f for f in measures.lists_of(kind) if f.startswith(("fedgpt/", "conf/"))]
        allowed = {"command": ["fedgpt/cli/__init__.py"]}
        options = [f"fedgpt/core/options/{measures.FAMILIES[kind][1]}.py"]
        assert source in ([], options, allowed.get(kind))
        assert len(measures.lists_of(kind)) <= 9


def test_a_file_that_names_every_member_of_a_family_is_counted(tmp_path):
    """A family of three, with a registry in the package and one in a test."""
    package, conf = tmp_path / "fedgpt", tmp_path / "conf" / "corpus"
    for folder in (package / "data" / "corpora", conf, tmp_path / "tests", tmp_path / "docs"):
        folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (package / "data" / "corpora" / f"{name}.py").touch()
        (conf / f"{name}.yaml").touch()
    (package / "data" / "corpora" / "base.py").touch()
    (package / "registry.py").write_text("ALL = ['a', 'b', 'c']")
    (package / "user.py").write_text("from fedgpt.data.corpora.a import A")
    (tmp_path / "tests" / "test_all.py").write_text("'corpus=a', 'corpus=b', 'corpus=c'")
    for name in ("README.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("`a` and `b`")
    assert measures.lists_of("corpus", package) == ["fedgpt/registry.py", "tests/test_all.py"]
    assert measures.touched("corpus", package) == (
        "2 of its own, at most 1 source, 1 tests, 0 documents"
    )


def test_every_library_is_declared():
    """A library that only another package requires may disappear with an update of that package."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["ray"], *extras["hf"], *extras["records"]]
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


def test_strategies_options_and_configuration_are_free_of_torch():
    folders = ("aggregate", "core", "config")
    for path in [path for folder in folders for path in (PACKAGE / folder).rglob("*.py")]:
        top = {name.split(".")[0] for name, at_top in imports(path) if at_top}
        assert "torch" not in top, (
            f"{path.relative_to(PACKAGE)}: a typo must be reported without importing torch"
        )
