"""The tutorial's commands print what it shows; links into documents and the glossary are valid."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_readme import FENCE, ROOT, TEXTS, commands, shape

from fedgpt import open_run

TUTORIAL, GLOSSARY = TEXTS["docs/tutorial.md"], TEXTS["docs/glossary.md"]
STOPPED = "run_dir=runs/stopped"  # the reader presses Ctrl-C in this run, and resumes it
SECONDS = 900  # limit for one command, on a machine that is busy with other tests


class Shown(NamedTuple):
    """One command of the tutorial and the output shown for it."""

    words: list[str]
    output: str


def shown(text: str) -> list[Shown]:
    """Every command in a shell block, in order, with the block of output behind it, if any."""
    found: list[Shown] = []
    for _, language, body in FENCE.findall(text):
        if language == "sh":
            found += [Shown(words, "") for words in commands(f"```sh\n{body}```\n")]
        elif language == "text":
            found[-1] = found[-1]._replace(output=found[-1].output + body)
    return found


def entries(text: str) -> list[tuple[str, str]]:
    """(anchor, term) of every entry of the glossary."""
    return re.findall(r'^<a id="([\w-]+)"></a>\n\*\*(.+?)\*\*', text, re.M)


def anchors(text: str) -> set[str]:
    """What a link into a document may name: its ids, and its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    named = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return named | set(re.findall(r'<a id="([\w-]+)">', text))


def broken_anchors(texts: dict[str, str]) -> list[tuple[str, str]]:
    """(document, link) of every link with a # that leads to a place that does not exist."""
    places = {at: anchors(text) for at, text in texts.items()}
    broken = []
    for at, text in texts.items():
        for link in re.findall(r"\]\(([^()\s]*#[^()\s]*)\)", FENCE.sub("", text)):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = os.path.normpath(Path(at).parent / path) if path else at
            if anchor not in places.get(target, set()):
                broken.append((at, link))
    return broken


def test_every_link_into_a_document_has_its_anchor():
    assert broken_anchors(TEXTS) == []


def test_a_link_without_its_anchor_is_detected():
    texts = {
        "README.md": "# A b\n[one](docs/g.md#job) [two](docs/g.md#jobs) [three](#a-b) [four](#c)",
        "docs/g.md": '<a id="job"></a>\n**Job.** See [the readme](../README.md#a-b).',
    }
    assert broken_anchors(texts) == [("README.md", "docs/g.md#jobs"), ("README.md", "#c")]


def test_the_glossary_has_every_word_once_in_alphabetical_order():
    found = entries(GLOSSARY)
    assert len(found) == GLOSSARY.count("<a id=") > 50
    assert len({anchor for anchor, _ in found}) == len(found)
    terms = [term.rstrip(".").lower() for _, term in found]
    assert terms == sorted(terms)


def test_the_tutorial_links_each_word_once():
    linked = re.findall(r"\(glossary\.md#([\w-]+)\)", TUTORIAL)
    assert len(linked) >= 25
    assert len(set(linked)) == len(linked)


def test_commands_are_found_with_their_output():
    text = "```sh\nfedgpt data \\\n    seed=1\n```\n\n```text\nclients 2\n```\n`make demo`\n"
    assert shown(text) == [Shown(["fedgpt", "data", "seed=1"], "clients 2\n")]


def test_every_run_of_the_tutorial_has_a_folder_of_its_own():
    runs = [w for words, _ in shown(TUTORIAL) for w in words if w.startswith("run_dir=")]
    assert len(runs) >= 6
    assert len(set(runs)) == len(runs)


def alike(output: str, printed: str) -> bool:
    """Whether a command printed what the tutorial shows, except for numbers and digests."""
    output, printed = (shape(re.sub(r"(sha256) \w+", r"\1", text)) for text in (output, printed))
    checker = doctest.OutputChecker()
    return checker.check_output(output, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def test_only_numbers_may_differ_from_what_is_shown():
    output = "...\nversion 2 | held-out 4.99 | ...\nweights  sha256 8602c8\n"
    printed = "run\nversion  3 | held-out 5.1 | up 3 kB\nweights  sha256 b69a72\n"
    assert alike(output, printed)
    assert not alike(output, printed.replace("held-out", "train"))


# ---- the complete tutorial


def type_in(words: list[str], env: dict[str, str], folder: Path) -> str:
    """The output of a command; the run that is stopped gets Ctrl-C after its second version."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    try:
        printed = ""
        if STOPPED in words:
            while "version 2 " not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            process.send_signal(signal.SIGINT)
        printed += process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == (130 if STOPPED in words else 0), printed
    return printed


@pytest.mark.long
def test_the_tutorial_does_what_it_says(tmp_path):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FEDGPT_CACHE": str(tmp_path / "cache"),
        "COLUMNS": "120",
    }
    reader = tmp_path / "reader"
    reader.mkdir()
    for words, output in shown(TUTORIAL):
        printed = type_in(words, env, reader)
        assert not output or alike(output, printed), f"{shlex.join(words)} printed\n{printed}"
    check_results(reader / "runs")


def check_results(runs: Path) -> None:
    """Assert what the tutorial claims about the results."""
    folders = sorted(path.name for path in runs.iterdir())
    assert folders == ["async", "one", "private", "rounds", "stopped", "two", "uneven"]
    done = {name: open_run(runs / name).summary for name in folders}
    for name, summary in done.items():
        assert summary["final"]["loss"] < summary["initial"]["loss"], name
    tokens = {name: summary["tokens"] for name, summary in done.items()}
    assert len(set(tokens.values())) == 1, tokens
    versions = {name: summary["versions"] for name, summary in done.items()}
    assert versions["one"] == 2 * versions["two"] == 4 * versions["uneven"] == versions["async"]
    loss = {name: summary["final"]["loss"] for name, summary in done.items()}
    assert loss["one"] < loss["two"] < loss["uneven"] < loss["private"]
    # the fleet changes the time and nothing else
    assert done["rounds"]["weights_sha256"] == done["uneven"]["weights_sha256"]
    assert done["async"]["virtual_seconds"] < done["rounds"]["virtual_seconds"] / 2
    assert done["stopped"]["weights_sha256"] == done["two"]["weights_sha256"]
    assert done["private"]["private"]
    assert 0 < done["private"]["epsilon"] <= 8
