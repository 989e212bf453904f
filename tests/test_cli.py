"""The command line, in separate processes where its exit code matters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from support.advice import advises

import fedgpt as fedgpt_package
from fedgpt import __version__, cli
from fedgpt.__main__ import main
from fedgpt.api import resumed
from fedgpt.cli import COMMANDS, help
from fedgpt.cli.words import FLAGS_OF_RUN, split_words
from fedgpt.config import choices, compose
from fedgpt.config.choices import groups
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import OPTIONS
from fedgpt.core.runtimes import RUNTIMES
from fedgpt.evaluate.metrics.base import METRICS
from fedgpt.report.trackers import MEMBERS


def fedgpt(*arguments: str, cwd=None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedgpt", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.mark.parametrize("typed", ["--help", "help run"])
def test_help_imports_nothing_heavy_and_lists_the_groups(typed):
    heavy = {"torch", "flwr", "hydra", "rich", "omegaconf"}
    if typed == "--help":
        heavy.add("numpy")  # the strategies import it, whose fields `help run` lists
    code = (
        f"import sys; sys.argv = {['fedgpt', *typed.split()]};"
        "from fedgpt.__main__ import main; main();"
        f"heavy = {heavy} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    usages = [c.usage for c in COMMANDS.values()] if typed == "--help" else []
    for word in (*usages, "diloco", "superlink", "resume=FOLDER"):
        assert word in done.stdout


@pytest.mark.parametrize("command", [*COMMANDS, "privacy plan", "audit privacy=example"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command, flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedgpt", *command.split(), flag])
    try:
        assert main() == 0
    except SystemExit as ended:  # argparse
        assert not ended.code
    assert f"fedgpt {command.split()[0]} " in capsys.readouterr().out


@pytest.mark.parametrize("typed", ["--version", "run --version", "audit privacy=none --version"])
def test_version(typed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedgpt", *typed.split()])
    assert main() == 0
    assert capsys.readouterr().out.strip() == __version__


def helped(capsys, *words: str) -> str:
    assert help.main(list(words)) == 0
    return capsys.readouterr().out


def test_every_option_and_choice_is_in_the_help_of_run(capsys):
    lines = helped(capsys, "run").splitlines()
    starts = {line.split()[0] for line in lines if line.startswith("  ") and line.strip()}
    for one in OPTIONS.values():
        if one.kinds:
            assert any(s == one.key or s.startswith(f"{one.key}=") for s in starts), one.key
    for group, names in groups().items():
        assert {f"{group}={name}" for name in names} <= starts
    assert "strategy.period=8" in starts, "options of strategies, too"


@pytest.mark.parametrize("group", groups())
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_help_of_a_group_fits_the_terminal(group, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = helped(capsys, group)
    text = text[text.index(f"{group}: ") :]  # privacy is a command, too
    assert max(map(len, text.splitlines())) <= columns
    for name in groups()[group]:
        assert f"{group}={name}" in text and choices.read_choice(group, name).meaning
    assert text.count("(default)") == (group != "experiment")


@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_of_a_command_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in [name for name, command in COMMANDS.items() if not command.parses_help]:
        assert max(map(len, helped(capsys, name).splitlines())) <= columns
    assert max(map(len, helped(capsys).splitlines())) <= columns


def test_help_shows_what_a_choice_sets_and_the_options_of_strategies(capsys):
    assert "Sets privacy.target_epsilon=8.0, privacy.clip=0.5." in helped(capsys, "privacy")
    assert "Sets strategy=delta_sgd, pace.clients=4, pace.goal=1." in helped(capsys, "pace")
    text = " ".join(helped(capsys, "strategy").split())
    assert "strategy.mu=0.9 number, from 0 to below 1 Momentum. 0.5 is better for short" in text
    assert "strategy.arguments={} mapping custom: arguments by name" in text
    assert helped(capsys, "pace.goal").startswith("  pace.goal=null ")


def test_help_of_an_option_of_strategies_names_those_that_have_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = [" ".join(line.split()) for line in helped(capsys, "strategy.tau").splitlines()]
    assert [line for line in lines if line.startswith("strategy.tau=")] == [
        "strategy.tau=0.0 number, at least 0 (0 = the median distance)",
        "strategy.tau=0.001 number, above 0",
    ]
    text = " ".join(lines)
    assert "aggregate. Only with strategy=centred_clip." in text
    assert text.endswith("Only with strategy=fedadam or fedyogi.")
    assert help.main(["strategy.etta"]) == 2
    assert "did you mean 'strategy.eta'" in capsys.readouterr().err


def test_help_of_strategies_imports_no_torch():
    code = (
        "import sys; from fedgpt.cli import help; assert help.main(['run', 'strategy.eta']) == 0;"
        "heavy = {'torch', 'flwr', 'hydra', 'rich', 'omegaconf'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_help_shows_a_users_own_strategies_without_importing_them(tmp_path, capsys):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy/mine.yaml").write_text("# Mine.\n_target_: no_such.Rule\neta: 0.3\n")
    (tmp_path / "strategy/slow.yaml").write_text(
        "# Slow.\n_target_: fedgpt.aggregate.fedavg.FedAvg\neta: 0.1\n"
    )
    text = helped(capsys, "strategy", f"--config-dir={tmp_path}")
    assert "Sets strategy._target_=no_such.Rule, strategy.eta=0.3." in text
    assert "      strategy.eta=0.1                number, above 0" in text


def test_help_says_what_each_runtime_cannot_do(capsys):
    text = " ".join(helped(capsys, "runtime").split())
    assert "runtime=custom" in text
    for name in RUNTIMES.names():
        assert " ".join(RUNTIMES.load(name).limits) in text, name


@pytest.mark.parametrize(
    "words, part",
    [
        (["privacy", "plan"], "fedgpt privacy plan"),
        (["model=micro"], "Sets model.n_embd=256"),
        (["fedadam"], "strategy.beta1=0.9"),
        (["none"], "checkpoint=none"),
    ],
)
def test_help_explains_a_choice_and_a_command_of_two_words(words, part, capsys):
    assert help.main(words) == 0
    assert part in capsys.readouterr().out


def test_help_of_an_unknown_word_names_the_nearest_one(capsys):
    assert help.main(["privcy", "rounds"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "fedgpt help privcy: no command, group, choice or option; did you mean 'privacy'"
    )


def test_help_shows_a_users_own_choices(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny.yaml").write_text("# A toy.\nn_layer: 1\n")
    text = helped(capsys, "model", f"--config-dir={tmp_path}")
    assert "  model=tiny            A toy.\n" in text and "Sets model.n_layer=1." in text


@pytest.mark.parametrize(
    "content, part",
    [
        (b"n_layer: [", "is not valid YAML (while parsing"),
        (b"- 1\n", "must be options and their values"),
        (b"\xff", "cannot be read ("),
    ],
)
def test_help_of_a_broken_file_of_a_user_names_it(tmp_path, content, part):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        help.main(["model", f"--config-dir={tmp_path}"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/model/tiny.yaml: {part}") and "\n" not in problem


def test_help_of_a_list_names_its_built_in_members(capsys):
    for key, members in (("metrics", METRICS), ("track", MEMBERS)):
        text = " ".join(helped(capsys, key).split())
        assert f"Built in: {', '.join(members.names())}." in text
        assert OPTIONS[key].facts.built_in == members.folder


def test_the_traceback_of_a_users_class_is_shown_on_request(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def broken():\n    return {}['size']\n\n\nbroken()\n")
    words = ["data", "corpus=custom", "corpus._target_=mine.Poems", "trusted_packages=[mine]"]
    done = fedgpt(*words, cwd=tmp_path)
    assert "cannot import mine (KeyError: 'size' (mine.py, line 2))" in done.stderr
    assert "Traceback" not in done.stderr and done.returncode == 2
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = fedgpt(*words, cwd=tmp_path)
    assert "Traceback" in done.stderr and "in broken" in done.stderr and done.returncode == 2


def test_every_command_has_a_file_and_every_file_a_command():
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert set(COMMANDS) == files - {"__init__", "words"}
    for command in COMMANDS.values():
        assert callable(command.module.main) and command.help[0].islower()
        assert command.parses_help or command.module.HELP.startswith("\n  fedgpt ")


def test_dir_shows_lazily_imported_names():
    assert {"run", "open_run", "Run", "__version__"} <= set(dir(fedgpt_package))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "ronds=3"], "did you mean 'rounds'"),
        (["run", "model"], "model: options are typed key=value"),
        (["run", "--bogus"], "--bogus: no such flag; this command has --config-dir, -cd, --cfg"),
        (["run", "--bogus", "--mulitrun"], "--mulitrun: no such flag"),
        (["data", "--bogus"], "--bogus: no such flag; this command has --config-dir, -cd, and"),
        (["audit", "-m", "seed=0,1"], "-m: no such flag"),
        (["audit", "privacy=local"], "so there is nothing to attack"),
        (["privacy", "plan", "--info=all"], "--info=all: no such flag"),
        (["run", "--cfg"], "--cfg: job, hydra or all must follow"),
        (["run", "-c", "jobs"], "-c jobs: must be job, hydra or all"),
        (["run", "seed=1", "--config-dir"], "--config-dir: a folder with groups of your own must"),
        (["run", "strategy=fedavgg"], "did you mean 'fedavg'"),
        (["run", "-m", "seed=0,x"], "seed=x"),
        (["run", "-m", "hydra/launcher=joblib", "seed=0,1"], "pip install hydra-joblib-launcher"),
        (["run", "resume=nowhere"], "is not a run's folder"),
        (["run", "resume=nowhere", "seed=3"], "stands alone"),
        (["run", "resume="], "resume=: is not a run's folder"),
        (["run", "resume=~no-such-user/run"], "there is no such home folder; name one in runs/"),
        (["run", "--cfg", "job", "-m", "seed=0,1"], "--cfg: prints one configuration"),
        (["run", "--config-dir", "nowhere", "seed=1"], "--config-dir nowhere: no such folder"),
        (["data", "--config-dir=nowhere"], "--config-dir nowhere: no such folder"),
        (["generate", "nowhere"], "is not a run's folder"),
        (["generate", "nowhere", "--tokens", "-1"], "--tokens -1: must be at least 0"),
        (
            ["generate", "nowhere", "--top-p", "2"],
            "--top-p 2.0: must be at least 1e-12 and at most 1",
        ),
        (
            ["generate", "nowhere", "--seed", str(2**70)],
            f"--seed {2**70}: must be at least 0 and at most",
        ),
        (["data", "corpus=files", "corpus.path=nowhere"], "corpus.path="),
    ],
)
def test_a_mistake_is_one_message_and_never_a_traceback(arguments, part, tmp_path):
    done = fedgpt(*arguments, cwd=tmp_path)
    assert part in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert not (tmp_path / "runs").exists(), "no work begins before the options are valid"


def test_a_text_reaches_hydra_as_it_is_typed(tmp_path):
    """In one configuration, which Hydra prints, and in the jobs of a sweep, which it names."""
    done = fedgpt("run", "--cfg", "job", "name=2024_10", "evaluate.prompt=${seed}", cwd=tmp_path)
    assert "name: '2024_10'\n" in done.stdout
    assert "prompt: \\${seed}\n" in done.stdout
    done = fedgpt("run", "-m", "init_from=1_000,1e5", cwd=tmp_path)
    for name in ("1_000", "1e5"):
        assert f"init_from={tmp_path}/{name}: is not a folder" in done.stderr


@pytest.mark.parametrize(
    "typed, advice",
    [
        (["--rounds", "3"], "type rounds=3"),
        (["--rounds=3"], "type rounds=3"),
        (["--model", "mini", "seed=1"], "type model=mini"),
        (["-seed=1"], "type seed=1"),
        (["--run-dir", "out"], "type run_dir=out"),
        (["--local.lr", "--resolve"], "type local.lr=VALUE"),
    ],
)
def test_an_option_that_is_typed_like_a_flag_is_shown_as_it_is_typed(typed, advice):
    with pytest.raises(ConfigError) as refused:
        split_words(typed, FLAGS_OF_RUN)
    [problem] = refused.value.problems
    advises(problem, f": options are typed without dashes; {advice}")
    words = [advice.removeprefix("type ").replace("VALUE", "0.01")]
    assert split_words(words, FLAGS_OF_RUN) == (words, None)
    compose.load(words)


@pytest.mark.parametrize("flag", ["-m=1", "--multirun=seed", "--resolve="])
def test_a_value_of_a_flag_that_takes_none_is_refused(flag):
    name = flag.partition("=")[0]
    with pytest.raises(ConfigError) as refused:
        split_words([flag], FLAGS_OF_RUN)
    advises(refused.value, f"{flag}: takes no value; type {name}")
    assert split_words([name, "seed=1"], FLAGS_OF_RUN) == (["seed=1"], None)


def test_every_flag_of_run_is_one_of_hydra():
    of_hydra = {name for action in get_args_parser()._actions for name in action.option_strings}
    assert of_hydra >= set(FLAGS_OF_RUN)


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--cfg=job"], ["-m"], ["--config-dir=."]])
def test_a_flag_beside_resume_is_named_and_without_it_the_run_is_looked_for(flags):
    with pytest.raises(ConfigError, match=f"{flags[0]}: cannot be typed with resume=s1") as refused:
        resumed([*flags, "resume=s1"])
    advises(refused.value, f"; leave out {flags[0].partition('=')[0]}")
    with pytest.raises(ConfigError, match="resume=s1: is not a run's folder"):
        resumed(["resume=s1"])


def test_cfg_job_prints_the_complete_configuration_without_running(tmp_path):
    done = fedgpt("run", "--cfg", "job", "model=mini", "seed=5", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        "n_embd: 384" in done.stdout
        and "seed: 5" in done.stdout
        and "_target_: fedgpt.aggregate" in done.stdout
    )
    assert not (tmp_path / "runs").exists()


def test_options_may_be_typed_on_both_sides_of_a_flag(tmp_path):
    typed = ["seed=7", "--config-dir", ".", "rounds=3", "--cfg", "job", "name=x"]
    done = fedgpt("run", *typed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"{line}\n" in done.stdout for line in ("seed: 7", "rounds: 3", "name: x"))


def test_a_configuration_is_printed_without_the_sweep_as_the_refusal_advises(tmp_path):
    refused = fedgpt("run", "--cfg", "job", "-m", "seed=0,1", cwd=tmp_path)
    assert refused.returncode == 2
    advises(refused.stderr, "but -m makes several; leave one of them out")
    printed = fedgpt("run", "--cfg", "job", "seed=1", cwd=tmp_path)
    assert printed.returncode == 0 and "seed: 1" in printed.stdout
