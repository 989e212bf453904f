"""Commands, options, targets, links and code in the documents are valid for this repository."""

from __future__ import annotations

import argparse
import doctest
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from flwr.common.config import parse_config_args
from support.here import run_here

from fedgpt import api
from fedgpt.cli import COMMANDS, keys
from fedgpt.config import compose
from fedgpt.config.choices import CONF
from fedgpt.core.errors import ConfigError
from fedgpt.flower.run_config import options_of

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
DOCUMENTS += sorted(ROOT.glob("simulations/*/README.md"))
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README = TEXTS["README.md"]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```\s*$", re.M | re.S)
PROGRAMS = ("fedgpt", "python", "make")
DEPLOYED = (
    "server",
    "submit",
    "cancel",
    "status",
)  # commands whose folder is that of an earlier one
AT_SITES = ("client", "doctor")  # their kit and text are those of an earlier one
FLOWER = ("flwr run", "--node-config")  # what is typed for Flower's own programs starts with it
NUMBER = re.compile(r" *\d[\d.,:]*( ?[kMGT]?B\b|[kMGT]\b)?")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of the languages."""
    return [body for _, language, body in FENCE.findall(text) if language in languages]


def typed(text: str) -> list[str]:
    """Everything that may be typed: shell blocks, indented lines and inline code."""
    prose = FENCE.sub("", text)
    shell = [
        re.sub(r"\\\n\s*", " ", body) for body in blocks(text, "sh", "bash", "shell", "console")
    ]
    lines = [line for body in shell for line in body.splitlines()]
    lines += re.findall(r"^ {4,}(\S.*)$", prose, re.M) + re.findall(r"`([^`\n]+)`", prose)
    # <the folder of a run>
    return [re.sub(r"<[\w ./-]+>", "PLACEHOLDER", line).removeprefix("$ ") for line in lines]


def commands(text: str) -> list[list[str]]:
    """Words of every command that starts with one of our programs, wherever it is installed."""
    found = []
    for line in typed(text):
        if re.match(rf"([A-Z_]+=\S* )*(\S*/)?({'|'.join(PROGRAMS)}) ", line):
            words = shlex.split(line, comments=True)
            while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # PYTHONPATH=. fedgpt run
                words.pop(0)
            found.append([Path(words[0]).name, *words[1:]])
    return found


def for_flower(text: str) -> list[str]:
    """What is typed for Flower's own programs."""
    return [line for line in typed(text) if line.startswith(FLOWER)]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))


def check(words: list[str], folder: Path, readme: str) -> None:
    """Raise if a command could not work; `folder` is empty and stands for all that a user has."""
    program, *arguments = words
    if program == "python" and arguments[:2] == ["-m", "fedgpt"]:
        program, arguments = "fedgpt", arguments[2:]
    if program == "make":
        assert {word for word in arguments if "=" not in word} <= make_targets(), words
    elif program == "python":
        check_python(arguments)
    elif arguments[0] in COMMANDS and "--help" not in arguments:
        typed_words = [_filled(word, folder) for word in arguments[1:]]
        check_command(arguments[0], typed_words, folder, readme)
    else:
        assert {"--help", "-h", "--version"} & set(arguments), words


def check_command(name: str, words: list[str], folder: Path, readme: str) -> None:
    """Raise if a command would refuse its arguments; nothing is trained."""
    if name == "keys" and words:
        # the files are those of an earlier command; one word is only mentioned
        assert words[0] in keys.ACTIONS, words
        assert not words[1:] or keys.parser().parse_args(words)
        return
    if name in AT_SITES:
        assert not words or COMMANDS[name].module.parser().parse_args(words)
        return
    if name in DEPLOYED:
        if words:  # otherwise it is only mentioned
            chosen = COMMANDS[name].module.parser().parse_intermixed_args(words)
            check_options("run", getattr(chosen, "options", []), folder, readme)
        return
    fixed, takes_options, _ = COMMANDS[name].arguments.partition("[OPTIONS]")
    if not takes_options:
        # a command without words, such as `fedgpt generate`, is only mentioned
        assert not words or COMMANDS[name].module.main(words) == 0
        return
    for word in fixed.split():  # "plan" of `privacy plan [OPTIONS]`
        assert words.pop(0) == word, f"fedgpt {name} {word}"
    check_options(name, words, folder, readme)


def check_flower(line: str, folder: Path) -> None:
    """Raise if Flower could not read its configuration, or fedgpt not its own part of it."""
    words = shlex.split(line)
    settings = parse_config_args(
        [_filled(words[1 + words.index("-c" if words[0] == "flwr" else "--node-config")], folder)]
    )
    if words[0] == "flwr":
        assert "run_dir=/" in str(settings["overrides"]), "the server works in a folder of Flower's"
        options_of(settings)
    else:
        assert settings.keys() <= {"partition-id", "num-partitions", "state-dir"}


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
        more = [word for word in chosen.overrides if not word.startswith(("resume=", "rounds="))]
        assert command == "run" and not more, f"{words}: resume= stands alone"
        return
    for word in chosen.overrides:
        for target in re.findall(r"_target_[=:]([\w.]+)", word):
            bring_class(target, folder, readme)
    config_dir = bring_choices(chosen.overrides, folder / "conf") if chosen.config_dir else None
    (compose.check_sweep if chosen.multirun else compose.load)(chosen.overrides, config_dir)


def bring_class(target: str, folder: Path, readme: str) -> None:
    """Write the document's own class to the module that a command names.

    Classes of fedgpt and of Flower exist already.
    """
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in ("fedgpt", "flwr"):
        (code,) = [code for code in blocks(readme, "python", "py") if f"class {name}(" in code]
        (folder / f"{module}.py").write_text(code)
        sys.modules.pop(module, None)  # a module that another test wrote
        importlib.invalidate_caches()


def bring_choices(overrides: list[str], conf: Path) -> str:
    """A user's conf folder with the choices that the repository does not have."""
    conf.mkdir(exist_ok=True)
    for group, _, choice in (word.partition("=") for word in overrides):
        known = sorted((CONF / group).glob("*.yaml"))
        if known and choice not in {path.stem for path in known}:
            (conf / group).mkdir(exist_ok=True)
            shutil.copy(known[0], conf / group / f"{choice}.yaml")
    return str(conf)


def _filled(word: str, folder: Path) -> str:
    """A word with existing paths for placeholders, shell variables and an earlier run's record."""
    if word.startswith("fleet.path="):
        (folder / "events.jsonl").write_text('{"event": "open"}\n')
        return f"fleet.path={folder}/events.jsonl"
    return re.sub(r"PLACEHOLDER|\$HOME|\$PWD", str(folder), word)


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """A user's folder on the import path, and a model that generates no text."""

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
    targets = re.findall(r"\]\(([^()\s]+)[^()]*\)", prose) + re.findall(
        r"(?:src|href)=\"([^\"]+)\"", prose
    )
    return [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


def each(find: Callable[[str], list[Any]], name: Callable[[Any], str]) -> list[Any]:
    """Parameters (document, what was found in it) of a test over all documents."""
    return [
        pytest.param(at, f, id=f"{at}: {name(f)}") for at, text in TEXTS.items() for f in find(text)
    ]


@pytest.mark.parametrize("document, words", each(commands, shlex.join))
def test_every_command_works(document, words, tmp_path):
    check(words, tmp_path, TEXTS[document])


@pytest.mark.parametrize("document, line", each(for_flower, str))
def test_commands_for_flower_can_be_read(document, line, tmp_path):
    check_flower(line, tmp_path)


def test_the_readme_has_commands_to_check():
    assert {tuple(words[:2]) for words in commands(README)} >= {
        ("make", "demo"),
        ("make", "test"),
        ("fedgpt", "run"),
    }


def test_every_link_points_at_a_file():
    found = [(ROOT / at, link) for at, text in TEXTS.items() for link in links(text)]
    assert not [(at, link) for at, link in found if not (at.parent / link).exists()]


@pytest.mark.parametrize(
    "document, code", each(lambda text: blocks(text, "python", "py", "pycon"), lambda _: "python")
)
def test_python_blocks_compile(document, code):
    examples = doctest.DocTestParser().get_examples(code)
    for source in [example.source for example in examples] or [code]:
        compile(source, document, "exec")


def test_a_number_in_brackets_after_an_option_is_its_default():
    defaults = compose.flat_options(compose.load(["strategy=auto"]))
    shown = re.findall(r"`(\w+\.\w+)`(?: \w+)? \((\d[\d.,]*)\)", "\n".join(TEXTS.values()))
    assert {"validate.norm", "strategy.back"} <= {name for name, _ in shown}
    for name, number in shown:
        assert float(number.replace(",", "")) == defaults[name], name


def test_the_error_for_a_typo_is_the_one_shown(tmp_path):
    (shown,) = [body for body in blocks(README, "text") if body.startswith("$ fedgpt ")]
    command, _, answer = shown.partition("\n")
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert doctest.OutputChecker().check_output(answer, done.stderr, doctest.ELLIPSIS), done.stderr


def test_the_demo_prints_what_is_shown(tmp_path, capfd):
    """Line by line, except for numbers, the machine and the generated text."""
    (shown,) = [body for body in blocks(README, "text") if " bits/byte " in body]
    run_here(
        "experiment=demo",
        "rounds=6",
        "tokenizer.vocab_size=300",
        "local.steps=2",
        "local.batch_size=1",
        "evaluate.tokens=512",
        "evaluate.sample_tokens=8",
        f"run_dir={tmp_path}",
    )
    printed = capfd.readouterr().out
    assert doctest.OutputChecker().check_output(shape(shown), shape(printed), doctest.ELLIPSIS), (
        printed
    )


def shape(printed: str) -> str:
    """Output with # for every number and ... for what depends on the machine or the model."""
    alike = re.sub(r"^( *(?:compute|Fellow citizens)).*", r"\1...", printed, flags=re.M)
    return NUMBER.sub(" #", alike)


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


# ---- tests of the functions above

SAMPLE = """
# Title [here](docs/a.md#part) and [there](https://example.org) ![p](no.png "title") [self](#title)
```sh
make install   # creates .venv
$ fedgpt run model=mini \\
    corpus=files corpus.path=my_texts
PYTHONPATH=. .venv/bin/fedgpt run strategy=custom \\
    strategy._target_=mine.Half trusted_packages=[mine]
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


@pytest.mark.parametrize(
    "line",
    [
        "--node-config 'partition-id=0 state-dir=/var/lib/fedgpt'",
        "--node-config 'partition=0'",
        "flwr run . -c 'overrides=\"rounds=5\"'",
        "flwr run . -c 'overrides=\"ronds=5 run_dir=/x\"'",
    ],
)
def test_wrong_commands_for_flower_are_detected(line, tmp_path):
    assert for_flower(f"`{line}`") == [line]
    with pytest.raises((AssertionError, ConfigError, click.ClickException)):
        check_flower(line, tmp_path)


def test_commands_are_found_with_their_continued_lines():
    assert [words[:2] for words in commands(SAMPLE)] == [
        ["make", "install"],
        ["fedgpt", "run"],
        ["fedgpt", "run"],
        ["fedgpt", "data"],
        ["python", "benchmarks/none.py"],
        ["fedgpt", "run"],
        ["make", "demo"],
        ["fedgpt", "data"],
    ]
    assert commands(SAMPLE)[5] == ["fedgpt", "run", "rounds=5"]
    assert commands(SAMPLE)[1][2:] == ["model=mini", "corpus=files", "corpus.path=my_texts"]
    assert links(SAMPLE) == ["docs/a.md", "no.png"]


@pytest.mark.parametrize(
    "line",
    [
        "fedgpt run seed=5 resume=x",
        "fedgpt run model=huge",
        "fedgpt data local.stpes=3",
        "fedgpt train",
        "fedgpt run -m seed=0,x",
        "fedgpt run --bogus",
        "fedgpt generate RUN --promt x",
        "fedgpt keys aprove",
        "fedgpt keys approve server",
        "fedgpt keys list server --port 1",
        "make coffee",
        "python no/such.py",
        "fedgpt data corpus=files corpus.path=$HOME/no such folder",
        "fedgpt run strategy._target_=mine.Other trusted_packages=[mine]",
    ],
)
def test_wrong_commands_are_detected(line, tmp_path, capsys):
    with pytest.raises((AssertionError, ConfigError, SystemExit, ValueError)):
        check(shlex.split(line), tmp_path, SAMPLE)


@pytest.mark.parametrize(
    "line",
    [
        *[shlex.join(words) for words in commands(SAMPLE)[:4]],
        "fedgpt run resume=PLACEHOLDER",
        "fedgpt run -m seed=0,1 strategy=fedavg,diloco",
        "fedgpt --version",
        "fedgpt run --config-dir my_conf strategy=mine",
        "fedgpt run --cfg job --resolve",
        "python -m fedgpt data",
        "fedgpt keys init server --host fed.example.org",
        'fedgpt generate PLACEHOLDER --prompt "Once" --top-k 0',
    ],
)
def test_correct_commands_pass(line, tmp_path):
    check(shlex.split(line), tmp_path, SAMPLE)
