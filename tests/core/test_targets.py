"""Classes from outside: whatever they do wrong is a message that names option, class and cause."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest
from support.advice import advises

from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.options import OPTIONS, PartitionOptions, RunOptions
from fedgpt.core.options.option import typed
from fedgpt.core.runtimes import RUNTIMES
from fedgpt.core.targets import build, call, calling, error_text, load_class
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.evaluate.metrics.base import METRICS
from fedgpt.report.trackers import MEMBERS as TRACKERS
from fedgpt.tasks.base import TASKS
from fedgpt.update.compress import CODECS

GROUPS = [CORPORA, PARTITIONS, CODECS, RUNTIMES, TASKS]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes the module `broken`, which nobody has imported yet."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(code: str) -> Path:
        (tmp_path / "broken.py").write_text(code)
        sys.modules.pop("broken", None)
        importlib.invalidate_caches()
        return tmp_path / "broken.py"

    yield write
    sys.modules.pop("broken", None)


def refusal(*arguments: Any, how: Any = load_class) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        how(*arguments)
    return caught.value


# ---- import


@pytest.mark.parametrize(
    "code, text, kind",
    [
        ("def (", "SyntaxError: invalid syntax (broken.py, line 1)", SyntaxError),
        ("\n{}['size']", "KeyError: 'size' (broken.py, line 2)", KeyError),
        ("import sys\nsys.exit(3)", "SystemExit: 3 (broken.py, line 2)", SystemExit),
        ("1 / 0", "ZeroDivisionError: division by zero (broken.py, line 1)", ZeroDivisionError),
        (
            "import absent_library",
            "ModuleNotFoundError: No module named 'absent_library'",
            ImportError,
        ),
        ("raise RuntimeError", "RuntimeError (broken.py, line 1)", RuntimeError),
        ("import json\njson.loads('x')", "JSONDecodeError", ValueError),
        ("def __getattr__(name):\n    raise OSError(name)", "OSError: Mine", OSError),
    ],
)
def test_a_module_that_fails_at_import_is_refused_with_its_error_and_line(
    write, caplog, code, text, kind
):
    write(code)
    with caplog.at_level(logging.DEBUG):
        error = refusal("corpus", "broken.Mine", (), ["broken"])
    (problem,) = error.problems
    assert problem.startswith("corpus._target_=broken.Mine: cannot import broken (")
    assert text in problem and problem.endswith("; HYDRA_FULL_ERROR=1 prints the traceback")
    assert isinstance(error.__cause__, kind)
    name = type(error.__cause__).__name__
    assert name in caplog.text and "Traceback" in caplog.text
    if "json" in code:
        assert "(broken.py, line 2)" in problem, "the line of the user's file, not of the library"


def test_a_module_that_is_not_found_is_refused_with_what_to_change(tmp_path, monkeypatch):
    (problem,) = refusal("corpus", "absent_package.Mine", (), ["absent_package"]).problems
    assert problem.startswith(
        "corpus._target_=absent_package.Mine: cannot import absent_package (No module named"
        " 'absent_package'); "
    )
    advises(problem, "add its folder to PYTHONPATH")
    (tmp_path / "absent_package.py").write_text(
        "from fedgpt.data.corpora.base import Corpus\nclass Mine(Corpus): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # as PYTHONPATH does for a new process
    assert load_class("corpus", "absent_package.Mine", (), ["absent_package"])
    del sys.modules["absent_package"]


@pytest.mark.parametrize("target", [".x.Y", "", "Mine", "x..Y", "x.", "a b.C", "x.1", "."])
@pytest.mark.parametrize("trusted", [[], [""], ["x"]])
def test_what_is_no_name_of_a_class_is_refused(target, trusted):
    (problem,) = refusal("corpus", target, ("fedgpt.data",), trusted).problems
    assert problem.startswith(f"corpus._target_={target}: must be the full name of a class")


@pytest.mark.parametrize("names", [[""], [".x"], ["x", "y."], ["a-b"]])
def test_what_is_no_name_of_a_package_cannot_be_trusted(names):
    found = RunOptions(trusted_packages=names, run_dir="x", cache_dir="y").problems()
    assert [problem.partition(": ")[2] for problem in found] == [
        "must be names of packages, such as [my_package]"
    ]


# ---- construction


@dataclass(frozen=True)
class Sized:
    """A class with fields of all simple types."""

    clients: int = 3
    share: float = 0.5
    wide: bool = False
    label: str = ""
    most: int | None = None
    shape: tuple[int, ...] = ()
    sloppy: int = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"clients": "many"}, "clients=many: must be a whole number"),
        ({"clients": 2.0}, "clients=2.0: must be a whole number; type 2"),
        ({"clients": True}, "clients=true: must be a whole number"),
        ({"clients": None}, "clients=null: must be a whole number"),
        ({"share": "half"}, "share=half: must be a number"),
        ({"share": False}, "share=false: must be a number"),
        ({"wide": 1}, "wide=1: must be true or false"),
        (
            {"label": 3},
            "label=3: must be a text; a text that looks like a number is written in quotes",
        ),
        ({"most": "all"}, "most=all: must be a whole number or null"),
    ],
)
def test_an_argument_of_another_type_than_its_field_is_refused(arguments, words):
    (problem,) = refusal("partition.arguments", Sized, arguments, how=call).problems
    message, _, default = problem.partition(", or leave it out for the default, ")
    assert message == f"partition.arguments.{words}"
    (name,) = arguments
    assert default == ("" if getattr(Sized, name) is None else typed(getattr(Sized, name)))


def test_all_wrong_types_are_reported_and_right_ones_pass():
    assert len(refusal("x", Sized, {"clients": "a", "label": 1}, how=call).problems) == 2
    right = {"clients": 1, "share": 2, "wide": True, "label": "a", "most": None, "shape": [1, "b"]}
    assert call("x", Sized, {**right, "sloppy": None}).share == 2

    # an annotation that is a type, as without `from __future__ import annotations`
    Evaluated = make_dataclass("Evaluated", [("clients", int, 1)])
    assert refusal("x", Evaluated, {"clients": "a"}, how=call).problems


@pytest.mark.parametrize(
    "error", [KeyError("size"), RuntimeError("no"), OSError(2, "no"), Exception()]
)
def test_a_constructor_may_raise_anything(error):
    class Mine:
        def __init__(self):
            raise error

    found = refusal("task.arguments", Mine, {}, how=call)
    (problem,) = found.problems
    assert problem.startswith(
        f"task.arguments: Mine raised {error_text(error)}; HYDRA_FULL_ERROR=1"
    )
    assert found.__cause__ is error and "(test_targets.py, line " in problem


def test_a_message_of_a_constructor_passes_as_it_is():
    class Mine:
        def __init__(self):
            raise ConfigError("corpus.path=x: is a file")

    assert refusal("corpus.arguments", Mine, {}, how=call).problems == ["corpus.path=x: is a file"]


def test_a_class_without_a_signature_is_called():
    node = {"_target_": "builtins.dict", "a": 1}
    assert build("x", node, trusted=["builtins"]) == {"a": 1}


# ---- calls


def test_an_exception_of_a_class_from_outside_names_the_method_and_keeps_its_cause():
    with pytest.raises(ConfigError) as caught, calling("partition", Sized(), "deal"):
        raise KeyError("size")
    (problem,) = caught.value.problems
    assert problem.startswith(
        f"partition._target_={__name__}.Sized: deal raised KeyError: 'size' ("
    )
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(FedGPTError, match="as it is"), calling("partition", Sized(), "deal"):
        raise FedGPTError("as it is")
    with pytest.raises(ValueError, match="too"), calling("x", Sized(), "deal", (ValueError,)):
        raise ValueError("too")


def test_an_exception_of_a_built_in_class_passes():
    """It is a mistake of this package, so its traceback is shown."""
    part = PARTITIONS.build(PartitionOptions())
    with pytest.raises(KeyError), calling("partition", part, "deal"):
        raise KeyError("size")


# ---- members


@pytest.mark.parametrize("members", [*GROUPS, METRICS, TRACKERS], ids=lambda one: one.group)
def test_an_interface_itself_is_refused_with_what_is_missing(members, monkeypatch):
    base = members.base
    module = types.ModuleType("incomplete")
    module.Mine = type("Mine", (base,), {"__module__": "incomplete"})  # pyright: ignore
    monkeypatch.setitem(sys.modules, "incomplete", module)
    for target in (f"{base.__module__}.{base.__name__}", "incomplete.Mine"):
        with pytest.raises(ConfigError) as caught:
            members._custom(target, ["incomplete", "fedgpt.core"])
        (problem,) = caught.value.problems
        assert "must define" in problem or "must inherit from" in problem


def test_a_name_that_an_interface_only_declares_must_be_defined(write):
    write(
        "from fedgpt.evaluate.metrics.base import BatchMetric\n"
        "class Mine(BatchMetric):\n"
        "    def tally(self, outputs, batch): return {}\n"
        "    def value(self, totals): return 0.0\n"
    )
    with pytest.raises(ConfigError, match=r"broken\.Mine: must define name, as"):
        METRICS.build_list([{"_target_": "broken.Mine"}], ["broken"])


@pytest.mark.parametrize("members", [METRICS, TRACKERS], ids=lambda one: one.group)
def test_every_entry_of_a_list_is_checked_in_one_way(members):
    entries = [3, "nothing", {"a": 1}, {"_target_": 3}, {"_target_": "os.Path"}, "nothing"]
    found = refusal(entries, how=members.build_list).problems
    assert len(found) == len(entries)
    key = members.key
    allowed = f"allowed are {', '.join(members.names())}, or {{_target_:package.module.Class}}"
    assert found[0] == f"{key}=[3]: {allowed}"
    assert found[1].startswith(f"{key}=[nothing]: {allowed}")
    assert found[4].startswith(f"{key}._target_=os.Path: only classes in ")
    assert found[5] == f"{key}=nothing: stands twice in the list; leave one out"


@pytest.mark.parametrize("members", GROUPS, ids=lambda one: one.group)
def test_the_choices_that_an_option_names_are_the_classes_that_take_it(members):
    """What a typed option does is answered by `only_with`, and what a class gets by its fields."""
    takers = {
        name: {one.name for one in fields(members.load(name))}
        for name in members.names()
        if hasattr(members.load(name), "__dataclass_fields__")
    }
    for key, option in OPTIONS.items():
        name = key.rpartition(".")[2]
        if option.group != members.group or name in ("min_tokens", "_target_"):
            continue
        having = {member for member, names in takers.items() if name in names}
        if having and having != set(members.names()):
            assert set(option.facts.only_with) - {"custom"} == having, key
        if having and option.default is None:
            assert "custom" in option.facts.only_with or name == "label_field", key
