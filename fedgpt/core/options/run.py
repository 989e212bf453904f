"""All options of a run: those above the groups, and the groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fedgpt.core.options.attack import AttackOptions
from fedgpt.core.options.checkpoint import CheckpointOptions
from fedgpt.core.options.corpus import CorpusOptions
from fedgpt.core.options.evaluate import EvaluateOptions
from fedgpt.core.options.fleet import FleetOptions
from fedgpt.core.options.local import LocalOptions
from fedgpt.core.options.model import ModelOptions
from fedgpt.core.options.option import Allowed, Group, at_least, one_of, option
from fedgpt.core.options.pace import PaceOptions
from fedgpt.core.options.partition import PartitionOptions
from fedgpt.core.options.privacy import PrivacyOptions
from fedgpt.core.options.runtime import RuntimeOptions
from fedgpt.core.options.task import TaskOptions
from fedgpt.core.options.tokenizer import TokenizerOptions
from fedgpt.core.options.update import UpdateOptions
from fedgpt.core.options.validate import ValidateOptions

PACKAGES = Allowed(
    "names of packages, such as [my_package]",
    lambda value: all(part.isidentifier() for name in value for part in name.split(".")),
)
FOLDER = Allowed("a folder", lambda value: value != "")


@dataclass
class RunOptions(Group):
    """Length, seed, folders and trackers of a run."""

    name: str = option(
        "run",
        "Name of the run. It is part of the name of its folder.",
        allowed=Allowed("a name without a slash", lambda value: value != "" and "/" not in value),
    )
    seed: int = option(
        0,
        "Seed of all random numbers. The same options and seed give the same run.",
        allowed=at_least(0, end=2**63 - 1),
    )
    rounds: int = option(
        20,
        "Length of the run: number of server steps. Each step makes one version of the model.",
        unit="versions",
        allowed=at_least(1, end=10**9),
    )
    tokens: int = option(
        0,
        "Length of the run, instead of rounds: the run ends with the version at which the clients"
        " have trained this many tokens.",
        unit="tokens",
        allowed=at_least(0, end=10**15, zero="end after `rounds`"),
    )
    clock: str = option(
        "real",
        "Clock of the run. real: the wall clock. virtual: the modelled time of the chosen fleet;"
        " such a run is deterministic and does not wait for the modelled time.",
        allowed=one_of("real", "virtual"),
    )
    run_dir: str = option(
        "",
        "Folder of the run, for its results and checkpoints. By default a new folder in runs/,"
        " named by the date, the time and the name of the run.",
        allowed=FOLDER,
    )
    init_from: str | None = option(
        None,
        "Folder of a finished run, or of a Hugging Face model (GPT-2, GPT-NeoX, Llama or Qwen2),"
        " whose weights the run starts from. null means random weights.",
        allowed=FOLDER,
    )
    resume: str | None = option(
        None,
        "Folder of the run to continue. The folder contains the options of the run, so only rounds"
        " or tokens may be typed with it, to make the run longer.",
    )
    cache_dir: str = option(
        "",
        "Folder in which prepared corpora are cached. By default the environment variable"
        " FEDGPT_CACHE, or ~/.cache/fedgpt.",
        allowed=FOLDER,
    )
    trusted_packages: list[str] = option(
        [],
        "Python packages from which `_target_` may import a class. Their code runs with your user"
        " rights.",
        allowed=PACKAGES,
    )
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    partition: PartitionOptions = field(default_factory=PartitionOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    task: TaskOptions = field(default_factory=TaskOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    strategy: Any = option(
        None, "Rule by which the server computes the next version of the model from updates."
    )
    pace: PaceOptions = field(default_factory=PaceOptions)
    fleet: FleetOptions = field(default_factory=FleetOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    validate: ValidateOptions = field(default_factory=ValidateOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    attack: AttackOptions = field(default_factory=AttackOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    metrics: list[Any] = option(
        [],
        "Additional metrics of each evaluation: names, or mappings with `_target_` and its"
        " arguments for metrics of your own.",
        built_in="fedgpt.evaluate.metrics",
    )
    track: list[Any] = option(
        [],
        "Trackers that get the metrics of the run: names, or mappings with `_target_` and its"
        " arguments for trackers of your own.",
        built_in="fedgpt.report.trackers",
    )

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Options whose effect another group has taken away, each as it is typed."""
        if self.tokens:
            yield "rounds", f"tokens={self.tokens}; add tokens=0"
        if self.privacy.unit == "client" and self.pace.name == "cohort":
            # it would tell how many took part
            yield "pace.minimum", "privacy=client; choose privacy=example or local"
        if self.privacy.unit == "client":  # a rejected update would tell of the others' norms
            yield "validate.norm", "privacy=client; choose privacy=example or local"
        if self.partition.name not in ("dirichlet", "custom") and self.task.name == "lm":
            yield (
                "corpus.label_field",
                f"partition={self.partition.name}; add partition=dirichlet if corpus.path has"
                " records",
            )
        if self.corpus.at_sites:
            for one in ("", *(f".{field.name}" for field in fields(self.partition))):
                yield f"partition{one}", "corpus=site, where each client has its own text"
        if self.trusted_packages and not self.own_classes():
            yield (
                "trusted_packages",
                "classes of other packages only; name one of these with `_target_`",
            )

    def own_classes(self) -> list[str]:
        """The classes of trusted packages that options name, as package.module.Class."""
        named = [str(target) for target in _values_of("_target_", asdict(self))]
        packages = tuple(f"{package}." for package in self.trusted_packages)
        return [target for target in named if target.startswith(packages)]

    def rules(self) -> Iterator[str]:
        """Contradictions between groups that need no component to find them."""
        own = self.corpus.public_path is not None
        if self.corpus.at_sites and self.tokenizer.name == "bpe" and not own:
            yield (
                "corpus.public_path is not set: tokenizer=bpe is trained on the public text, and"
                " with corpus=site this is the server's own; name a folder or file, or take"
                " tokenizer=bytes"
            )
        elif self.corpus.public == 0 and self.tokenizer.name == "bpe" and not own:
            yield (
                "corpus.public=0: tokenizer=bpe is trained on the public part; raise it or take"
                " tokenizer=bytes"
            )
        if self.checkpoint.journal and self.clock == "virtual":
            yield (
                "checkpoint.journal=true: clock=virtual repeats a run to the same bits without one;"
                " leave it out"
            )
        yield from self._rules_of_sites() if self.corpus.at_sites else self._rules_of_one_text()
        if self.resume is not None:
            yield (
                f"resume={self.resume}: stands alone (fedgpt run resume=<folder>); the folder holds"
                " its own options"
            )

    def _rules_of_one_text(self) -> Iterator[str]:
        """All clients of a text are known, so the run can begin without waiting for some number."""
        if self.pace.begin is not None:
            yield (
                f"pace.begin={self.pace.begin}: only corpus=site has clients that join while the"
                " run goes on; leave it out"
            )

    def _rules_of_sites(self) -> Iterator[str]:
        """Clients on their own machines, with their own text, cannot be simulated or numbered."""
        if self.pace.begin is None:
            yield (
                "pace.begin is not set: with corpus=site nobody knows how many clients there are;"
                " say how many must be connected before the run begins, such as pace.begin=3"
            )
        if self.clock == "virtual":
            yield "clock=virtual: simulates clients, and those of corpus=site are real"
        if self.fleet.name != "none":
            yield f"fleet={self.fleet.name}: simulates clients, and those of corpus=site are real"
        if self.attack.name != "none":
            yield f"attack={self.attack.name}: only for simulated clients, not with corpus=site"
        if self.checkpoint.journal is False:
            yield (
                "checkpoint.journal=false: corpus=site needs the journal, in which the clients that"
                " join are recorded; leave it out"
            )


def _values_of(name: str, node: Any) -> Iterator[Any]:
    """The values of all entries `name` in nested mappings and lists."""
    if isinstance(node, dict):
        if name in node:
            yield node[name]
        node = list(node.values())
    for inner in node if isinstance(node, list) else ():
        yield from _values_of(name, inner)
