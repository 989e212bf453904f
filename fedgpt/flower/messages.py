"""Jobs and updates as Flower messages: one array and one JSON text each way, because Flower's cost
is per array.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SType

from fedgpt.core.errors import UpdateRejected
from fedgpt.core.messages import ClientInfo, Job, Plan, Reply
from fedgpt.flower.pool.shared_memory import NdArray, array_record
from fedgpt.update.blockwise import BF16
from fedgpt.update.downlink import joined
from fedgpt.update.npy import read_npy

ARRAY = "flat"  # the one array of an ArrayRecord
# names on the wire where they differ from Plan's: a client of an earlier version reads them, and so
# does its journal
WIRE = {"local_steps": "steps", "state_job": "state", "cached_version": "held"}
FIELDS = {wire: field for field, wire in WIRE.items()}
MOST_REASON = 500  # characters of a client's exception that are kept: they go to logs and messages


def vector_record(vector: np.ndarray) -> ArrayRecord:
    """A record that holds `vector` without copying it; it must not change while a message uses
    it.
    """
    return array_record({ARRAY: vector})


def job_content(job: Job, params: ArrayRecord) -> RecordDict:
    """A job as message content; `params` is shared by all jobs of one version."""
    return RecordDict({"params": params, "job": ConfigRecord({"json": _job_json(job)})})


def params_record(job: Job) -> ArrayRecord:
    """The vector of a job on its way to clients, or its steps; shared by all jobs of one version
    from one other.
    """
    if job.plan.cached_version >= 0:
        return vector_record(joined(job.model_deltas))
    return vector_record(BF16().encode(job.params) if job.plan.downlink == "bf16" else job.params)


def job_bytes(job: Job) -> int:
    """Size of what a job puts on the wire: the vector and its JSON."""
    # what a restart left to keep is no traffic of the run
    told = _job_json(replace(job, plan=replace(job.plan, keep=())))
    if job.plan.cached_version >= 0:
        return sum(step.nbytes for step in job.model_deltas) + len(told)
    return job.params.nbytes // (2 if job.plan.downlink == "bf16" else 1) + len(told)


def read_job(message: Message) -> Job:
    """The job in a message; its params may be a read-only view, or the bytes of steps where
    `plan.cached_version` says so.
    """
    about = json.loads(_config_text(message.content, "job"))
    fields = {FIELDS.get(name, str(name)): value for name, value in about["plan"].items()}
    plan = Plan(**fields | {"keep": tuple(fields["keep"])})
    params = _vector(message.content, "params")
    if plan.downlink == "bf16":
        params = BF16().decode(params, params.size // 2)
    return Job(about["client"], about["task"], about["version"], params, plan)


def update_content(header: str, delta: np.ndarray) -> RecordDict:
    """An encoded update as message content."""
    return RecordDict({"update": ConfigRecord({"json": header}), "delta": vector_record(delta)})


def read_reply(message: Message, client: str, number: int) -> Reply:
    """A client's reply as it came; nothing in it is believed yet, and nothing it holds can raise
    here.
    """
    if message.has_error():
        return Reply(
            client, number, error=f"code {message.error.code}: {message.error.reason}"[:MOST_REASON]
        )
    try:
        header, payload = _update(message.content)
        return Reply(client, number, header, payload, bytes=payload.nbytes + len(header))
    except UpdateRejected as rejection:
        return Reply(client, number, error=rejection.detail or rejection.code, code=rejection.code)
    except Exception as error:  # whatever a hostile message raises while it is read
        return unreadable(client, number, error)


def unreadable(client: str, number: int, error: Exception) -> Reply:
    """A reply that raised `error` while it was read."""
    return Reply(
        client, number, error=f"unreadable reply ({type(error).__name__})", code="bad_encoding"
    )


def died(message: Message) -> bool:
    """Whether a reply only says that the client's process ended in the middle of its job."""
    return message.has_error() and message.error.code == ErrorCode.CLIENT_APP_CRASHED


def info_content(info: ClientInfo, digest: str) -> RecordDict:
    """The answer to the first query: who the client is and which prepared data it has."""
    about = MetricRecord({"tokens": info.tokens})
    return RecordDict({"size": about, "who": ConfigRecord({"id": info.id, "digest": digest})})


def read_info(message: Message) -> tuple[ClientInfo, str]:
    """(client, digest of its data) from the answer to a query."""
    who, size = message.content.config_records["who"], message.content.metric_records["size"]
    return ClientInfo(str(who["id"]), int(str(size["tokens"]))), str(who["digest"])


# Records are read by name: the properties of a RecordDict (`array_records` and the like) leave a
# reference cycle in it, and then every vector that passed stays in memory until the garbage
# collector happens to come by.


def _config_text(content: RecordDict, name: str) -> str:
    record = content[name]
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"{name} is a {type(record).__name__}")
    return str(record["json"])


def _update(content: RecordDict) -> tuple[str, np.ndarray]:
    """(header, array) of an update, which is all that a reply may hold."""
    _exactly(content, "update", "delta")
    about, arrays = content["update"], content["delta"]
    if not isinstance(about, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise UpdateRejected(
            "bad_encoding", f"records of {type(about).__name__} and {type(arrays).__name__}"
        )
    _exactly(about, "json")
    _exactly(arrays, ARRAY)
    header, array = about["json"], arrays[ARRAY]
    if not isinstance(header, str):
        raise UpdateRejected("bad_encoding", f"a header of {type(header).__name__}")
    if isinstance(array, NdArray):  # of this machine: memory, not bytes
        return header, array.numpy()
    if array.stype != SType.NUMPY:
        raise UpdateRejected("bad_encoding", f"an array of stype {array.stype!r:.40}")
    return header, read_npy(array.data)


def _exactly(record: Mapping[str, object], *names: str) -> None:
    if missing := sorted(set(names) - set(record)):
        raise UpdateRejected("missing_key", ", ".join(missing))
    if extra := set(record) - set(names):
        raise UpdateRejected("extra_key", f"{len(extra)} of them, beside {', '.join(names)}")


def _vector(content: RecordDict, name: str) -> np.ndarray:
    record = content[name]
    if not isinstance(record, ArrayRecord):
        raise TypeError(f"{name} is a {type(record).__name__}")
    return record[ARRAY].numpy()


def _job_json(job: Job) -> str:
    plan = {WIRE.get(name, name): value for name, value in asdict(job.plan).items()}
    if not job.plan.base_digest:  # a client of an earlier version does not know the name
        del plan["base_digest"]
    about = {"client": job.client, "task": job.number, "version": job.version, "plan": plan}
    return json.dumps(about)
