"""A command that takes long says on stderr what it is doing, and stdout stays as it is."""

from __future__ import annotations

import threading

import pytest
from support.here import run_here, tiny_run

from fedgpt.cli import COMMANDS, dispatch
from fedgpt.core import notices
from fedgpt.core.errors import ConfigError

LONG = 30.0  # seconds; limits a wait


def test_a_block_that_takes_long_is_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(notices, "PATIENCE", 0.01)
    with notices.saying("counting sand"):
        [timer] = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
        timer.join(LONG)
    assert capsys.readouterr() == ("", "fedgpt: counting sand ...\n")


def test_a_short_block_and_one_that_fails_are_not_reported(capsys):
    with notices.saying("nothing"):
        pass
    with pytest.raises(ZeroDivisionError), notices.saying("failing"):
        raise ZeroDivisionError
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer) and t.is_alive()]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "command, more, printed",
    [
        (["data"], [], ["reading the text"]),
        (
            ["privacy", "plan"],
            ["privacy=example"],
            ["reading the text", "computing the noise and its cost"],
        ),
        (
            ["audit"],
            ["privacy=none"],
            [
                "reading the text",
                "training on half of the blocks of ",
                "looking for the tokens of ",
            ],
        ),
    ],
    ids=["data", "privacy plan", "audit"],
)
def test_commands_say_what_they_are_doing(command, more, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notices, "PATIENCE", 0.0)
    name, *words = command
    COMMANDS[name].module.main([*words, *tiny_run(tmp_path), *more])
    out, err = capsys.readouterr()
    assert "fedgpt: " not in out and out.strip()
    for line in printed:
        assert f"fedgpt: {line}" in err


def test_a_run_says_what_it_is_doing_between_its_own_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notices, "PATIENCE", 0.0)
    words = ["privacy=client", "privacy.noise_multiplier=5", "privacy.target_epsilon=null"]
    run_here(*tiny_run(tmp_path), *words, "rounds=1", "evaluate.samples=1")
    COMMANDS["generate"].module.main([str(tmp_path / "run"), "--tokens", "1"])
    err = capsys.readouterr().err
    places = [
        err.index(f"fedgpt: {what} ...\n")
        for what in (
            "reading the text",
            "computing the noise",
            "loading PyTorch",
            "preparing the evaluation",
            "scoring version 0",
            "writing the results",
            "reading the model and generating text",
        )
    ]
    assert places == sorted(places) and err.count("scoring version") == 1


@pytest.mark.parametrize(
    "command, options, part",
    [
        (["audit"], ["privacy=local"], "privacy=local: an update is noised before it leaves"),
        (["audit"], ["model.trainable=[transformer.h.*]"], "model.trainable=['transformer.h.*']"),
        (["privacy", "plan"], [], "privacy=none: has no cost to plan"),
    ],
)
def test_what_a_command_cannot_do_is_refused_before_text_is_read(command, options, part, tmp_path):
    """The corpus is not there, which the first reader would report."""
    name, *words = command
    nowhere = ["corpus=files", f"corpus.path={tmp_path}/nowhere"]
    with pytest.raises(ConfigError) as caught:
        COMMANDS[name].module.main([*words, *nowhere, *options])
    assert part in str(caught.value)


@pytest.mark.parametrize("command", [["data"], ["privacy", "plan"]], ids=" ".join)
def test_the_folder_of_another_run_stays_as_it_is(command, tmp_path, capsys):
    """A command that does not train writes no run folder, so `run_dir` may be any."""
    words = [*tiny_run(tmp_path), "privacy=local"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 4\n")
    name, *rest = command
    assert COMMANDS[name].module.main([*rest, *words]) == 0
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "seed: 4\n" and capsys.readouterr().out


def test_a_warning_of_a_command_says_whose_it_is(tmp_path, capsys):
    run_here(*tiny_run(tmp_path), "tokenizer=bpe", "tokenizer.vocab_size=270", "rounds=1")
    damaged = tmp_path / "run" / "tokenizer" / "tokenizer.json"
    damaged.write_text("{}")
    capsys.readouterr()
    assert dispatch("generate", [str(tmp_path / "run"), "--prompt", "ann", "--tokens", "3"]) == 0
    printed = capsys.readouterr().err
    assert printed.count(f"fedgpt: {damaged}: no tokenizer that fedgpt can read (") == 1
    assert "; the tokenizer is made again\n" in printed
