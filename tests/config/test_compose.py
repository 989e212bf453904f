"""All wrong options are reported together, named as typed, before any work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from support import third_party
from support.advice import advises
from support.refused import problems

from fedgpt.config import choices, compose, overrides
from fedgpt.core.errors import ConfigError
from fedgpt.core.options import OPTIONS, RunOptions, TokenizerOptions
from fedgpt.core.options.option import dotted
from fedgpt.core.runtimes import RUNTIMES
from fedgpt.data.corpus import CORPORA
from fedgpt.data.partition import PARTITIONS
from fedgpt.data.tokenizer import make_tokenizer
from fedgpt.model.gpt import GPT
from fedgpt.model.hf import export_model
from fedgpt.tasks.base import TASKS
from fedgpt.update.compress import CODECS

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted({path.parent.name for path in CONF.glob("*/*.yaml")})
MEMBERS = {one.group: one for one in (CORPORA, PARTITIONS, CODECS, RUNTIMES, TASKS)}
CHOICES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


def strategy_paces(choice: str) -> frozenset[str]:
    """The pacings that a strategy of conf/ is right for."""
    target = OmegaConf.load(CONF / "strategy" / f"{choice}.yaml").get("_target_")
    module, _, name = (target or CUSTOM["strategy"]).rpartition(".")
    return getattr(getattr(importlib.import_module(module), name), "paces", frozenset({"cohort"}))


def test_the_defaults_are_valid():
    options = compose.load()
    assert isinstance(options, RunOptions)
    assert (
        options.corpus.name == "sotu"
        and options.strategy["_target_"] == "fedgpt.aggregate.fedavg.FedAvg"
    )


CUSTOM = {
    "corpus": f"{third_party.MODULE}.Poems",
    "partition": f"{third_party.MODULE}.Alternate",
    "update": f"{third_party.MODULE}.Sign",
    "strategy": "fedgpt.aggregate.diloco.DiLoCo",
    "task": "fedgpt.tasks.lm.LanguageModel",
    "runtime": "fedgpt.flower.runtimes.pool.Pool",
}


@pytest.mark.parametrize("group, choice", CHOICES)
def test_every_conf_file_composes_and_is_valid(group, choice, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    # whether Ray is installed or not
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ray" or real(name))
    table = tmp_path / "fleet.csv"
    table.write_text(
        '{"event": "open"}\n' if choice == "replay" else "client,step_seconds\na,1.0\n"
    )
    needs = [f"corpus.path={tmp_path}"] if choice == "files" else []
    if (group, choice) == ("tokenizer", "hf"):
        make_tokenizer(TokenizerOptions("bytes"), ()).save(tmp_path)
        needs = [f"tokenizer.path={tmp_path}"]
    if choice == "site":
        own = [f"corpus.{part}_path={tmp_path}" for part in ("public", "held_out")]
        needs = ["pace.begin=2", *own]
    if (group, choice) == ("model", "hf"):
        tokenizer = make_tokenizer(TokenizerOptions("bytes"), [])
        export_model(tmp_path, GPT(RunOptions().model, tokenizer.vocab_size))
        tokenizer.save(tmp_path)
        needs = [f"init_from={tmp_path}", "tokenizer=bytes"]
    if choice == "custom":
        own = CUSTOM[group].startswith("fedgpt.")
        needs = [f"{group}._target_={CUSTOM[group]}", *([] if own else [third_party.TRUSTED])]
    if group == "fleet" and choice != "none":
        needs = [
            "clock=virtual",
            *([f"fleet.path={table}"] if choice in ("trace", "replay") else []),
        ]
    if group == "strategy" and "cohort" not in strategy_paces(choice):
        needs = (
            ["pace=buffer", "strategy.period=8"]
            if choice == "delayed_nesterov"
            else ["pace=buffer"]
        )
    options = compose.load([f"{group}={choice}", *needs])
    if group in ("corpus", "tokenizer", "partition", "pace", "attack", "runtime"):
        # corpus=sotu_addresses is the corpus sotu
        assert choice.startswith(getattr(options, group).name)


def test_the_dataclasses_and_conf_have_the_same_defaults():
    composed, schema = compose.load(), RunOptions()
    assert composed.strategy["_target_"] == "fedgpt.aggregate.fedavg.FedAvg"
    assert composed.run_dir and composed.cache_dir, "conf/ derives them from the time and the user"
    schema.strategy, schema.run_dir, schema.cache_dir = (
        composed.strategy,
        composed.run_dir,
        composed.cache_dir,
    )
    assert compose.flat_options(composed) == compose.flat_options(schema)
    assert asdict(composed) == asdict(schema)


def names_of(group: str) -> set[str]:
    """The choices of a group; empty for a group that does not store its choice."""
    options = getattr(RunOptions(), group)
    if group in MEMBERS:
        return {*MEMBERS[group].names(), "custom"}
    key = options.key(options.choice_field)
    return set(OPTIONS[key].facts.allowed.choices) if options.chosen else set()


@pytest.mark.parametrize("group", sorted(set(GROUPS) - {"strategy", "experiment"}))
def test_choices_of_a_group_and_files_in_conf_correspond(group):
    options, names = getattr(RunOptions(), group), names_of(group)
    files = {choice for of, choice in CHOICES if of == group}
    assert names <= files
    for choice in files if names else ():
        chosen = choices.read_choice(group, choice).sets
        value = chosen.get(options.key(options.choice_field), options.chosen)
        assert value in names, f"{group}={choice}"


@pytest.mark.parametrize("group", GROUPS)
def test_every_conf_file_begins_with_a_comment(group):
    for path in CONF.glob(f"{group}/*.yaml"):
        assert "# " in path.read_text().split("\n\n")[0], path


def test_every_option_survives_yaml(tmp_path):
    options = compose.load(
        ["model=mini", "strategy=diloco", f"run_dir={tmp_path}", "pace.rate=0.5", "seed=7"]
    )
    assert asdict(compose.from_yaml(compose.to_yaml(options))) == asdict(options)


def test_the_last_learning_rate_is_a_tenth_of_the_first_by_default():
    assert (
        compose.load(["local.lr=2e-3"]).local.last_lr == 2e-4
        and compose.load().local.last_lr == 3e-4
    )
    assert compose.load(["local.min_lr=0"]).local.last_lr == 0


def test_paths_that_no_run_could_use_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for option in ("run_dir", "cache_dir"):
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            [problem] = problems(f"{option}={path}")
            assert problem == f"{option}={path}: {tmp_path / 'file'} is a file; name a folder"
    [problem] = problems(f"init_from={tmp_path / 'nowhere'}")
    assert problem.startswith(
        f"init_from={tmp_path / 'nowhere'}: is not a folder; name the folder of a finished run"
    )
    [problem] = problems(f"init_from={tmp_path}")
    assert "has no config.json, nor model/config.json" in problem


@pytest.mark.parametrize(
    "address", ["http://example.com/a.txt", "https://a.b/c", "s3://a/b", "hf://a", "file:///tmp"]
)
@pytest.mark.parametrize("option", ["corpus.path", "init_from", "run_dir"])
def test_an_address_is_refused_as_typed_with_what_to_do(option, address):
    """It was shown as a path below the current folder, with one slash."""
    [problem] = problems(*["corpus=files"] * (option == "corpus.path"), f'{option}="{address}"')
    assert problem.startswith(f"{option}={address}: is an address")


def test_an_address_may_be_replaced_by_the_path_of_its_copy(tmp_path):
    [problem] = problems("corpus=files", 'corpus.path="https://example.com/a.txt"')
    advises(problem, "copy what is there to this machine first, and type its path here")
    (tmp_path / "a.txt").write_text("It rained.")
    (tmp_path / "https:").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "https:", "c:/a", "./http://a"):
        assert compose.load(["corpus=files", f'corpus.path="{path}"']).corpus.path


@pytest.mark.parametrize("value", ["[[a]]", "[{a: 1}]", "[a,[b]]", "[[]]", "[null]"])
@pytest.mark.parametrize(
    "option", [key for key, one in OPTIONS.items() if {list[str], list[float]} & {*one.kinds}]
)
def test_an_element_of_another_type_is_refused_in_every_list(option, value):
    """OmegaConf takes a list within a list for a text."""
    shown = value.replace("a: 1", "'a': 1")
    assert f"{option}={shown}: must be a list of" in " ".join(problems(f"{option}={value}"))


@pytest.mark.parametrize("depth", [21, 100, 400, 3000])
@pytest.mark.parametrize("option", ["model.trainable", "corpus.arguments", "+strategy.x", "rounds"])
def test_a_value_that_is_nested_deeply_is_one_problem(option, depth):
    mapping = "{a: " * depth + "1" + "}" * depth
    for value in ("[" * depth + "]" * depth, mapping, f"{mapping},1"):
        [problem] = problems(f"{option}={value}")
        assert len(problem) < 200 and ("nested too deeply" in problem), problem


DAMAGED = ["a: [1,\n b: {", "\tx: 1", "", "- 1\n", b"\xff\xfe\x00", None]
DAMAGED += [f"seed: {'9' * 5000}", "seed: " + "[" * 3000, "1", "a: &a [*a]\n"]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_the_error_for_a_damaged_config_yaml_has_its_path(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.mkdir() if text is None else path.write_bytes(
        text if isinstance(text, bytes) else text.encode()
    )
    with pytest.raises(ConfigError) as error:
        compose.of_run(tmp_path)
    assert str(path) in error.value.problems[0]
    options = compose.load()
    options.run_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=r"its config.yaml is damaged"):
        compose.refuse_another_run(options)


def test_all_problems_are_reported_at_once():
    found = problems(
        "ronds=3",
        "strategy=fedavgg",
        "rounds=many",
        "model.n_embd=130",
        "pace.clients=-1",
        "local.lr=0",
    )
    assert len(found) == 6
    for part in (
        "ronds=3: no option 'ronds'; did you mean 'rounds'",
        "strategy=fedavgg: choose from",
        "did you mean 'fedavg'",
        "rounds=many: must be a whole number, at least 1",
        "model.n_embd=130: must be a multiple of model.n_head=4; try 128 or 136",
        "pace.clients=-1: must be at least 0",
        "local.lr=0",
    ):
        assert any(part in problem for problem in found), part


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["update.downlink=fp16"], "update.downlink=fp16: must be fp32, bf16, int8 or int4"),
        (["update.decay=7"], "update.decay=7"),
        (["update.error_feedback=true"], "update.error_feedback=true"),
        (["update=int8", "update.block=7"], "update.block=7"),
        (
            ["update=int8", "update.density=0.5"],
            "update.density=0.5: has no effect with update=int8; add update=topk, or leave it out",
        ),
        (["strategy=auto", "pace.rate=0.5"], "pace.rate=0.5: the pacing may change"),
        (["pace.goal=2", "pace.minimum=3"], "pace.minimum=3"),
        (
            ["strategy=diloco", "pace=buffer"],
            "momentum compounds on every arrival (Nesterov, mu 0.9: 4 equal updates D",
        ),
        (["strategy.bta=1"], "strategy.bta=1: no option 'strategy.bta'"),
        (["+strategy.bta=1"], "strategy.bta=1: the options of FedAvg are eta"),
        (["strategy.eta=-1"], "strategy.eta=-1"),
        (["+extra=1"], "no option 'extra'"),
        (["modle=mini"], "did you mean 'model'"),
        (["local.stpes=3"], "did you mean 'local.steps'"),
        (["rounds"], "rounds"),
        (
            ["tokenizer=bpe", "corpus.public=0"],
            "corpus.public=0: tokenizer=bpe is trained on the public part",
        ),
        (["corpus.public=0.6", "corpus.held_out=0.5"], "corpus.public=0.6"),
        (["corpus=files"], "corpus.path"),
        (["partition=iid", "partition.clients=0"], "partition.clients=0"),
        (["partition=dirichlet", "partition.alpha=0"], "partition.alpha=0"),
        (["local.min_lr=1"], "local.min_lr=1"),
        (["pace.clients=4", "pace.goal=5"], "pace.goal=5: more than the pace.clients=4"),
        (["pace.clients=4", "pace.minimum=5"], "pace.minimum=5"),
        (
            ["attack.clients=2"],
            "attack.clients=2: attack=none has no attackers; choose attack=sign_flip or",
        ),
        (["attack=scale", "attack.clients=0"], "attack.clients=0: attack=scale needs attackers"),
        (["attack=scale", "attack.strength=0"], "attack.strength=0: must be above 0"),
        (
            ["attack=scale", "partition=iid", "attack.clients=9"],
            "attack.clients=9: is above the number of clients, 8",
        ),
        (["attack=scal"], "did you mean 'scale'"),
        (["runtime.device=tpu"], "runtime.device=tpu: must be auto, cpu or cuda"),
        (["local.precision=fp16"], "local.precision=fp16: must be auto, fp32 or bf16"),
        (["model.gelu=relu"], "model.gelu=relu"),
        (["strategy=null"], "strategy"),
    ],
)
def test_one_wrong_option_is_named_with_what_is_allowed(overrides, part):
    assert any(part in problem for problem in problems(*overrides)), problems(*overrides)


def test_coins_are_not_limited_by_the_number_of_clients_that_they_replace():
    many = ["partition=iid", "partition.clients=100", "pace.rate=0.5"]
    o = compose.load([*many, "pace.goal=20", "pace.minimum=10"])
    assert o.pace.clients < o.pace.minimum  # the default, which has no effect with coins
    (problem,) = problems(*many, "pace.goal=20", "pace.minimum=30")
    assert "pace.minimum=30: a version closes at pace.goal=20 updates" in problem


@pytest.mark.parametrize(
    "target", ["os.system", "os.getcwd", "pathlib.Path", "builtins.eval", "fedgptx.Evil"]
)
def test_a_target_outside_the_allow_list_is_never_imported(target):
    found = problems("strategy=flower", f"strategy._target_={target}")
    assert any(
        "only classes in fedgpt.aggregate, flwr.serverapp.strategy" in problem for problem in found
    )


@pytest.fixture
def half(tmp_path, monkeypatch) -> str:
    """A strategy of one's own, in a module that no other test has."""
    (tmp_path / "mine_half.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedgpt.aggregate.base import Strategy, advance\n"
        "@dataclass(frozen=True)\n"
        "class Half(Strategy):\n"
        "    share: float = 0.5\n"
        "    warm: bool = False\n"
        "    label: str = 'plain'\n"
        "    def step(self, d, state):\n"
        "        return advance(state, state.params - self.share * d)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_half", raising=False)
    return "strategy._target_=mine_half.Half"


TRUSTED = "trusted_packages=[mine_half]"
WAYS = {
    "arguments": ["strategy=custom", "strategy.arguments={share: 0.25, warm: true}"],
    "one by one": [
        "strategy=custom",
        "strategy.arguments.share=0.25",
        "strategy.arguments.warm=true",
    ],
    "before there was custom": ["strategy=flower", "+strategy.share=0.25", "+strategy.warm=true"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_trusted_package_may_bring_a_strategy(way, half):
    words = [*WAYS[way], half]
    assert any("trusted_packages=[mine_half]" in problem for problem in problems(*words))
    options = compose.load([*words, TRUSTED])
    again = compose.from_yaml(compose.to_yaml(options))
    assert asdict(again) == asdict(options)
    for one in (options, again):
        rule = compose.build_strategy(one.strategy, one.trusted_packages)
        assert (rule.share, rule.warm) == (0.25, True)


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["strategy.arguments={share: much, warm: 2}"],
            [
                "strategy.arguments.share=much: must be a number, or leave it out for the default,"
                " 0.5",
                "strategy.arguments.warm=2: must be true or false, or leave it out for the default,"
                " false",
            ],
        ),
        (
            ["strategy.arguments.label=2024_10"],
            [
                "strategy.arguments.label=202410: must be a text; a text that looks like a number"
                " is written in quotes, or leave it out for the default, plain"
            ],
        ),
        (["strategy.arguments.shar=1"], ["strategy.arguments.shar=1: the options of Half are "]),
        (["strategy.arguments=3"], ["strategy.arguments=3: must be names and values, such as"]),
        (["strategy.share=1"], ["strategy.share=1: no option 'strategy.share'; type strategy.arg"]),
        (["+strategy.share=1"], ["strategy.share=1: is an argument of a class of your own; type "]),
        (["strategy._target_=null"], ["strategy._target_ is not set: strategy=custom needs the"]),
        (["strategy._target_=mine_half.advance"], ["strategy._target_=mine_half.advance: mine_"]),
        (
            ["strategy._target_=flwr.serverapp.strategy.FedAvg"],
            [
                "strategy._target_=flwr.serverapp.strategy.FedAvg: must inherit from"
                " fedgpt.aggregate.base.Strategy"
            ],
        ),
    ],
)
def test_what_is_wrong_with_a_strategy_of_ones_own_is_reported_as_it_is_typed(
    words, expected, half
):
    found = problems("strategy=custom", half, *words, TRUSTED)
    assert len(found) == len(expected)
    assert all(map(str.startswith, found, expected)), found


@pytest.mark.parametrize("text", ["2024_10", "1e5", "true", "null", "0x10", "${seed}"])
def test_an_argument_in_quotes_is_a_text(text, half):
    quoted = f"strategy.arguments.label='{text}'".replace("${", r"\${")
    options = compose.load(["strategy=custom", half, TRUSTED, quoted])
    for one in (options, compose.from_yaml(compose.to_yaml(options))):
        assert one.strategy["arguments"] == {"label": text}


def test_arguments_belong_to_a_class_of_ones_own(half):
    [problem] = problems("strategy=fedavg", "strategy.arguments.eta=2")
    assert problem.startswith("strategy.arguments.eta=2: no option 'strategy.arguments.eta'")
    words = ["strategy=custom", half, TRUSTED, "strategy.arguments.share=0.5,much"]
    with pytest.raises(ConfigError, match=r"strategy\.arguments\.share=much: must be a number"):
        compose.check_sweep(words)


def test_a_strategy_with_a_root_update_needs_public_text():
    [problem] = problems("strategy=fltrust", "corpus.public=0", "tokenizer=bytes")
    assert problem.startswith(
        "corpus.public=0: strategy=fltrust trains the server's own update on the public part; raise"
    )
    compose.load(["strategy=median", "corpus.public=0", "tokenizer=bytes"])


def test_a_users_folder_adds_choices(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny.yaml").write_text("n_layer: 1\nn_head: 1\nn_embd: 8\nblock_size: 16\n")
    assert compose.load(["model=tiny"], str(tmp_path)).model.n_embd == 8
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        compose.load(["model=tiyn"], str(tmp_path))


def test_sweeps_are_checked_choice_by_choice():
    compose.check_sweep(["strategy=fedavg,diloco", "seed=0,1,2"])
    with pytest.raises(ConfigError, match=r"strategy=diloko: .*did you mean 'diloco'"):
        compose.check_sweep(["strategy=fedavg,diloko"])
    with pytest.raises(ConfigError, match="seed=x"):
        compose.check_sweep(["seed=0,x"])


@pytest.mark.parametrize(
    "overrides, part",
    [
        (
            ["pace.goal=2", "pace.grace=1.5"],
            "pace.grace=1.5: fleet=replay: a record contains when replies arrived, not when",
        ),
        (
            ["pace.deadline=30"],
            "pace.deadline=30: fleet=replay: a record contains when replies arrived, not when",
        ),
        (
            ["privacy=client"],
            "privacy=client: fleet=replay: a record contains when replies arrived, and secret",
        ),
        (
            ["strategy=auto"],
            "strategy=auto: fleet=replay: a record contains when replies arrived, not how long",
        ),
    ],
)
def test_options_that_a_replay_cannot_reproduce_are_refused(overrides, part, tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "dispatch"}\n')
    replay = ["clock=virtual", "fleet=replay", f"fleet.path={tmp_path}/events.jsonl"]
    [problem] = problems(*replay, *overrides)
    assert part in problem and "in both" in problem
    compose.load([*replay, "pace=buffer", "pace.dylu=true", "pace.max_staleness=4"])
    compose.load([*replay, "privacy=client", "privacy.rng=seeded"])
    compose.load(["clock=virtual", "fleet=published", *overrides])


def sweep_problems(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose.check_sweep(overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["model.n_embd=128,130"], "try 128 or 136 (in the job model.n_embd=130)"),
        (["pace.clients=4,-1", "seed=0,1"], "(in the job pace.clients=-1 seed=0 and 1 more)"),
        (
            ["strategy=fedavg,fedbuff"],
            "take pace=buffer, or strategy=delta_sgd, fedavg or diloco (in the job strategy=",
        ),
        (
            ["strategy=diloco,fedavg", "strategy.mu=0.5"],
            "Key 'mu' is not in struct (in the job strategy=fedavg)",
        ),
    ],
)
def test_every_job_of_a_sweep_is_checked_before_the_first_one_runs(overrides, part):
    [problem] = sweep_problems(*overrides)
    assert part in problem


def test_in_a_large_sweep_every_choice_of_its_short_lists_is_checked(monkeypatch):
    monkeypatch.setattr(overrides, "MOST_JOBS", 10)
    [problem] = sweep_problems("local.lr=1e-3,0", "seed=range(0,100)")
    assert problem.endswith("(in the job local.lr=0 seed=0 and 4 more)")


def test_a_problem_of_all_jobs_of_a_sweep_is_reported_once_with_the_others():
    found = sweep_problems("rounds=3", "local.lr=0", "ronds=2", "pace.clients=4,-1", "seed=0,1,2")
    assert len(found) == 3
    assert (
        found[0].startswith("ronds=2: no option")
        and found[1] == "local.lr=0.0: must be above 0 and at most 1"
    )
    assert found[2].endswith("(in the job pace.clients=-1 seed=0 and 2 more)")


def test_valid_sweeps_are_accepted():
    compose.check_sweep(["strategy=diloco,fedavgm", "strategy.mu=0.5", "name='a,b','c'"])
    compose.check_sweep(["model=glob(m*)", "pace.clients=range(1,4)", "hydra.sweep.dir=runs/x"])


def test_the_error_for_a_sweep_without_m_shows_how_to_type_it():
    found = problems("seed=1,2", "strategy=fedavg,diloco", "ronds=3")
    assert len(found) == 3 and "typed with -m (fedgpt run -m seed=1,2)" in " ".join(found)
    assert compose.load(["name='a,b'"]).name == "a,b"


def test_a_runtime_that_is_not_installed_is_reported_with_the_other_problems(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    (tmp_path / "config.yaml").write_text(compose.to_yaml(compose.load(["runtime=ray"])))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = problems("runtime=ray", "rounds=0")
    assert len(found) == 2 and any('pip install ".[ray]"' in problem for problem in found)
    assert compose.of_run(tmp_path).runtime.name == "ray", (
        "the folder of a run can be read without Ray"
    )


def test_more_clients_than_supernodes_are_refused():
    [problem] = problems("runtime=superlink", "partition=iid", "partition.clients=17")
    assert "there are 17 clients; take at most 16" in problem
    compose.load(["runtime=superlink", "partition=iid", "partition.clients=16"])
    # with natural clients the number is a maximum, and the corpus may have fewer
    compose.load(["runtime=superlink", "partition.clients=17"])


def test_problems_of_a_custom_class_are_reported_as_typed():
    target = f"partition._target_={third_party.MODULE}.Alternate"
    words = ["partition=custom", target, third_party.TRUSTED]
    options = compose.load([*words, "partition.arguments={clients: 3}"])
    assert options.partition._target_ == "outsider.Alternate"
    assert options.partition.arguments == {"clients": 3}
    one_by_one = compose.load([*words, "partition.arguments.clients=3"])
    assert one_by_one.partition.arguments == {"clients": 3}
    assert asdict(compose.from_yaml(compose.to_yaml(options))) == asdict(options)
    [problem] = problems(target, third_party.TRUSTED)
    assert "partition=natural has a class of its own; add partition=custom" in problem
    [problem] = problems(*words, "partition.arguments=3")
    assert problem == "partition.arguments=3: must be a mapping, such as {a: 1}"
    [problem] = problems(*words, "partition.arguments.lines=3")
    assert "partition.arguments.lines=3: the options of Alternate are clients" in problem
    [problem] = problems("partition.argumants.lines=3")
    assert "no option 'partition.argumants.lines'" in problem


def test_lists_of_names_and_classes_are_accepted():
    target = "fedgpt.report.trackers.csv.CsvTracker"
    typed = f"track=[csv,{{_target_: {target}, file: more.csv}}]"
    options = compose.load([typed, "metrics=[accuracy]"])
    assert options.track == ["csv", {"_target_": target, "file": "more.csv"}]
    assert options.metrics == ["accuracy"]
    assert compose.load(["model.trainable=['lm_head.*']"]).model.trainable == ["lm_head.*"]


def test_a_checkpoint_older_than_an_option_takes_its_default():
    options = compose.load()
    before = compose.flat_options(options)
    new = ("task.name", "task._target_", "corpus._target_", "model.trainable", "metrics")
    for key in new:
        del before[key]
    assert compose.changed_options(before, options) == ""
    options.model.trainable = ["lm_head.*"]
    assert compose.changed_options(before, options) == "model.trainable: [] -> ['lm_head.*']"


def test_a_folder_older_than_an_option_is_opened_and_resumed(tmp_path):
    options = compose.load([f"run_dir={tmp_path}"])
    old = OmegaConf.create(compose.to_yaml(options))
    for key in ("task", "track", "metrics"):
        del old[key]
    for group in ("corpus", "partition", "update"):
        del old[group]._target_, old[group].arguments
    del old.model.trainable
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(old))
    assert asdict(compose.of_run(tmp_path)) == asdict(options)
    compose.refuse_another_run(options)
    options.seed = 1
    with pytest.raises(ConfigError, match="which differs in seed; name another run_dir"):
        compose.refuse_another_run(options)


def test_composing_options_does_not_import_torch():
    code = (
        "import sys; from fedgpt.config import compose; compose.load();"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


LEAVES = sorted(dotted(asdict(RunOptions())))
ODD = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "nan",
    "-inf",
    "1.5",
    "[]",
    "[1,2]",
    "{a:1}",
    "x",
    "'",
    "${seed}",
    "${no}",
    "99999999999999999999",
    "../..",
    "\\0",
    "a=b",
    "[[[",
    "{",
    "é",
]
texts = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(LEAVES), st.sampled_from(ODD) | texts)
def test_any_value_of_any_option_is_valid_or_a_named_problem(option, value):
    """No value raises another exception than ConfigError."""
    try:
        options = compose.load([f"{option}={value}"])
    except ConfigError as error:
        assert error.problems and all(
            isinstance(problem, str) and problem for problem in error.problems
        )
    else:
        assert isinstance(options, RunOptions)
        assert isinstance(compose.from_yaml(compose.to_yaml(options)), RunOptions), (
            "valid options can be written and read"
        )


@settings(max_examples=20, deadline=None)
@given(texts)
def test_any_text_as_an_override_is_valid_or_a_named_problem(text):
    with contextlib.suppress(ConfigError):
        compose.load([text])


def test_trackers_are_checked_with_the_other_options():
    unknown, rounds = sorted(problems("track=[cvs]", "rounds=-1"), reverse=True)
    assert unknown == (
        "track=[cvs]: allowed are csv, or {_target_:package.module.Class}; did you mean 'csv'?"
    )
    assert rounds.startswith("rounds=-1: ")
    assert "add trusted_packages=[mine]" in problems("track=[{_target_:mine.Chart}]")[0]
