"""The recipes of docs/extending.md, followed in an empty folder outside the repository."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.here import run_here, tiny_model, tiny_run
from test_readme import ROOT, TEXTS, blocks, commands
from test_tutorial import alike

from fedgpt import Run, cli, open_run
from fedgpt.__main__ import main
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError

GUIDE = TEXTS["docs/extending.md"]
RECIPES = dict(re.findall(r"^## An? (\w+)\n(.*?)(?=^## |\Z)", GUIDE, re.M | re.S))
OUTSIDE = [kind for kind in RECIPES if kind != "command"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The reader's empty folder; changes of a command to this process are undone after the test."""
    reader = tmp_path / "reader"
    reader.mkdir()
    monkeypatch.chdir(reader)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    forget()
    yield reader
    signal.signal(signal.SIGTERM, handler)
    forget()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Run:
    """A run of the same length without a class of the reader."""
    folder = tmp_path_factory.mktemp("plain")
    run_here(*tiny_run(folder), "rounds=2")
    return open_run(folder / "run")


def forget() -> None:
    """Let the next `import mine` read the file again."""
    sys.modules.pop("mine", None)
    importlib.invalidate_caches()


def small(words: list[str], text: Path) -> list[str]:
    """A command of the guide, on two short texts with a tiny model, in this process."""
    command, *typed = [word for word in words[1:] if not word.startswith("local.steps=")]
    own = {word.partition("=")[0] for word in typed}
    text.mkdir(exist_ok=True)
    cache = f"cache_dir={text / 'cache'}"
    options = [*tiny_model(), cache] if "corpus" in own else tiny_run(text)
    options = [word for word in options if word.partition("=")[0] not in own | {"run_dir"}]
    if "runtime" not in own:
        options.append("runtime=inprocess")
    return [command, *typed, *options]


def type_in(arguments: list[str], monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fedgpt", *arguments])
    return main()


def test_every_row_of_the_table_has_a_recipe_and_files_that_exist():
    rows = re.findall(r"^\| \[(\w+)\]\(#(\S+)\) \| .*? \| (.*?) \| (.*) \|$", GUIDE, re.M)
    assert [row[0] for row in rows] == list(RECIPES)
    assert len(rows) == 9
    for kind, anchor, outside, inside in rows:
        assert anchor in (f"a-{kind}", f"an-{kind}")
        typed = " ".join(" ".join(words) for words in commands(RECIPES[kind]))
        for word in re.sub(r"^not possible$|[`}\]]", "", outside).split():
            assert word.split("[")[-1] in typed, f"{kind}: {word} is in no command"
        for path in re.findall(r"`([\w/.]+)`", inside):
            assert (ROOT / path).parent.is_dir(), path
            assert path in RECIPES[kind], f"{kind}: {path} is only in the table"


def test_files_that_the_guide_names_exist_unless_it_adds_them():
    for path in sorted(set(re.findall(r"`((?:tests|conf)/[\w/]+\.\w+)`", GUIDE))):
        added = re.search(rf"Write\s`{path}`", GUIDE) is not None
        assert added != (ROOT / path).exists(), path
    for name, path in re.findall(r"`([A-Z]+)` in `(tests/\S+)`", GUIDE):
        assert f"{name} = " in (ROOT / path).read_text(), path
    for path, name in re.findall(r"In `(tests/\S+)` add it to\s`([A-Z]+)`", GUIDE):
        assert f"{name} = " in (ROOT / path).read_text(), path


@pytest.mark.parametrize("kind", OUTSIDE)
def test_a_recipe_does_what_it_says(kind, folder, plain, tmp_path, monkeypatch, capfd):
    recipe = RECIPES[kind]
    (code,) = blocks(recipe, "python")
    (folder / "mine.py").write_text(code)
    printed, last = "", [""]
    for words in commands(recipe):
        if words[:2] == ["fedgpt", "help"]:
            assert type_in(words[1:], monkeypatch) == 0
            capfd.readouterr()
        elif words[0] == "fedgpt" and len(words) > 2:
            assert type_in(small(words, tmp_path / "text"), monkeypatch) == 0
            printed = capfd.readouterr().out
            last = [*words]
    for output in blocks(recipe, "text"):
        assert alike(output, printed), printed
    assert Path(str(sys.modules["mine"].__file__)).parent == folder
    if "run" in last:
        run_dir = next(word for word in last if word.startswith("run_dir=")).partition("=")[2]
        assert open_run(run_dir).summary["versions"] == 2
        assert "mine." in (folder / run_dir / "config.yaml").read_text()
    if kind in CHECKS:
        CHECKS[kind](folder / "runs" / kind, printed, last, plain)


def check_strategy(run: Path, printed: str, words: list[str], plain: Run) -> None:
    """It applies half of each step, so it is slower than federated averaging."""
    slow, fast = open_run(run).summary, plain.summary
    assert slow["initial"]["loss"] == fast["initial"]["loss"]
    assert slow["initial"]["loss"] > slow["final"]["loss"] > fast["final"]["loss"]


def check_codec(run: Path, printed: str, words: list[str], plain: Run) -> None:
    """It sends about a quarter of the bytes, and no update is rejected."""
    summary = open_run(run).summary
    assert 0.24 < summary["bytes_up"] / summary["bytes_down"] < 0.3
    assert summary["rejected"] == {}


def check_corpus(run: Path, printed: str, words: list[str], plain: Run) -> None:
    """It has three poets."""
    lines = (run / "events.jsonl").read_text().splitlines()
    assert {json.loads(line).get("client") for line in lines} >= {"ann", "bob", "eve"}


def check_task(run: Path, printed: str, words: list[str], plain: Run) -> None:
    assert "bits per byte" not in printed
    assert open_run(run).summary["score"] == "loss"


def check_metric(run: Path, printed: str, words: list[str], plain: Run) -> None:
    lines = [line for line in open_run(run).metrics if "top_accuracy" in line]
    assert lines
    assert all(line["top_accuracy"] >= line["accuracy"] for line in lines)
    assert "top_accuracy" in open_run(run).summary["final"]
    assert "top accuracy" in (run / "report.html").read_text()


def check_tracker(run: Path, printed: str, words: list[str], plain: Run) -> None:
    lines = (run / "my_diary.txt").read_text().splitlines()
    versions = [line for line in lines if line.startswith("version")]
    assert versions == ["version 0", "version 1", "version 2"]
    assert len([line for line in lines if line.startswith("update from")]) == 4
    assert len(lines) == 7
    assert len((run / "metrics.csv").read_text().splitlines()) == 4


def check_runtime(run: Path, printed: str, words: list[str], plain: Run) -> None:
    """It refuses too many clients, and changes no weight."""
    assert open_run(run).summary["weights_sha256"] == plain.summary["weights_sha256"]
    words += ["partition=iid", "partition.clients=51"]
    with pytest.raises(ConfigError, match="runtime=timed: takes at most 50 clients, not 51"):
        compose.load(words[2:])


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_")
}


def command_of(line: str) -> cli.Command:
    """The command that a line of the guide adds to COMMANDS; its arguments must be literals."""
    call = ast.parse(line.strip().removesuffix(","), mode="eval").body
    assert isinstance(call, ast.Call) and ast.unparse(call.func) == "Command", line
    arguments = [ast.literal_eval(argument) for argument in call.args]
    return cli.Command(*arguments, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


def test_the_recipe_of_a_command_does_what_it_says(folder, plain, monkeypatch, capfd):
    code, line = blocks(RECIPES["command"], "python")
    (shown,) = blocks(RECIPES["command"], "text")
    (folder / "scores.py").write_text(code)
    command = command_of(line)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(folder)])
    monkeypatch.setitem(cli.COMMANDS, "scores", command)
    (folder / "runs").mkdir()
    (folder / "runs" / "strategy").symlink_to(plain.folder)
    prompt, _, output = shown.partition("\n")
    assert type_in(shlex.split(prompt)[2:], monkeypatch) == 0
    assert alike(output, capfd.readouterr().out)
    # help
    assert type_in(["--help"], monkeypatch) == 0
    assert command.usage in capfd.readouterr().out
    assert type_in(["scores", "--help"], monkeypatch) == 0
    assert "Prints each version of a run" in capfd.readouterr().out
    # wrong folders
    for wrong in (["scores"], ["scores", "nowhere"]):
        assert type_in(wrong, monkeypatch) == 2
        assert capfd.readouterr().err.startswith("fedgpt: ")
    sys.modules.pop("fedgpt.cli.scores")


@pytest.mark.slow
def test_one_file_with_all_classes_serves_the_processes_of_the_pool(tmp_path):
    reader = tmp_path / "reader"
    reader.mkdir()
    code = [blocks(RECIPES[kind], "python")[0] for kind in OUTSIDE]
    (reader / "mine.py").write_text("\n\n".join(code))
    words: list[str] = []
    for kind in OUTSIDE:
        trained = [words for words in commands(RECIPES[kind]) if "help" not in words]
        typed = trained[-1] if kind != "runtime" else []
        words += [word for word in typed[2:] if word not in words and "run_dir" not in word]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
    options = small(["fedgpt", "run", *words], tmp_path / "text")
    options = [word for word in options if word != "runtime=inprocess"]
    done = subprocess.run(
        [sys.executable, "-m", "fedgpt", *options, "runtime.workers=2", "run_dir=run"],
        cwd=reader,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Half: " in done.stdout
    run = open_run(reader / "run")
    assert run.summary["rejected"] == {}
    assert "top_accuracy" in run.summary["final"]
    assert (run.folder / "my_diary.txt").exists()
