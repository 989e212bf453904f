"""One option is one dataclass field; its checks and its help follow from that field."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fedgpt.cli import help
from fedgpt.core.options import OPTIONS, RunOptions
from fedgpt.core.options.option import (
    Group,
    above,
    at_least,
    between,
    choice,
    described,
    one_of,
    option,
    share,
)
from fedgpt.core.runtimes import RUNTIMES
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.tasks.base import TASKS
from fedgpt.update.compress import CODECS

ROOT = Path(__file__).parents[2]
RUN = RunOptions(run_dir="runs/x", cache_dir="cache", strategy={"_target_": "x.Y"})


@dataclass
class OvenOptions(Group):
    """A group of options that only this file defines."""

    group = "oven"

    name: str = choice("gas", "stone")
    degrees: float = option(
        180.0, "Temperature of the oven.", unit="degrees Celsius", allowed=at_least(20)
    )
    wood: int | None = option(None, "Logs for the fire.", allowed=at_least(1), only_with=("stone",))
    racks: list[float] = option([1.0], "Heights of the racks.")


@dataclass
class Kitchen(Group):
    """A schema with a group of its own."""

    oven: OvenOptions = field(default_factory=OvenOptions)


def test_checks_and_help_of_an_option_follow_from_its_field():
    """A new group is composed, checked and explained without a change of other files."""
    cfg = OmegaConf.merge(OmegaConf.structured(Kitchen), {"oven": {"degrees": 10, "name": "ston"}})
    kitchen: Any = OmegaConf.to_object(cfg)
    assert list(kitchen.problems()) == [
        "oven.name=ston: must be gas or stone; did you mean 'stone'?",
        "oven.degrees=10.0: must be at least 20",
    ]
    options = {one.key: one for one in described(Kitchen)}
    assert list(options) == ["oven.name", "oven.degrees", "oven.wood", "oven.racks"]
    assert options["oven.racks"].default == [1.0] and options["oven.wood"].kind == (
        "a whole number or null"
    )
    shown = [" ".join(" ".join(help._option(one)).split()) for one in options.values()]
    assert shown[1:3] == [
        "oven.degrees=180.0 number of degrees Celsius, at least 20 Temperature of the oven.",
        "oven.wood=null whole number or null, at least 1 Logs for the fire. Only with oven=stone.",
    ]


def test_two_runs_do_not_share_a_list():
    one, two = OvenOptions(), OvenOptions()
    one.racks.append(2.0)
    assert two.racks == OvenOptions().racks == [1.0]


def test_no_other_file_has_a_table_of_options():
    """Adding one touches the file of its group, and conf/ where a choice sets it."""
    for path in sorted((ROOT / "fedgpt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                keys = {k.value for k in node.keys if isinstance(k, ast.Constant)}
                assert len(keys & {key for key in OPTIONS if "." in key}) < 3, f"{path}: {keys}"


@pytest.mark.parametrize("key", OPTIONS)
def test_every_option_is_explained(key):
    one = OPTIONS[key]
    text = one.facts.help
    assert text[0].isalnum() or text[0] == "`", "a sentence"
    assert text.endswith(".") and "  " not in text
    assert one.kinds or key == "strategy", "help names its type"
    words = text.lower().split()
    assert not {"it", "its", "they", "this", "these"} & set(words[:2]), "a noun first"
    assert one.default in (None, "") or one.facts.allowed.holds(one.default)


@pytest.mark.parametrize("key", [key for key in OPTIONS if OPTIONS[key].facts.only_with])
def test_options_that_need_a_choice_name_existing_choices(key):
    group, only_with = OPTIONS[key].group, OPTIONS[key].facts.only_with
    files = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert set(only_with) < files


@pytest.mark.parametrize(
    "allowed, good, bad",
    [
        (at_least(1), [1, 2], [0, -1]),
        (at_least(1, or_zero="off"), [0, 1], [0.5, -1]),
        (above(0), [1e-9, 5], [0, -1]),
        (above(0, most=1), [1e-9, 1], [0, 1.1]),
        (above(0, or_zero="off"), [0, 3], [-1]),
        (between(0, 10), [0, 10], [-1, 11]),
        (share(), [0, 0.9], [1, -0.1]),
        (share(zero=False), [0.1], [0, 1]),
        (one_of("a", "b"), ["a"], ["c", ""]),
    ],
    ids=lambda value: getattr(value, "words", ""),
)
def test_ranges(allowed, good, bad):
    assert all(map(allowed.holds, good)) and not any(map(allowed.holds, bad))


def test_a_run_may_be_named_custom():
    assert not list(RunOptions(name="custom", run_dir="x", cache_dir="y").problems())


def test_all_problems_of_all_groups_are_reported():
    wrong = RunOptions(run_dir="x", cache_dir="y", rounds=0)
    wrong.local.lr, wrong.local.min_lr, wrong.corpus.public = 0.5, 0.9, 2.0
    problems = list(wrong.problems())
    assert problems[0] == "rounds=0: must be at least 1"
    assert [p.split(":")[0] for p in problems[1:]] == [
        "corpus.public=2.0",
        "corpus.public=2.0 and corpus.held_out=0.05 leave nothing to the clients",
        "local.min_lr=0.9",
    ]
    assert not list(RUN.problems())


@pytest.mark.parametrize(
    "members", [CORPORA, PARTITIONS, CODECS, RUNTIMES, TASKS], ids=lambda members: members.group
)
def test_the_default_of_a_group_is_a_member_and_a_custom_class_needs_its_name(members):
    mine = getattr(RunOptions(), members.group)
    assert mine.chosen in members.names()
    assert members.key == mine.key(mine.choice_field)
    setattr(mine, mine.choice_field, "custom")
    [problem] = members.problems(mine)
    assert problem.startswith(f"{members.group}._target_ is not set")
    mine._target_ = "my_package.Mine"
    [problem] = members.problems(mine)
    assert "trusted_packages=[my_package]" in problem
