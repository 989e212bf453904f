"""A user's folder of groups: each mistake names the file, the key and the line; no traceback."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.advice import advises
from support.users import become_nobody, folder_of_root

from fedgpt.config import compose
from fedgpt.core.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """A function that writes a choice of the user's folder and returns the folder."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path)

    return write


def found(words: list[str], folder: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.load(words, folder)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 8)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content, part",
    [
        ("0\n", "must be options and their values, such as n_layer: 4"),
        ("n_layers: 2\n", "no option 'model.n_layers'; did you mean 'model.n_layer'"),
        ("# @package _global_\nseeed: 2\n", "no option 'seeed'; did you mean 'seed'"),
        (
            "n_layer:\t2\n",
            "is not valid YAML (while scanning for the next token found character '\\t'",
        ),
        (
            "a: [1,\n  b: 2\n",
            "is not valid YAML (while parsing a flow sequence in line 1, column 4",
        ),
        (
            "n_layer: 2\nn_head: 1\nn_layer: 3\n",
            "is not valid YAML (while constructing a mapping in line 1, column 1: n_layer: 2 ^"
            " found duplicate key n_layer in line 3, column 1",
        ),
        (b"n_layer: 2 # \xff\n", "cannot be read ('utf-8' codec can't decode byte 0xff"),
        ("- 1\n", "must be options and their values, such as n_layer: 4"),
        ("just words\n", "must be options and their values, such as n_layer: 4"),
        ("defaults: nano\n", "defaults must be a list of choices, such as [nano]"),
        (BOMB, "has more than 10,000 values, or an alias of itself"),
        ("trainable: &a [*a]\n", "has more than 10,000 values, or an alias of itself"),
        (f"n_layer: {'9' * 5000}\n", "is not valid YAML (Exceeds the limit (4300 digits)"),
        ("n_layer: 2024-13-45\n", "is not valid YAML (month must be in 1..12"),
        (f"n_layer: {'[' * 3000}\n", "is not valid YAML (maximum recursion depth exceeded"),
        (f"n_layer: {'{a: ' * 3000}\n", "is not valid YAML (maximum recursion depth exceeded"),
        (
            "n_layer: !!python/object:os.system 1\n",
            "is not valid YAML (could not determine a constr",
        ),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong_in_it(content, part, write):
    folder = write("model/mine", content)
    [problem] = found(["model=mine"], folder)
    assert problem.startswith(f"{folder}/model/mine.yaml: {part}"), problem
    if "is not valid YAML" in problem:
        advises(problem, "; correct it")
        write("model/mine", "n_layer: 2\n")
        compose.load(["model=mine"], folder)


@pytest.mark.parametrize(
    "content, problem",
    [
        ("n_layer: two\n", "model.n_layer: Value 'two' of type 'str' could not be converted to I"),
        ("n_layer: [2]\n", "model.n_layer: Value '[2]' of type 'ListConfig' could not be conv"),
        ("defaults: [no_such]\n", "In 'model/mine': Could not load 'model/no_such'."),
    ],
)
def test_a_value_that_hydra_refuses_is_reported_with_its_reason(content, problem, write):
    [text] = found(["model=mine"], write("model/mine", content))
    assert problem in text and "model/mine" in text


@pytest.mark.parametrize("written", ["2024_10", "1e5", "1.50", "true", "on", "0x10", "007"])
def test_a_text_that_yaml_reads_as_something_else_is_refused(written, write):
    """YAML keeps no characters of a number, so the text that was meant is not known."""
    folder = write("experiment/mine", f"# @package _global_\nevaluate:\n  prompt: {written}\n")
    [problem] = found(["experiment=mine"], folder)
    assert problem.startswith(f"{folder}/experiment/mine.yaml: evaluate.prompt=")
    assert problem.endswith("a text that looks like a number is written in quotes")
    write("experiment/mine", f"# @package _global_\nevaluate:\n  prompt: '{written}'\n")
    assert compose.load(["experiment=mine"], folder).evaluate.prompt == written


def test_files_that_a_choice_is_built_on_are_checked_with_it(write):
    write("model/base", "n_layers: 2\n")
    write("local/mine", "stepps: 2\n")
    folder = write("experiment/mine", "defaults:\n  - override /local: mine\n")
    write("model/mine", "defaults: [base, _self_]\nn_head: 2\n")
    assert found(["model=mine"], folder)[0].startswith(f"{folder}/model/base.yaml: no option")
    assert (
        "local/mine.yaml: no option 'local.stepps'; did you"
        in found(["experiment=mine"], folder)[0]
    )


def test_files_that_are_not_chosen_are_not_read(write):
    write("model/broken", "\t")
    folder = write("model/mine", "defaults: [nano, _self_]\nn_layer: 1 # references\n")
    write("local/mine", "defaults: [adamw, _self_]\nlr: ${local.min_lr}\nmin_lr: '1e-4'\n")
    options = compose.load(["model=mine", "local=mine"], folder)
    assert options.model.n_layer == 1 and options.local.lr == 1e-4


def test_an_empty_file_sets_nothing(write):
    assert compose.load(["model=mine"], write("model/mine", "")).model == compose.load().model


def test_a_file_with_the_name_of_a_choice_of_fedgpt_is_refused(write):
    """Hydra would use fedgpt's file without a word."""
    folder = write("model/nano", "n_layer: 9\n")
    [problem] = found(["model=nano"], folder)
    assert problem.startswith(f"{folder}/model/nano.yaml: fedgpt has model=nano of its own; ")
    advises(problem, "give this file another name")
    write("model/mine", "n_layer: 9\n")
    assert compose.load(["model=mine"], folder).model.n_layer == 9


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "model/mine.yaml").mkdir(parents=True)
    [problem] = found(["model=mine"], str(tmp_path))
    assert problem == f"{tmp_path}/model/mine.yaml: is a folder; a choice is a file"


@settings(max_examples=12, deadline=None)
@given(st.binary(max_size=40) | st.text(st.sampled_from("ab: -[]{}&*!'\"\n\t#|>%@0"), max_size=25))
def test_any_file_is_read_or_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "model").mkdir()
    path = folder / "model/mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        compose.load(["model=mine"], str(folder))
    except ConfigError as error:
        assert all("model/mine" in p or p.startswith("model.") for p in error.problems), error


@pytest.mark.parametrize(
    "typed, message",
    [
        (
            "hydra/launcher=joblib",
            "hydra/launcher=joblib: is a plug-in of Hydra that is not installed; install it with:"
            " pip install hydra-joblib-launcher",
        ),
        ("hydra/sweeper=optuna", "hydra/sweeper=optuna: is a plug-in of Hydra that is not"),
        ("hydra/job_logging=colorlog", "hydra/job_logging=colorlog: is a plug-in of Hydra that"),
        ("hydra/launcher=nope", "hydra/launcher=nope: choose from basic"),
        ("hydra/job_logging=defualt", "hydra/job_logging=defualt: choose from default, disabled"),
        ("hydra.sweeper.x=1", "Could not override 'hydra.sweeper.x': hydra.sweeper.x: Key 'x' not"),
    ],
)
def test_a_plug_in_of_hydra_that_is_missing_is_reported_with_what_to_install(typed, message):
    [problem] = found([typed], "conf")
    assert problem.startswith(message)


@pytest.mark.parametrize("closed", ["parent", "parent/own", "parent/own/model"])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_config_dir_that_another_user_cannot_read_is_one_message(closed, mode):
    """It ended with a traceback, or its choices were unknown."""
    with folder_of_root() as folder:
        own = folder / "parent" / "own"
        (own / "model").mkdir(parents=True)
        (own / "model" / "foo.yaml").write_text("n_layer: 1\n")
        (folder / closed).chmod(mode)
        become_nobody()
        with pytest.raises(ConfigError) as caught:
            compose.load(["model=foo"], str(own))
    [message] = caught.value.problems
    assert message.startswith(f"--config-dir {own}: {folder / closed}")
    assert message.endswith("cannot be read (Permission denied)")
