"""The folder with which a link is started: what is refused before anything is started."""

from __future__ import annotations

import threading
from argparse import Namespace
from pathlib import Path

import pytest
from filelock import FileLock
from support.advice import advises
from support.deployment import HOSTS, deployment

from fedgpt import cli
from fedgpt.cli.server import parser
from fedgpt.core.errors import ConfigError
from fedgpt.flower.deploy import link
from fedgpt.flower.deploy.folder import REPLY_OBJECTS
from fedgpt.flower.deploy.link import Settings, checked_settings


def settings(folder: Path, objects: int = 1) -> Settings:
    typed = {"folder": str(folder), "host": None, "insecure": False, "reply_objects": objects}
    return checked_settings(Namespace(**typed))


@pytest.mark.parametrize("name", ["none", "my server"])
def test_a_missing_folder_is_made_as_the_refusal_advises(tmp_path, capsys, name):
    folder = tmp_path / name
    with pytest.raises(ConfigError) as refused:
        settings(folder)
    shown = f"'{folder}'" if " " in name else folder
    advises(
        refused.value,
        f"DIR={folder}: no such folder; make one with: fedgpt keys init {shown} --host NAME",
    )
    assert cli.dispatch("keys", ["init", str(folder), "--host", HOSTS[0]]) == 0
    assert settings(folder).folder == folder


def test_a_folder_that_others_may_open_is_closed_as_the_refusal_says(tmp_path):
    folder: Path = deployment(tmp_path).folder
    folder.chmod(0o755)
    with pytest.raises(ConfigError, match="other users may open it; allow only yours: chmod 700"):
        settings(folder)
    folder.chmod(0o700)
    assert settings(folder).port == 9443


@pytest.mark.parametrize("objects", [0, -1])
def test_a_reply_of_no_objects_is_refused(tmp_path, objects):
    folder = deployment(tmp_path).folder
    with pytest.raises(ConfigError, match=f"--reply-objects={objects}: must be at least 1"):
        settings(folder, objects)
    settings(folder)


@pytest.mark.parametrize("objects", [0, -1])
def test_the_server_refuses_a_reply_of_no_objects_before_it_starts_its_link(
    tmp_path, capsys, objects
):
    folder: Path = deployment(tmp_path).folder
    assert cli.dispatch("server", [str(folder), f"--reply-objects={objects}", "--print"]) == 2
    assert f"--reply-objects={objects}: must be at least 1" in capsys.readouterr().err


def test_the_server_passes_the_most_objects_of_a_reply_to_its_link(tmp_path, capsys):
    folder: Path = deployment(tmp_path).folder
    assert cli.dispatch("server", [str(folder), "--reply-objects", "700", "--print"]) == 0
    command = capsys.readouterr().out.splitlines()[-2]
    assert command.endswith(f"fedgpt.flower.deploy.link {folder} --reply-objects=700")
    assert f"({REPLY_OBJECTS})" in parser().format_help()


def test_a_link_waits_for_the_end_of_that_of_a_server_that_was_killed(tmp_path, monkeypatch):
    folder = deployment(tmp_path).folder
    served = []

    async def serve(given: Settings) -> None:
        served.append(given.folder)

    monkeypatch.setattr(link, "serve", serve)
    before = FileLock(folder / "link.lock", thread_local=False)
    before.acquire()
    timer = threading.Timer(0.3, before.release)
    timer.start()
    assert link.main([str(folder)]) == 0 and served == [folder]
    timer.join()
