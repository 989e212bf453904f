"""What travels between server and client, and what the server holds.

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
    """What a client shall do with one job, beyond the configuration it already has."""

    run: str  # id of the run, random, made once and kept in its checkpoints
    local_steps: int  # optimiser steps
    tokens_done: int  # tokens all clients together trained before this job: the schedule's clock
    tokens_per_step: int  # by how many tokens that clock moves for each local step
    tokens_total: int  # where the schedule ends
    numbers: dict[str, float] = field(default_factory=dict)  # the strategy's client half, by name
    state_job: int = -1  # number of the job whose client state to start from; -1: none, start fresh
    keep: tuple[
        int, ...
    ] = ()  # numbers of the jobs whose client state a restarted server could still ask for
    # the least that the job shall take: a client of the simulated fleet waits until then
    seconds: float = 0.0
    # how params travel; nothing is lost, as they have been rounded to what can be sent
    downlink: str = "fp32"
    # privacy=example, local: what the client checks against its own budget, then adds
    noise_multiplier: float = 0.0
    participations: int = 0  # privacy=example, local: jobs that the client may do at most
    delta: float = 0.0  # privacy=example, local: at which epsilon is meant
    # int8, int4: version that the client has cached, so that only deltas travel; -1: none
    cached_version: int = -1
    # digest of the frozen weights that the client must have (core/flat.py); "": none are frozen
    base_digest: str = ""


# Plan's fields whose names on the wire and in checkpoints differ: these are the names that earlier
# versions of fedgpt gave them, so that their runs, journals and clients are still understood.
WIRE = {"local_steps": "steps", "state_job": "state", "cached_version": "held"}


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """A plan as a message and a checkpoint hold it."""
    about = {WIRE.get(name, name): value for name, value in asdict(plan).items()}
    if not plan.base_digest:  # a client of an earlier version does not know the name
        del about["base_digest"]
    return about


def plan_of_json(about: Mapping[str, Any]) -> Plan:
    """The plan that `plan_as_json` wrote; raises TypeError for fields that do not exist.

    >>> plan = Plan("run", 40, 0, 1, 100, keep=(1, 2), cached_version=3)
    >>> plan_of_json(plan_as_json(plan)) == plan
    True
    """
    fields = {wire: field for field, wire in WIRE.items()}
    named = {fields.get(name, name): value for name, value in about.items()}
    return Plan(**{**named, "keep": tuple(named["keep"])})


@dataclass(frozen=True)
class Job:
    """Server -> client: train `plan.local_steps` steps from `params`. A retry carries the same
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
    ] = ()  # encoded, from `plan.cached_version` on: they travel instead of params


@dataclass(frozen=True)
class Update:
    """Client -> server, decoded and validated: finite, exact shape, positive weight."""

    client: str
    number: int
    version: int  # server version the client started from
    delta: np.ndarray  # (parameters,) float32, start - end
    tokens: int  # tokens trained for this update
    metrics: dict[str, float] = field(default_factory=dict)
    # the vector the client started from, where a strategy asks for it
    base: np.ndarray | None = None


@dataclass(frozen=True)
class ServerState:
    """The global model and what the strategy remembers; everything that must survive a restart."""

    params: np.ndarray  # (parameters,) float32
    version: int = 0
    memory: dict[str, np.ndarray] = field(default_factory=dict)  # name -> array, 0-d allowed


@dataclass(frozen=True)
class Pacing:
    """How a run's jobs and server steps are timed, in numbers (server/pacing.py is the working
    half).
    """

    name: str  # cohort, buffer
    # clients that train at the same time: the cohort's size (expected, where coins decide), or jobs
    # in flight
    clients: int
    goal: int  # updates that one server step waits for
    grace: bool = False  # whether it may take more of them, which come soon after


@dataclass(frozen=True)
class Observed:
    """What a strategy that may change the pacing decides from."""

    pacing: str  # the present one
    # client -> seconds of a whole job, as far as is known (server/pacing_advisor.py)
    seconds: Mapping[str, float]
    record: Mapping[str, Any]  # metrics of the version that was just made; empty within a version
    waited: float = 0.0  # seconds that the oldest job has been out


@dataclass(frozen=True)
class Choice:
    """A pacing, why, and what the rule wants to remember."""

    pacing: str
    reason: str = ""
    memory: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientInfo:
    """What the server knows of a client before it samples it."""

    id: str  # stable over restarts and reconnections
    tokens: int  # size of its shard


@dataclass(frozen=True)
class JobTime:
    """How long a client worked on a job, as far as the transport knows.

    >>> JobTime(2.5)  # reported by the client's process
    JobTime(seconds=2.5, measured=True)
    """

    # None: unknown, so the server takes the time from dispatch to arrival
    seconds: float | None = None
    # False: the job includes the start of a process, so it says nothing about the client's speed
    measured: bool = True


@dataclass(frozen=True)
class Reply:
    """Client -> server as it arrives: a payload that nobody has looked at yet, or a failure."""

    client: str
    number: int
    header: str = ""  # JSON, see update/codec.py
    payload: Any = None  # the array as sent
    error: str = ""  # reason when there is no payload
    code: str = "client_error"  # what an error counts as
    bytes: int = 0  # size of the encoded message
    job_time: JobTime = JobTime()
