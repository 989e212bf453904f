"""Messages between server and client, and the state of the server.

Sign: an update's delta is a pseudo-gradient, `delta = start - end`; every strategy subtracts it.
Staleness counts server versions since the client's download.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plan:
    """The parameters of one job that are not in the run's configuration."""

    run: str  # random id of the run, stored in its checkpoints
    local_steps: int  # number of optimiser steps
    tokens_done: int  # tokens of the schedule: trained by all clients together before this job
    tokens_per_step: int  # tokens of the schedule for each local step
    tokens_total: int  # tokens of the schedule at its end
    numbers: dict[str, float] = field(default_factory=dict)  # `Strategy.client_numbers`, by name
    state_job: int = -1  # number of the job whose client state to start from; -1: no state
    keep: tuple[int, ...] = ()  # numbers of the jobs whose client state a restarted server may need
    # smallest time of the job in seconds: a client of a simulated fleet waits for the rest of it
    seconds: float = 0.0
    # format in which params are sent; it is lossless, because params are already rounded to it
    downlink: str = "fp32"
    # privacy=example, local: noise that the client checks against its own budget and then adds
    noise_multiplier: float = 0.0
    participations: int = 0  # privacy=example, local: largest number of jobs of the client
    delta: float = 0.0  # privacy=example, local: delta of the planned epsilon
    # int8, int4: version that the client has cached, so that only deltas are sent; -1: none
    cached_version: int = -1
    # what the client must have, as far as the run has it: `base`, the digest of the frozen weights
    # (core/flat.py); `text` and `shards`, the digests of the text and of what each client has of it
    # (data/shards.py); `tokenizer`, where each client has its own text; `code`, the digests of the
    # files with the user's own classes that clients use
    digests: dict[str, str] = field(default_factory=dict)


# names in Plan.digests: of clients that share a text, and of those that have their own
DIGESTS, OWN_TEXT = ("base", "code", "text", "shards"), ("base", "tokenizer")
# Plan's fields with other names in messages and checkpoints: the names of earlier versions of
# fedgpt, so that their runs, journals and clients remain compatible.
WIRE = {"local_steps": "steps", "state_job": "state", "cached_version": "held"}


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan as JSON values, for messages and checkpoints."""
    about = {WIRE.get(name, name): value for name, value in asdict(plan).items()}
    for name, digest in about.pop("digests").items():
        about[f"{name}_digest"] = digest
    return about


def plan_of_json(about: Mapping[str, Any]) -> Plan:
    """The plan that `plan_as_json` wrote; raises TypeError for fields that do not exist.

    >>> plan = Plan("run", 40, 0, 1, 100, keep=(1, 2), cached_version=3)
    >>> plan_of_json(plan_as_json(plan)) == plan
    True
    """
    fields = {wire: field for field, wire in WIRE.items()}
    named = {fields.get(name, name): value for name, value in about.items()}
    digests = {
        name: named.pop(f"{name}_digest")
        for name in {*DIGESTS, *OWN_TEXT}
        if f"{name}_digest" in named
    }
    return Plan(**{**named, "keep": tuple(named["keep"]), "digests": digests})


@dataclass(frozen=True)
class Job:
    """Server -> client: train `plan.local_steps` steps from `params`. A retry has the same
    number.
    """

    client: str
    number: int  # counts the client's jobs from 0
    version: int
    params: np.ndarray  # (parameters,) float32, read-only
    plan: Plan
    sent: float = 0.0  # the server's clock at dispatch
    model_deltas: tuple[
        np.ndarray, ...
    ] = ()  # encoded deltas since `plan.cached_version`, sent instead of params


@dataclass(frozen=True)
class Update:
    """Client -> server, decoded and validated: finite, exact shape, positive weight."""

    client: str
    number: int
    version: int  # server version the client started from
    delta: np.ndarray  # (parameters,) float32, start - end
    tokens: int  # tokens trained for this update
    metrics: dict[str, float] = field(default_factory=dict)
    # the vector the client started from, if a strategy needs it
    base: np.ndarray | None = None


@dataclass(frozen=True)
class ServerState:
    """The global model and the strategy's memory."""

    params: np.ndarray  # (parameters,) float32
    version: int = 0
    memory: dict[str, np.ndarray] = field(default_factory=dict)  # name -> array, 0-d allowed


@dataclass(frozen=True)
class Pacing:
    """The pacing of a run in numbers, for strategies (server/pacing.py implements the pacings)."""

    name: str  # cohort, buffer
    # clients that train at the same time: the cohort's size (expected, where coins decide), or jobs
    # in flight
    clients: int
    goal: int  # number of updates that one server step waits for
    grace: bool = False  # whether a step may take more updates, which arrive within pace.grace
    limits: tuple[str, ...] = ("pace.clients",)  # the options to raise for a larger goal


@dataclass(frozen=True)
class Observed:
    """The input of a strategy that may change the pacing."""

    pacing: str  # the current pacing
    # client -> seconds of a complete job, measured or estimated (server/pacing_advisor.py)
    seconds: Mapping[str, float]
    record: Mapping[str, Any]  # metrics of the version that was just made; empty within a version
    waited: float = 0.0  # seconds that the oldest job has been in flight


@dataclass(frozen=True)
class Choice:
    """A pacing, the reason for it, and arrays for the strategy's memory."""

    pacing: str
    reason: str = ""
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientInfo:
    """The server's information about a client before it is sampled."""

    id: str  # does not change at restarts and reconnections
    tokens: int  # tokens of its shard


@dataclass(frozen=True)
class BaseInfo:
    """What a server says of a run's base weights before it sends them."""

    digest: str  # of names, shapes and values (core/flat.py)
    layout: str  # digest of names and shapes
    bytes: int  # size of all values in float32


@dataclass(frozen=True)
class BasePiece:
    """A part of the values of a run's base weights, in the order of their names."""

    info: BaseInfo
    tokenizer: str  # digest of the run's tokenizer, which decides some of the shapes
    offset: int  # of the first byte
    values: np.ndarray  # (bytes,) uint8


@dataclass(frozen=True)
class JobTime:
    """The time of a job, if the transport measures it.

    >>> JobTime(2.5)  # reported by the client's process
    JobTime(seconds=2.5, measured=True)
    """

    # None: unknown, so the server uses the time from dispatch to arrival
    seconds: float | None = None
    # False: the job includes the start of a process, so it is no measure of the client's speed
    measured: bool = True


@dataclass(frozen=True)
class Reply:
    """Client -> server, before validation: an unchecked payload, or a failure."""

    client: str
    number: int
    header: str = ""  # JSON, see update/wire.py
    payload: Any = None  # the array as sent
    error: str = ""  # reason when there is no payload
    code: str = "client_error"  # reason code under which an error is counted
    bytes: int = 0  # size of the encoded message
    job_time: JobTime = JobTime()
