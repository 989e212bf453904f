"""The commands of docs/deploy.md about keys, typed one after the other, print what it shows."""

from __future__ import annotations

import re
from pathlib import Path

from test_readme import TEXTS
from test_tutorial import alike, shown

from fedgpt import cli
from fedgpt.flower.deploy.keys import all_sites, read_kit, sites

DOCUMENT = TEXTS["docs/deploy.md"].partition("\n## The server\n")[0]


def without_keys(text: str) -> str:
    """A text whose fingerprints, of which a new folder has others, have one form."""
    return re.sub(r"SHA256:\S+", "(fingerprint)", text)


def test_the_commands_of_the_document_print_what_it_shows(tmp_path, monkeypatch, capsys):
    """All of them in one folder, as if the site and the operator worked on one machine."""
    monkeypatch.chdir(tmp_path)
    seen = []
    for words, output in shown(DOCUMENT):
        assert cli.dispatch(words[1], words[2:]) == 0, words
        printed = capsys.readouterr().out
        assert not output or alike(without_keys(output), without_keys(printed)), printed
        seen.append(words[2])
    assert set(seen) == {"init", "request", "approve", "list", "renew", "revoke"}
    assert sites("server") == {} and list(all_sites("server")) == ["clinic-a"]
    for kit in ("clinic-a.kit", "new/clinic-a.kit"):
        assert read_kit(kit).approval.address == "fed.example.org:9443"


def test_the_table_names_every_file_that_the_commands_leave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, _ in shown(DOCUMENT):
        assert cli.dispatch(words[1], words[2:]) == 0
    table = DOCUMENT[DOCUMENT.index("| file |") : DOCUMENT.index("Whoever can read a kit")]
    named = set(re.findall(r"`([\w./-]+)`", table))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    left = {Path(name).as_posix() for name in files} - {"server/.lock"}
    assert {name.removeprefix("new/") for name in left} <= named
