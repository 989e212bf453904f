"""Every option of a run, with its unit and default: the schema behind `fedgpt run key=value`.

Plain dataclasses, free of heavy imports. Hydra fills them from conf/ (see config.py, which also
checks the combinations); `strategy` is the one open group, because a strategy is its own dataclass
(aggregate/base.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class CorpusOptions:
    """corpus=sotu|sotu_addresses|stdlib|files|custom: where text comes from and who owns it."""

    name: str = "sotu"
    _target_: str | None = None  # custom: the class, package.module.Class; see trusted_packages
    arguments: Any = None  # {name: value}: what the class is called with
    # sotu: president, address | stdlib: package | files: file, folder, or a JSONL field
    client: str = "president"
    path: str | None = None  # files: a folder of text files or a .jsonl file
    text_field: str = "text"  # files, JSONL: the field that holds the text
    label_field: str | None = None  # files, JSONL: the field that partition=dirichlet may use
    # files: long texts are cut into documents of about this size at blank lines
    document_bytes: int = 4096
    # share of the bytes, by document: trains the tokenizer, may be seen by everybody
    public: float = 0.08
    held_out: float = 0.05  # share of the bytes, by document: central evaluation only


@dataclass
class TokenizerOptions:
    """tokenizer=bpe|bytes."""

    name: str = "bpe"
    vocab_size: int = 4096  # bpe: entries before the end-of-text token is added


@dataclass
class PartitionOptions:
    """partition=natural|grouped|iid|dirichlet|quantity|custom: which client holds which text."""

    name: str = "natural"
    _target_: str | None = None  # custom: the class, package.module.Class; see trusted_packages
    arguments: Any = None  # {name: value}: what the class is called with
    clients: int = 0  # natural: keep this many of the largest, 0 = all; others: how many to make
    alpha: float = 0.5  # dirichlet: concentration over labels; smaller is more skewed
    exponent: float = 1.0  # quantity: client i holds a share proportional to (i + 1) ** -exponent
    piece: int = 1024  # tokens: the unit that iid, dirichlet and quantity hand out
    min_tokens: int = 0  # tokens a client needs; 0 = one training window (block_size + 1)


@dataclass
class ModelOptions:
    """model=nano|micro|mini|gpt2: a GPT, in nanoGPT's words."""

    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    block_size: int = 64  # tokens of context
    dropout: float = 0.0
    positions: str = "learned"  # learned, rotary
    norm: str = "layernorm"  # layernorm (with bias), rmsnorm
    bias: bool = True  # in the linear layers
    gelu: str = "exact"  # exact (erf), tanh (what GPT-2 was trained with)
    tie: bool = True  # the head shares the token embedding
    # names of the parameters to train, with * for any characters; empty = all. The others are
    # frozen, as init_from or the seed makes them, and are never sent
    trainable: list[str] = field(default_factory=list)


@dataclass
class TaskOptions:
    """task=lm|custom: the kind of learning problem (tasks/base.py)."""

    name: str = "lm"
    _target_: str | None = None  # custom: the class, package.module.Class; see trusted_packages
    arguments: Any = None  # {name: value}: fields of the task's class


@dataclass
class LocalOptions:
    """local=adamw|reset: what a client does between download and upload."""

    steps: int = 40  # optimiser steps per job
    batch_size: int = 8  # sequences of block_size tokens per micro-batch
    accumulate: int = 1  # micro-batches per optimiser step
    lr: float = 3e-3  # peak learning rate
    min_lr: float | None = None  # learning rate at the end of the cosine; null = a tenth of lr
    warmup: float = 0.05  # share of the run's tokens
    beta1: float = 0.9
    # batches are small: 0.99 beat 0.95 by 2.5 % in bits per byte at the demo's size
    beta2: float = 0.99
    weight_decay: float = 0.1  # on matrices and embeddings
    grad_clip: float = 1.0  # norm over all parameters; 0 = off
    # keep: Adam's moments stay at the client between its jobs; reset: fresh every job
    moments: str = "keep"
    precision: str = "auto"  # auto, fp32, bf16

    @property
    def last_lr(self) -> float:
        """Where the cosine ends."""
        return float(f"{self.lr / 10:g}") if self.min_lr is None else self.min_lr


@dataclass
class PaceOptions:
    """pace=cohort|buffer: when jobs start and when a server step happens."""

    name: str = "cohort"
    clients: int = 0  # cohort: sampled for each version; buffer: always in flight; 0 = all
    # cohort, instead of `clients`: each client joins with this probability
    rate: float | None = None
    # cohort: close a version at this many updates, null = all sampled; buffer: updates a step
    goal: int | None = None
    # seconds that the server waits for more updates once the goal is reached
    grace: float | None = None
    # cohort: seconds until a version closes; buffer: until a job is given up; null = none
    deadline: float | None = None
    minimum: int = 1  # cohort: updates below which the run stops with a message
    # server versions since its download beyond which an update is dropped
    max_staleness: int | None = None
    # fewer local steps for slower clients, so that all jobs take as long (arXiv 2401.09135)
    dylu: bool = False


@dataclass
class FleetOptions:
    """fleet=none|constant|published|lognormal|trace|replay: how fast the simulated clients are.

    With clock=virtual time is modelled; with clock=real a client that is done too early waits.
    """

    name: str = "none"
    # constant: of a local step, client by client
    step_seconds: list[float] = field(default_factory=lambda: [1.0])
    median: float = 1.0  # lognormal: seconds of a local step
    spread: float = 0.5  # lognormal: sigma of its logarithm
    down: float = 0.0  # seconds per megabyte to the client
    up: float = 0.0  # seconds per megabyte from the client, of the message as encoded
    jitter: float = 0.0  # sigma of the logarithm of each job's own factor
    dropout: float = 0.0  # probability that a job is lost on the way
    # [seconds there, seconds away], each client with its own phase
    window: list[float] = field(default_factory=list)
    # trace: CSV with client,step_seconds[,down,up]; replay: events.jsonl of a run
    path: str | None = None


@dataclass
class UpdateOptions:
    """update=none|bf16|int8|int4|e3m0|topk|sparse_loco|custom: how an update is compressed."""

    compress: str = "none"  # the codec: none, bf16, int8, int4, e3m0, topk, sparse_loco, custom
    _target_: str | None = None  # custom: the class, package.module.Class; see trusted_packages
    arguments: Any = None  # {name: value}: what the class is called with
    # int8, int4, e3m0: elements that share a scale; null = the codec's own
    block: int | None = None
    density: float | None = None  # topk: share of the elements that is sent; null = the codec's own
    error_feedback: bool = False  # what compression left out is added to the client's next update
    decay: float = 0.95  # of what was left out, from one update to the next
    # fp32, bf16: the whole model; int8, int4: what has changed since a client had it last
    downlink: str = "fp32"


@dataclass
class ValidateOptions:
    """validate=default|off: what the server thinks of an update before it counts."""

    norm: float = 10.0  # one longer than this many times the running median is rejected; 0 = off
    # one longer than this many times the running median is scaled down to that; 0 = off
    clip: float = 0.0
    strikes: int = 3  # misses or rejections in a row after which a client is not asked; 0 = never
    rest: int = 10  # rounds for which it is not


@dataclass
class PrivacyOptions:
    """privacy=none|example|client|local: whose data nobody can tell from the model, and how
    surely.
    """

    # example: one block of text; client: all text of a client; local: one update, from the server
    unit: str = "none"
    # the noise follows from it, and the run stops before it costs more
    target_epsilon: float | None = None
    # instead: noise over the clip (local: over twice the clip)
    noise_multiplier: float | None = None
    delta: float | None = None  # null = units^-1.1
    clip: float = 1.0  # longest gradient of a block (example) or update (client, local)
    # releases (client) or jobs (else) of one client; null = as the rounds need
    participations: int | None = None
    engine: str = "bookkeeping"  # example: bookkeeping, opacus
    adaptive: bool = False  # client: the clip follows the median of the norms, privately
    bands: int = 1  # client: releases over which noise is correlated; 1 = independent
    separation: int = 1  # client: versions between two updates of one client, at least
    single: bool = False  # client: allow server steps of one update
    rng: str = "secure"  # secure; seeded: reproducible, and therefore NOT PRIVATE


@dataclass
class AttackOptions:
    """attack=none|sign_flip|scale|gaussian: clients that lie, for research on robust rules."""

    name: str = "none"
    clients: int = 0  # attackers: the first clients in the order of their ids
    # sign_flip, scale: factor on the update; gaussian: length of the noise over the update's
    strength: float = 1.0


@dataclass
class RuntimeOptions:
    """runtime=pool|ray|superlink|inprocess|custom: what runs the clients and carries messages."""

    name: str = "pool"
    _target_: str | None = None  # runtime=custom: full name of a class
    arguments: Any = None  # runtime=custom: the constructor arguments of that class, by name
    workers: int = 0  # client processes; 0 = one per core (or one per GPU)
    threads: int = 0  # torch threads of each; 0 = cores / workers
    device: str = "auto"  # auto, cpu, cuda
    # seconds after which a job that hangs ends its client process; 0 = off
    watchdog: float = 3600.0


@dataclass
class EvaluateOptions:
    """evaluate=held_out|ends: the central evaluation stage."""

    # server versions between evaluations; null = one round's updates, 0 = first and last
    every: int | None = None
    tokens: int = 0  # held-out tokens used, spread evenly; 0 = all
    samples: int = 3  # how many versions get a written sample, first and last included; 0 = none
    sample_tokens: int = 120
    prompt: str | None = None  # what samples continue; null = the corpus' own
    # share above the best loss from which the best weights are restored; null = never
    rollback: float | None = None


@dataclass
class CheckpointOptions:
    """checkpoint=default|none: what a restart finds."""

    # server versions between checkpoints; null = one round's updates, 0 = only the last
    every: int | None = None
    keep: int = 2  # newest checkpoints kept
    best: bool = True  # keep the weights with the lowest held-out loss, too
    # keep replies on the disk until the next checkpoint; null = where it saves work
    journal: bool | None = None


@dataclass
class RunOptions:
    """A whole run."""

    name: str = "run"
    seed: int = 0
    rounds: int = 20  # server steps
    # instead of `rounds`: the run ends with the version that has trained this many; 0 = off
    tokens: int = 0
    clock: str = "real"  # real; virtual: modelled time of a fleet, deterministic and faster
    run_dir: str = ""
    # folder of a run or of a Hugging Face model whose weights to start from
    init_from: str | None = None
    resume: str | None = None  # folder of a run to continue; excludes every other option
    cache_dir: str = ""
    trusted_packages: list[str] = field(default_factory=list)  # whose classes `_target_` may name
    # trackers that get the metrics: names (csv), or mappings with `_target_` and its fields
    track: list[Any] = field(default_factory=list)
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    partition: PartitionOptions = field(default_factory=PartitionOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    task: TaskOptions = field(default_factory=TaskOptions)
    # more numbers of each evaluation: names in evaluate/metrics/, or {_target_: class, its fields}
    metrics: list[Any] = field(default_factory=list)
    local: LocalOptions = field(default_factory=LocalOptions)
    strategy: Any = None  # {_target_: class, its fields}
    pace: PaceOptions = field(default_factory=PaceOptions)
    fleet: FleetOptions = field(default_factory=FleetOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    validate: ValidateOptions = field(default_factory=ValidateOptions)
    privacy: PrivacyOptions = field(default_factory=PrivacyOptions)
    attack: AttackOptions = field(default_factory=AttackOptions)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
