"""A command that takes long says on stderr what it is doing, and stdout stays as it is."""

from __future__ import annotations

import threading

import pytest
from support.here import tiny_run

from fedgpt.cli import COMMANDS
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
