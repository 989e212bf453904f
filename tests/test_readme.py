"""What the README says works: commands, options, targets, links and code are those of this repository."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedgpt import api, cli, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", re.M | re.S)
PROGRAMS = ("fedgpt", "python", "make")

written = pytest.mark.skipif(not README.strip(), reason="README.md is still empty")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of the languages."""
    return [body for _, language, body in FENCE.findall(text) if language in languages]


def commands(text: str) -> list[list[str]]:
    """Words of every command that starts with one of our programs, wherever it is installed.

    They stand in shell blocks, in indented lines and as inline code.
    """
    prose = FENCE.sub("", text)
    shell = [re.sub(r"\\\n\s*", " ", body) for body in blocks(text, "sh", "bash", "shell", "console")]
    lines = [line for body in shell for line in body.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)$", prose, re.M) + re.findall(r"`([^`\n]+)`", prose)
    found = []
    for typed in lines:
        line = re.sub(r"<[\w ./-]+>", "PLACEHOLDER", typed).removeprefix("$ ")  # <the folder of a run>
        if re.match(rf"([A-Z_]+=\S* )*(\S*/)?({'|'.join(PROGRAMS)}) ", line):
            words = shlex.split(line, comments=True)
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # PYTHONPATH=. fedgpt run
                words.pop(0)
            found.append([Path(words[0]).name, *words[1:]])
    return found


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def check(words: list[str], folder: Path, readme: str) -> None:
    """Raise where a command could not work; `folder` is empty and stands for everything that the user brings."""
    program, *arguments = words
    if program == "python" and arguments[:2] == ["-m", "fedgpt"]:
        program, arguments = "fedgpt", arguments[2:]
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets(), words
    elif program == "python":
        check_python(arguments)
    elif arguments[0] in ("run", "data"):
        check_options(arguments[0], [_filled(word, folder) for word in arguments[1:]], folder, readme)
    elif arguments[0] in ("privacy", "audit"):  # what they print is tested in tests/flower/test_private_run.py
        assert arguments[:2] == ["privacy", "plan"] or arguments[0] == "audit"
        config.load([word for word in arguments[1:] if word != "plan"])
    elif arguments[0] == "generate":
        cli.generate([_filled(word, folder) for word in arguments[1:]])
    else:
        assert arguments[0] in ("--help", "-h", "--version"), words


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "README.md", "exec")
    elif arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), f"python {arguments[0]}: no such file"


def check_options(command: str, words: list[str], folder: Path, readme: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"])
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_intermixed_args(words)
    if any(word.startswith("resume=") for word in chosen.overrides):
        assert command == "run" and len(words) == 1, f"{words}: resume= stands alone"
        return
    for word in chosen.overrides:
        if word.startswith("strategy._target_="):
            bring_strategy(word.partition("=")[2], folder, readme)
    config_dir = bring_choices(chosen.overrides, folder / "conf") if chosen.config_dir else None
    (config.precheck if chosen.multirun else config.load)(chosen.overrides, config_dir)


def bring_strategy(target: str, folder: Path, readme: str) -> None:
    """Write the README's own class to the module that a command names, unless it is one of ours or of Flower."""
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in ("fedgpt", "flwr"):
        (code,) = [code for code in blocks(readme, "python", "py") if f"class {name}(" in code]
        (folder / f"{module}.py").write_text(code)
        sys.modules.pop(module, None)  # of another test
        importlib.invalidate_caches()


def bring_choices(overrides: list[str], conf: Path) -> str:
    """A user's conf folder with the choices that ours has not."""
    conf.mkdir(exist_ok=True)
    for group, _, choice in (word.partition("=") for word in overrides):
        known = sorted((config.CONF / group).glob("*.yaml"))
        if known and choice not in {path.stem for path in known}:
            (conf / group).mkdir(exist_ok=True)
            shutil.copy(known[0], conf / group / f"{choice}.yaml")
    return str(conf)


def _filled(word: str, folder: Path) -> str:
    """Placeholders and the user's own text as something that exists."""
    if word.startswith("corpus.path="):
        return f"corpus.path={folder}"
    return word.replace("PLACEHOLDER", str(folder))


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """A user's folder on the path, and a model that is not asked to write."""

    class Quiet:
        def generate(self, prompt: str, **options: object) -> list[str]:
            return []

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(api, "open_run", lambda folder, best=False: Quiet())
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def links(text: str) -> list[str]:
    """Targets of links and pictures that are files of this repository."""
    prose = FENCE.sub("", text)
    targets = re.findall(r"\]\(([^()\s]+)[^()]*\)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


@written
@pytest.mark.parametrize("words", commands(README), ids=shlex.join)
def test_every_command_works(words, tmp_path):
    check(words, tmp_path, README)


@written
def test_there_are_commands_to_check():
    assert {tuple(words[:2]) for words in commands(README)} >= {("make", "demo"), ("make", "test"), ("fedgpt", "run")}


@written
def test_every_link_points_at_a_file():
    missing = [target for target in links(README) if not (ROOT / target).exists()]
    assert not missing


@written
def test_python_blocks_compile():
    for code in blocks(README, "python", "py", "pycon"):
        examples = doctest.DocTestParser().get_examples(code)
        for source in [example.source for example in examples] or [code]:
            compile(source, "README.md", "exec")


@written
def test_the_answer_to_a_typo_is_the_one_that_is_printed(tmp_path):
    (shown,) = [body for body in blocks(README, "text") if body.startswith("$ fedgpt ")]
    command, _, answer = shown.partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert doctest.OutputChecker().check_output(answer, done.stderr, doctest.ELLIPSIS), done.stderr


@written
def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 150


# ---- the reader of the README itself

SAMPLE = """
# Title [here](docs/a.md#part) and [there](https://example.org) ![p](no.png "title") [self](#title)
```sh
make install   # creates .venv
$ fedgpt run model=mini \\
    corpus=files corpus.path=my_texts
PYTHONPATH=. .venv/bin/fedgpt run strategy=flower strategy._target_=mine.Half trusted_packages=[mine]
fedgpt data corpus=files corpus.path=<your folder of text>
pip install fedgpt
python benchmarks/none.py
```
```python
from dataclasses import dataclass

from fedgpt.aggregate.base import Strategy


@dataclass(frozen=True)
class Half(Strategy):
    pass
```
```text
fedgpt run this=is_output
```
Then `make demo` and `fedgpt data`; not `fedgpt`, `makefile x` or `run=1`:

    .venv/bin/fedgpt run rounds=5    # five rounds
"""


def test_commands_are_found_with_their_continued_lines():
    assert [words[:2] for words in commands(SAMPLE)] == [
        ["make", "install"], ["fedgpt", "run"], ["fedgpt", "run"], ["fedgpt", "data"], ["python", "benchmarks/none.py"],
        ["fedgpt", "run"], ["make", "demo"], ["fedgpt", "data"],
    ]  # fmt: skip
    assert commands(SAMPLE)[5] == ["fedgpt", "run", "rounds=5"]
    assert commands(SAMPLE)[1][2:] == ["model=mini", "corpus=files", "corpus.path=my_texts"]
    assert links(SAMPLE) == ["docs/a.md", "no.png"]


@pytest.mark.parametrize(
    "line",
    [
        "fedgpt run rounds=5 resume=x", "fedgpt run model=huge", "fedgpt data local.stpes=3", "fedgpt train",
        "fedgpt run -m seed=0,x", "fedgpt run --bogus", "fedgpt generate RUN --promt x", "make coffee",
        "python no/such.py", "fedgpt run strategy._target_=mine.Other trusted_packages=[mine]",
    ],
)  # fmt: skip
def test_wrong_commands_are_noticed(line, tmp_path, capsys):
    with pytest.raises((AssertionError, config.ConfigError, SystemExit, ValueError)):
        check(shlex.split(line), tmp_path, SAMPLE)


@pytest.mark.parametrize(
    "line",
    [
        *[shlex.join(words) for words in commands(SAMPLE)[:4]],
        "fedgpt run resume=PLACEHOLDER", "fedgpt run -m seed=0,1 strategy=fedavg,diloco", "fedgpt --version",
        "fedgpt run --config-dir my_conf strategy=mine", "fedgpt run --cfg job --resolve", "python -m fedgpt data",
'fedgpt generate PLACEHOLDER --prompt "Once" --top-k 0',
    ],
)  # fmt: skip
def test_right_commands_pass(line, tmp_path):
    check(shlex.split(line), tmp_path, SAMPLE)
