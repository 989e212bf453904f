"""Every example in a docstring runs; those that would train are marked +SKIP."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import fedgpt

MODULES = ["fedgpt", *(found.name for found in pkgutil.walk_packages(fedgpt.__path__, "fedgpt."))]
# module -> the least number of its examples
EXAMPLES = {
    "fedgpt.core.seeds": 1,
    "fedgpt.core.transport": 12,
    "fedgpt.client.state": 1,
    "fedgpt.report.progress": 3,
    "fedgpt.core.lines": 1,
}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "fedgpt.__main__"])
def test_examples_in_docstrings_give_their_output(name):
    failed, tried = doctest.testmod(importlib.import_module(name), name=name)
    assert not failed, "see the captured output"
    assert tried >= EXAMPLES.get(name, 0), "doctest no longer finds the examples"


def test_every_module_is_walked():
    assert {
        "fedgpt.cli",
        "fedgpt.flower.pool.grid",
        "fedgpt.aggregate.fedadam",
        "fedgpt.model.gpt",
    } <= set(MODULES)
    assert EXAMPLES.keys() <= set(MODULES)
