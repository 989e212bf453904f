"""What a site reads of a server's options, and that nothing else of them has an effect."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advice import advises

from fedgpt.config import compose, of_server
from fedgpt.config.of_server import PARTS, options_of_server
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import OPTIONS

SITE = ["corpus=site", "corpus.public_path=.", "corpus.held_out_path=.", "pace.begin=2"]
SECRET = "hunter2"
REFERENCE = "${oc.env:FEDGPT_TEST_SECRET}"


@pytest.fixture(scope="module")
def sent() -> dict[str, Any]:
    """The options of a run as its server sends them."""
    return yaml.safe_load(compose.to_yaml(compose.load(SITE)))


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["privacy=example", "pace.clients=0", "local.steps=7"],
        ["update=int8", "update.error_feedback=true", "model=micro", "seed=3"],
        ["pace=buffer", "pace.goal=2", "tokens=50000", "model.trainable=[transformer.wte.weight]"],
        ["privacy=client", "privacy.clip=0.5", "privacy.noise_multiplier=2", "name=night"],
    ],
    ids=" ".join,
)
def test_a_site_reads_what_a_client_needs_as_it_was_typed(words):
    options = compose.load([*SITE, *words])
    found = options_of_server(compose.to_yaml(options))
    for part in PARTS:
        assert getattr(found, part) == getattr(options, part), part
    assert found.corpus.at_sites and found.trusted_packages == [] and found.init_from is None


def changed(sent: dict[str, Any], key: str, value: Any) -> str:
    """The options as YAML, one of them with another value."""
    options = yaml.safe_load(yaml.safe_dump(sent))
    *groups, name = key.split(".")
    node = options
    for group in groups:
        node = node[group]
    node[name] = value
    return yaml.safe_dump(options)


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_a_reference_in_an_option_is_refused_or_without_effect(sent, monkeypatch, key):
    monkeypatch.setenv("FEDGPT_TEST_SECRET", SECRET)
    try:
        options = options_of_server(changed(sent, key, REFERENCE))
    except ConfigError as error:
        assert SECRET not in str(error)
    else:
        assert SECRET not in repr(options) and key.partition(".")[0] not in PARTS


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module that leaves a file when it is imported."""
    (tmp_path / "left_behind.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('imported').touch()\n"
        "class Mine:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "left_behind", raising=False)
    return tmp_path / "imported"


TARGETS = [key for key in OPTIONS if key.endswith("_target_")]


@pytest.mark.parametrize("trusted", [[], ["left_behind"], "left_behind"])
@pytest.mark.parametrize("key", [*TARGETS, "strategy", "metrics", "track"])
def test_no_class_that_a_server_names_is_imported(sent, module, key, trusted):
    value: Any = "left_behind.Mine"
    if not key.endswith("_target_"):
        value = {"_target_": value} if key == "strategy" else [{"_target_": value}]
    options = yaml.safe_load(changed(sent, key, value))
    options["trusted_packages"] = trusted
    for name in ("custom", None):
        group = key.partition(".")[0]
        if name and isinstance(options.get(group), dict) and "name" in options[group]:
            options[group]["name"] = name
        with suppress(ConfigError):
            options_of_server(yaml.safe_dump(options))
    assert not module.exists() and "left_behind" not in sys.modules


@pytest.mark.parametrize("group", ["task", "update"])
def test_a_class_of_another_package_is_refused_by_name(sent, group):
    options = yaml.safe_load(changed(sent, f"{group}._target_", "mine.Own"))
    with pytest.raises(ConfigError, match=f"{group}._target_='mine.Own': a site runs no") as error:
        options_of_server(yaml.safe_dump(options))
    advises(error.value, "choose one of fedgpt's own")
    options[group]["_target_"] = None
    assert options_of_server(yaml.safe_dump(options)).corpus.at_sites


def test_trusted_packages_are_refused(sent):
    options = changed(sent, "trusted_packages", ["mine"])
    with pytest.raises(ConfigError, match="a site runs no code that a server names") as error:
        options_of_server(options)
    advises(error.value, "leave it out")
    assert options_of_server(changed(sent, "trusted_packages", [])).corpus.at_sites


PATHS = ["fleet.path", "corpus.path", "corpus.public_path", "corpus.held_out_path", "init_from"]
PATHS += ["run_dir", "cache_dir", "resume"]


@pytest.mark.parametrize("key", PATHS)
def test_no_file_that_a_server_names_is_opened_or_told_of(sent, tmp_path, key):
    note = tmp_path / "note.csv"
    note.write_text(f"{SECRET} is the first word of this note, and its only line\n")
    options = yaml.safe_load(changed(sent, key, str(note)))
    options["fleet"]["name"] = "trace"
    options["clock"] = "virtual"
    opened: list[str] = []
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "os.listdir", "os.scandir"):
            opened.append(str(arguments[0]))

    sys.addaudithook(hook)
    try:
        found = options_of_server(yaml.safe_dump(options))
    finally:
        active = False
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert str(note) not in repr(asdict(found)) and SECRET not in repr(asdict(found))


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not a YAML mapping"),
        ("7", "is not a YAML mapping"),
        ("[1, 2]", "is not a YAML mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        (BOMB, "has an alias of YAML"),
        ("[" * 3000, "has more than 16 levels"),
        ("a: " + "[" * 60_000, "has more than 16 levels"),
        ("\n".join(" " * n + "a:" for n in range(300)), "has more than 16 levels"),
        ("a: [" + "a," * 30_000 + "]", "has more values than a site reads"),
        ("".join(f"k{n}: 1\n" for n in range(6000)), "has more values than a site reads"),
        ("".join(f"- &a{n} x\n" for n in range(5000)), "has more values than a site reads"),
        ("x" * ((1 << 16) + 1), "has 65,537 characters, and a site reads 65,536"),
        ("rounds: 1" + ":1" * 30_000 + ".5", "is not YAML"),
        (
            "corpus: {name: site}\npace: {begin: 2}\nmodel: {trainable: [[a]]}",
            "must be patterns of names",
        ),
        ("corpus: {name: site}\nrounds: 0", "rounds=0: must be at least 1"),
        ("corpus: {name: site}\nmodel: 7", "ModelOptions"),
        ("corpus: {name: [site]}", "corpus"),
        ("corpus: {name: site}\nlocal: {nonsense: 1}", "nonsense"),
    ],
)
def test_what_cannot_be_read_is_one_message(text, problem):
    with pytest.raises(ConfigError) as refused:
        options_of_server(text)
    assert problem in str(refused.value) and len(str(refused.value)) < 2000


def model_of(sent: dict[str, Any], layers: int, patterns: list[str]) -> str:
    model = {**sent["model"], "n_layer": layers, "trainable": patterns}
    return yaml.safe_dump({**sent, "model": model})


def test_the_name_of_every_parameter_of_a_deep_model_is_read(sent):
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")
    names = [f"transformer.h.{layer}.{part}.weight" for layer in range(96) for part in parts]
    assert options_of_server(model_of(sent, 96, names)).model.trainable == names


def test_more_patterns_than_can_be_compared_are_refused_before_they_are(sent):
    many = [f"*ln_f.weight{'*' * n}" for n in range(7)]
    with pytest.raises(ConfigError, match="7 patterns for 10,000 layers") as refused:
        options_of_server(model_of(sent, 10_000, many))
    advises(refused.value, "write fewer, with * for any characters")
    assert options_of_server(model_of(sent, 10_000, many[:1])).model.trainable == many[:1]


def test_a_model_of_any_depth_is_refused_before_its_parameters_are_listed(sent, monkeypatch):
    """Their list would take as much memory as the server likes."""
    monkeypatch.setattr(of_server, "trainable_problems", lambda model: pytest.fail("listed"))
    options = yaml.safe_load(changed(sent, "model.n_layer", 10**8))
    options["model"]["trainable"] = ["x"]
    with pytest.raises(ConfigError, match="n_layer=100000000: must be at most"):
        options_of_server(yaml.safe_dump(options))


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*PARTS, "corpus", "strategy", "trusted_packages", "fleet"]),
        st.recursive(
            LEAVES,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["name", "_target_", "steps"]), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_options_are_read_or_refused(options):
    with suppress(ConfigError):
        options_of_server(yaml.safe_dump(options))
