"""Each change that a message about options advises is made, and the options are then accepted."""

from __future__ import annotations

import re

import pytest
from support.measures import PACKAGE
from support.third_party import MODULE, TRUSTED

from fedgpt.audit.problems import audit_problems
from fedgpt.config import compose
from fedgpt.core.errors import ConfigError

BUFFER = ("strategy=fedbuff", "pace=buffer")
TWO = ("partition=iid", "partition.clients=2")
OWN = ("partition=custom", f"partition._target_={MODULE}.Alternate", TRUSTED)
REPLAY = ("clock=virtual", "fleet=replay", "fleet.path=events.jsonl")
PRIVATE = ("privacy=client", "privacy.noise_multiplier=5")
DOCUMENTS = (
    "task=custom",
    "task._target_=support.labels_task.DocumentLabel",
    "trusted_packages=[support]",
)
FLOWER = ("strategy=flower", "strategy._target_=flwr.serverapp.strategy.FedAvg")
# what is typed -> the end of the message -> changes that it advises. `-key` leaves an option out;
# any other word takes the place of the word with the same key.
REMEDIES: dict[tuple[str, ...], dict[str, list[str]]] = {
    # of one group
    ("attack.clients=2",): {
        "choose attack=sign_flip or attack=scale or attack=gaussian, or leave it out": [
            "attack=sign_flip",
            "attack=scale",
            "attack=gaussian",
            "-attack.clients",
        ]
    },
    ("+name=foo",): {"leave out the plus": ["-+name name=foo"]},
    ("attack=scale", "attack.clients=0"): {
        "say how many, or take attack=none": ["attack.clients=2", "attack=none"]
    },
    ("attack=scale", *TWO, "attack.clients=3"): {"lower it": ["attack.clients=2"]},
    ("pace.goal=4", *TWO): {"lower it": ["pace.goal=2"]},
    ("pace.minimum=3", *TWO): {"lower it": ["pace.minimum=2"]},
    ("corpus.public=0.5", "corpus.held_out=0.5"): {
        "leave nothing to the clients: their sum must be below 1": ["corpus.public=0.4"]
    },
    ("local.min_lr=0.1",): {"lower it, or leave it out": ["local.min_lr=0.001", "-local.min_lr"]},
    ("model.n_embd=10", "model.n_head=4"): {"try 8 or 16": ["model.n_embd=8", "model.n_embd=16"]},
    ("model.n_embd=5", "model.n_head=6", "model.positions=rotary"): {"try 12": ["model.n_embd=12"]},
    ("pace.rate=0.5", *BUFFER): {"leave it out with pace=buffer": ["-pace.rate"]},
    ("pace.goal=9", "pace.clients=8"): {"raise pace.clients": ["pace.clients=9"]},
    ("pace.minimum=9", "pace.clients=8"): {"lower it": ["pace.minimum=8"]},
    ("pace.grace=1",): {"set pace.goal": ["pace.goal=4"]},
    ("pace.goal=2", "pace.minimum=3"): {"lower pace.minimum": ["pace.minimum=2"]},
    ("strategy=auto", "pace.rate=0.5"): {"set pace.clients instead": ["-pace.rate pace.clients=4"]},
    ("pace.max_staleness=3",): {"leave it out": ["-pace.max_staleness"]},
    ("privacy.target_epsilon=3",): {
        "choose example, client or local": ["privacy=example", "privacy=client", "privacy=local"]
    },
    ("privacy=local", "privacy.bands=2"): {"leave it out": ["-privacy.bands"]},
    ("tokenizer.vocab_size=3",): {"use 256 or more": ["tokenizer.vocab_size=256"]},
    ("update.error_feedback=true",): {
        "choose a codec, such as update=int8, or leave update.error_feedback out": [
            "update=int8",
            "-update.error_feedback",
        ]
    },
    ("validate.clip=20",): {"it clips none; lower it": ["validate.clip=10"]},
    # of several groups
    ("corpus.public=0",): {
        "raise it or take tokenizer=bytes": ["corpus.public=0.01", "tokenizer=bytes"]
    },
    ("corpus.public=0", "tokenizer=bytes", "strategy=fltrust"): {
        "raise it, or take another rule, such as strategy=median": [
            "corpus.public=0.01",
            "strategy=median",
        ]
    },
    ("clock=virtual", "fleet=published", "checkpoint.journal=true"): {
        "leave it out": ["-checkpoint.journal"]
    },
    ("resume=run", "seed=3"): {"the folder holds its own options": ["-resume"]},
    ("clock=virtual",): {
        "add fleet=published (or constant, ...)": ["fleet=published", "fleet=constant"]
    },
    REPLAY[1:]: {"add clock=virtual": ["clock=virtual"]},
    **{
        ("fleet=published", option): {
            "add clock=virtual, or leave it out": [
                "clock=virtual",
                f"-{option.partition('=')[0]}",
            ]
        }
        for option in ("fleet.jitter=1", "fleet.up=1", "fleet.down=1", "fleet.dropout=0.5")
    },
    ("fleet=published", "fleet.window=[1,2]"): {
        "add clock=virtual, or leave it out": ["clock=virtual", "-fleet.window"]
    },
    ("clock=virtual", "fleet=constant", "fleet.step_seconds=[0]"): {
        "needs numbers above 0, one for each client in turn; at most 1e+09 seconds": [
            "fleet.step_seconds=[1e9]"
        ]
    },
    ("clock=virtual", "fleet=constant", "fleet.window=[1]"): {
        "[seconds available, seconds away], both above 0; at most 1e+09 seconds": [
            "fleet.window=[1,2]"
        ]
    },
    ("clock=virtual", "fleet=trace"): {"name such a file": ["fleet.path=table.csv"]},
    ("clock=virtual", "fleet=replay", "fleet.path=nowhere"): {
        "name such a file": ["fleet.path=events.jsonl"]
    },
    ("clock=virtual", "fleet=replay", "fleet.path=table.csv"): {
        "this is none; name another": ["fleet.path=events.jsonl"]
    },
    ("clock=virtual", "fleet=trace", "fleet.path=lacks.csv"): {
        "it has client, steps; name the columns there": ["fleet.path=table.csv"]
    },
    ("clock=virtual", "fleet=trace", "fleet.path=wide.csv"): {
        "save it as CSV": ["fleet.path=table.csv"]
    },
    ("fleet=trace", "fleet.path=table.csv"): {
        "add clock=virtual, or leave them out": ["clock=virtual", "fleet.path=short.csv"]
    },
    (*REPLAY, "pace.deadline=30"): {"leave it out in both": ["-pace.deadline"]},
    (*REPLAY, "pace.grace=3", "pace.goal=2"): {"leave it out in both": ["-pace.grace"]},
    (*REPLAY, *PRIVATE): {
        "only runs without privacy, or with privacy.rng=seeded in both, can be replayed": [
            "privacy=none -privacy.noise_multiplier",
            "privacy.rng=seeded",
        ]
    },
    (*REPLAY, "strategy=auto"): {
        "name it, e.g. pace=buffer strategy=delta_sgd, in both": ["pace=buffer strategy=delta_sgd"]
    },
    # a strategy and the pacing
    ("strategy=auto", "pace=buffer"): {
        "leave pace out, or take strategy=delta_sgd": ["-pace", "strategy=delta_sgd"]
    },
    ("pace=buffer", "strategy=delayed_nesterov", "strategy.c=0.5"): {
        "lower it, or leave it out for the default, 0.0": ["strategy.c=0.01", "-strategy.c"]
    },
    ("strategy=fedavg", "strategy.eta=-1"): {
        "must be above 0, or leave it out for the default, 1.0": ["-strategy.eta"]
    },
    ("pace=buffer", "strategy=fedavg"): {
        "take strategy=delta_sgd or strategy=fedbuff": ["strategy=delta_sgd", "strategy=fedbuff"]
    },
    ("pace=buffer", "strategy=diloco"): {
        "take strategy=delayed_nesterov": ["strategy=delayed_nesterov"]
    },
    ("pace=buffer", "strategy=fedadam"): {
        "take strategy=delta_sgd, or strategy=delayed_nesterov for momentum": [
            "strategy=delta_sgd",
            "strategy=delayed_nesterov",
        ]
    },
    ("pace=buffer", "strategy=median"): {
        "take pace=cohort, or strategy=fedbuff without robustness": [
            "pace=cohort",
            "strategy=fedbuff",
        ]
    },
    ("strategy=fedbuff",): {
        "take pace=buffer, or strategy=delta_sgd, fedavg or diloco": [
            "pace=buffer",
            "strategy=delta_sgd",
            "strategy=fedavg",
            "strategy=diloco",
        ]
    },
    ("pace=buffer", *FLOWER): {"supports pace=cohort only": ["pace=cohort"]},
    ("pace=buffer", "strategy=fedasync", "pace.goal=2"): {
        "allows pace.goal=1 only; set it, or take strategy=fedbuff": [
            "pace.goal=1",
            "strategy=fedbuff",
        ]
    },
    ("pace=buffer", "strategy=delayed_nesterov", "pace.goal=2"): {
        "allows pace.goal=1 only; set it, or take strategy=fedbuff": [
            "pace.goal=1",
            "strategy=fedbuff",
        ]
    },
    ("pace=buffer", "strategy=delayed_nesterov", "pace.grace=2"): {
        "leave it out, or take strategy=fedbuff": ["-pace.grace", "strategy=fedbuff"]
    },
    ("pace=buffer", "strategy=delayed_nesterov", "pace.clients=40"): {
        "set strategy.period=80 (twice pace.clients is a good start)": ["strategy.period=80"]
    },
    ("strategy=auto", "pace.goal=4"): {"leave it out": ["-pace.goal"]},
    ("strategy=auto", "strategy.back=5"): {"lower it": ["strategy.back=1"]},
    ("strategy=krum", "strategy.attackers=3"): {
        "raise pace.clients or lower strategy.attackers to at most 2": [
            "pace.clients=9",
            "strategy.attackers=2",
        ]
    },
    ("strategy=krum", "strategy.keep=8"): {
        "at most 7 are allowed; lower it, or set 0 for that": ["strategy.keep=7", "strategy.keep=0"]
    },
    ("strategy=krum", "pace.clients=4"): {
        "raise pace.clients, or take strategy=median": ["pace.clients=5", "strategy=median"]
    },
    ("strategy=trimmed_mean", "pace.goal=2"): {
        "raise pace.goal, or take strategy=fedavg": ["pace.goal=3", "strategy=fedavg"]
    },
    ("strategy=trimmed_mean", "strategy.trim=4"): {
        "raise pace.clients or lower strategy.trim to at most 3": [
            "pace.clients=9",
            "strategy.trim=3",
        ]
    },
    ("strategy=median", "pace.goal=2", "pace.clients=2"): {
        "raise pace.goal and pace.clients, or take strategy=fedavg": [
            "pace.goal=3 pace.clients=3",
            "strategy=fedavg",
        ]
    },
    ("strategy=krum", "strategy.attackers=5", "partition=iid", "partition.clients=10"): {
        "raise pace.clients and partition.clients or lower strategy.attackers to at most 2": [
            "pace.clients=13 partition.clients=13",
            "strategy.attackers=2",
        ]
    },
    ("strategy=median", *TWO): {
        "waits for 2: raise partition.clients, or take strategy=fedavg": [
            "partition.clients=3",
            "strategy=fedavg",
        ]
    },
    ("strategy=geometric_median", "pace.clients=2", *TWO): {
        "raise pace.clients and partition.clients": ["pace.clients=3 partition.clients=3"]
    },
    ("strategy=median", "pace.rate=0.1", "partition=iid", "partition.clients=20"): {
        "raise pace.rate, or take strategy=fedavg": ["pace.rate=0.2", "strategy=fedavg"]
    },
    # a task, a partition, parameters
    (*DOCUMENTS, "privacy=example", "privacy.noise_multiplier=5"): {
        "take task=lm, or privacy=client": [
            "-task -task._target_ -trusted_packages",
            "privacy=client",
        ]
    },
    ("partition=iid", "partition.clients=0"): {"say how many, 1 or more": ["partition.clients=1"]},
    ("model.trainable=[wte]",): {
        "take names such as transformer.wte.weight, with * for any characters": [
            "model.trainable=[transformer.wte.weight]",
            "model.trainable=[transformer.wte.*]",
        ]
    },
    ("metrics=[accuracy,accuracy]",): {"leave one out": ["metrics=[accuracy]"]},
    # this machine
    ("model.n_embd=1000000", "model.n_head=100"): {"lower one of them": ["model.n_embd=200"]},
    ("run_dir=file/run",): {"is a file; name a folder": ["run_dir=folder/run"]},
    ("cache_dir=file",): {"is a file; name a folder": ["cache_dir=folder"]},
    (f"cache_dir={'x' * 300}",): {"name another folder": ["cache_dir=folder"]},
    ("init_from=folder",): {
        "name the folder of a finished run, or of a Hugging Face model": ["-init_from"]
    },
    ("runtime=superlink", "partition=iid", "partition.clients=17"): {
        "take at most 16 (partition.clients=2), or runtime=pool": [
            "partition.clients=16",
            "partition.clients=2",
            "runtime=pool",
        ]
    },
    # the form of a word
    ("privacy=clients", "privacy.noise_multiplier=5"): {
        "choose from client, example, local, none; did you mean 'client'?": ["privacy=client"]
    },
    ("hydra/launcher=nope",): {"choose from basic": ["hydra/launcher=basic"]},
    (f"seed={'9' * 5000}",): {"a number of 5,005 characters; type fewer": ["seed=9"]},
    (f"metrics={'[' * 100}{']' * 100}",): {"type fewer brackets": ["metrics=[]"]},
    ("name=\udcff", "run_dir=folder/run"): {
        "type it in UTF-8, and rename a file that is named so": ["name=ÿ"]
    },
    ("update.compress=int8",): {"type update=int8": ["-update.compress update=int8"]},
    ("metrics=accuracy",): {"type metrics=[accuracy]": ["metrics=[accuracy]"]},
    ("track=csv",): {"type track=[csv]": ["track=[csv]"]},
    ("local.steps=5.0",): {"type 5": ["local.steps=5"]},
    ("seed=${nothing}",): {"must name another option, such as ${seed}": ["-seed"]},
    ("~seed",): {"an option can be set, not deleted": ["-~seed seed=1"]},
    ("name=${a",): {r"type \${ for the characters ${ themselves": [r"name=\${a"]},
    ("run_dir=~no-such-user/run",): {
        "type ./~ for a folder whose name begins so": ["run_dir=./~no-such-user/run"]
    },
    (*FLOWER, "strategy.fraction_train=0.5"): {
        "is typed with a plus: +strategy.fraction_train": [
            "-strategy.fraction_train +strategy.fraction_train=0.5"
        ]
    },
    OWN[:2]: {f"to trust another package add {TRUSTED}": [TRUSTED]},
    (*OWN, "partition.clients=3"): {"leave it out": ["-partition.clients"]},
    ("strategy=custom",): {
        "strategy._target_=package.module.Class": [
            "strategy._target_=fedgpt.aggregate.fedavg.FedAvg"
        ]
    },
    ("strategy=custom", "strategy._target_=fedgpt.aggregate.fedavg.FedAvg", "+strategy.eta=2"): {
        "type strategy.arguments.eta=2": ["-+strategy.eta strategy.arguments.eta=2"]
    },
}
# the same for `fedgpt audit`
AUDIT_REMEDIES: dict[tuple[str, ...], dict[str, list[str]]] = {
    ("privacy=local",): {
        "audit privacy=example or privacy=client": ["privacy=example", "privacy=client"]
    },
    ("model.trainable=[transformer.h.0.*]",): {
        "add transformer.wte.* or lm_head.*, or leave it out": [
            "model.trainable=[transformer.h.0.*,transformer.wte.*]",
            "model.trainable=[transformer.h.0.*,lm_head.*]",
            "-model.trainable",
        ]
    },
    DOCUMENTS: {"leave task out": ["-task -task._target_ -trusted_packages"]},
}


@pytest.fixture(scope="module", autouse=True)
def _here(tmp_path_factory):
    """A folder with the files that the words name."""
    folder = tmp_path_factory.mktemp("remedies")
    (folder / "events.jsonl").write_text('{"event": "dispatch"}\n')
    (folder / "table.csv").write_text("client,step_seconds,up\na,1,2\n")
    (folder / "short.csv").write_text("client,step_seconds\na,1\n")
    (folder / "lacks.csv").write_text("client,steps\na,1\n")
    (folder / "wide.csv").write_text("client,step_seconds\na,1\n", encoding="utf-16")
    (folder / "file").touch()
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def problems(words: list[str], audit: bool = False) -> list[str]:
    """What is wrong with these words; empty where they are accepted."""
    try:
        options = compose.load(words)
    except ConfigError as error:
        return error.problems
    return list(audit_problems(options)) if audit else []


def followed(words: tuple[str, ...], change: str) -> list[str]:
    """The words after a change."""
    changed = list(words)
    for word in change.split():
        key = word.removeprefix("-").partition("=")[0]
        changed = [one for one in changed if one.partition("=")[0] != key]
        changed += [] if word.startswith("-") else [word]
    return changed


@pytest.mark.parametrize("words", [*REMEDIES, *AUDIT_REMEDIES], ids=" ".join)
def test_every_remedy_that_a_message_names_helps(words):
    audit = words in AUDIT_REMEDIES
    found = problems([*words], audit)
    for remedy, changes in {**REMEDIES, **AUDIT_REMEDIES}[words].items():
        assert any(remedy in problem for problem in found), found
        for change in changes:
            assert problems(followed(words, change), audit) == [], change


def test_every_command_to_continue_a_run_can_be_typed_in_a_shell():
    """Its folder may have a space in its name: only core/errors.py writes the command."""
    unquoted = re.compile(r"resume=\{(?!self\.resume\}|shlex\.quote\()")
    assert not [p.name for p in PACKAGE.rglob("*.py") if unquoted.search(p.read_text())]
