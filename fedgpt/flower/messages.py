"""Jobs and updates as Flower messages: one array and one JSON text in each direction.

A message contains one array, because its cost in Flower grows with the number of arrays.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SType

from fedgpt.client.policy import PolicyRefused
from fedgpt.core.errors import ConfigError, FedGPTError, PartMissing, TextChanged, UpdateRejected
from fedgpt.core.lines import one_line
from fedgpt.core.messages import BaseInfo, ClientInfo, Job, Reply, plan_as_json, plan_of_json
from fedgpt.flower.pool.shared_memory import NdArray, array_record
from fedgpt.update.codecs.bf16 import BF16
from fedgpt.update.downlink import joined
from fedgpt.update.npy import read_npy

ARRAY = "flat"  # the one array of an ArrayRecord
MOST_REASON = 500  # largest length of a client's exception in logs and messages, in characters
MOST_PROBLEMS, MOST_VERSION = 20, 60  # of a client's refusal; characters of a version
# seconds after which a site that refuses is asked again, at the earliest and at the latest
LEAST_REFUSED, MOST_REFUSED = 60.0, 12 * 3600.0
PROTOCOL = 2  # version of the messages in this file: raise it when their meaning changes
# packages whose other version at a client may give an update other bits
COMPARED = ("fedgpt", "torch")


def vector_record(vector: np.ndarray) -> ArrayRecord:
    """A record of `vector`, which is not copied: do not change it while a message refers to it."""
    return array_record({ARRAY: vector})


def job_content(job: Job, params: ArrayRecord) -> RecordDict:
    """A job as message content; `params` is shared by all jobs of one version."""
    return RecordDict({"params": params, "job": ConfigRecord({"json": _job_json(job)})})


def params_record(job: Job) -> ArrayRecord:
    """The params of a job as they are sent, or its deltas from the client's cached version.

    All jobs of one version with the same cached version share one record.
    """
    if job.plan.cached_version >= 0:
        return vector_record(joined(job.model_deltas))
    return vector_record(BF16().encode(job.params) if job.plan.downlink == "bf16" else job.params)


def job_bytes(job: Job) -> int:
    """Size in bytes of a job's message: the array and the JSON."""
    # without `keep`, which depends on restarts: the reported traffic must not
    text = _job_json(replace(job, plan=replace(job.plan, keep=())))
    if job.plan.cached_version >= 0:
        return sum(step.nbytes for step in job.model_deltas) + len(text)
    return job.params.nbytes // (2 if job.plan.downlink == "bf16" else 1) + len(text)


def read_job(message: Message) -> Job:
    """The job in a message.

    `params` may be a read-only view. With a `plan.cached_version` they are the bytes of deltas.
    """
    about = json.loads(_config_text(message.content, "job"))
    plan = plan_of_json(about["plan"])
    params = _vector(message.content, "params")
    if plan.downlink == "bf16":
        params = BF16().decode(params, params.size // 2)
    return Job(about["client"], about["task"], about["version"], params, plan)


def update_content(header: str, delta: np.ndarray) -> RecordDict:
    """An encoded update as message content."""
    return RecordDict({"update": ConfigRecord({"json": header}), "delta": vector_record(delta)})


def read_reply(message: Message, client: str, number: int) -> Reply:
    """A client's reply, before validation; raises for no content of a message."""
    if message.has_error():
        error = f"code {message.error.code}: {reason_of(message)}"[:MOST_REASON]
        refused = refused_for(message) is not None
        return Reply(client, number, error=error, code="policy" if refused else "client_error")
    try:
        header, payload = _update(message.content)
        return Reply(client, number, header, payload, bytes=payload.nbytes + len(header))
    except Exception as error:  # a malicious message may raise any exception
        return unreadable(client, number, error)


def unreadable(client: str, number: int, error: Exception) -> Reply:
    """The failure for a reply whose reading raised `error`."""
    if isinstance(error, UpdateRejected):
        return Reply(
            client, number, error=one_line(error.detail or error.code, MOST_REASON), code=error.code
        )
    return Reply(
        client, number, error=f"unreadable reply ({type(error).__name__})", code="bad_encoding"
    )


def away(message: Message) -> bool:
    """Whether the SuperLink reports that it lost the client before it replied."""
    return message.has_error() and message.error.code == ErrorCode.NODE_UNAVAILABLE


def died(message: Message) -> bool:
    """Whether a reply reports that the client's process ended during the job."""
    return message.has_error() and message.error.code == ErrorCode.CLIENT_APP_CRASHED


def has_other_text(message: Message) -> bool:
    """Whether a reply reports that the client has other text than the run began with."""
    return message.has_error() and TextChanged.__name__ in str(message.error.reason)


def lacks_part(message: Message) -> bool:
    """Whether a reply reports that a site lacks the run's tokenizer or base weights."""
    return message.has_error() and PartMissing.__name__ in str(message.error.reason)


def refused_for(message: Message) -> float | None:
    """Seconds for which a site refuses jobs by its policy; None if it does not."""
    reason = str(message.error.reason) if message.has_error() else ""
    if PolicyRefused.__name__ not in reason:
        return None
    told = re.search(r"asked again in (\d{1,9}) s", reason)
    return min(MOST_REFUSED, max(LEAST_REFUSED, float(told[1]))) if told else MOST_REFUSED


def reason_of(message: Message) -> str:
    """The reason of an error for a log: the client chooses it, so it is cut to one line."""
    return one_line(str(message.error.reason), MOST_REASON)


@dataclass(frozen=True)
class Introduction:
    """A node's answer to the server's first query."""

    info: ClientInfo
    digest: str  # of its prepared text
    protocol: int  # version of its messages; 0: from before they had one
    versions: Mapping[str, str]  # of the packages in COMPARED
    base: int  # bytes that it has of the run's base weights


def versions() -> dict[str, str]:
    """The versions in this process of the packages in COMPARED."""
    return {name: importlib.metadata.version(name) for name in COMPARED}


@dataclass(frozen=True)
class Question:
    """What the server's first query says to a client with its own text."""

    tokenizer: str  # its `definition`
    base: BaseInfo | None  # of base weights that the server sends to a site that lacks them


def question_content(tokenizer: str, base: BaseInfo | None = None) -> RecordDict:
    """The server's first query of a client with its own text, as `Question` describes it."""
    definition = np.frombuffer(tokenizer.encode(), np.uint8)
    content = RecordDict({"tokenizer": vector_record(definition)})
    if base is not None:
        content["base"] = base_record(base)
    return content


def read_question(message: Message) -> Question:
    """The question in a query; raises FedGPTError if there is none."""
    content = message.content
    if "tokenizer" not in content:
        raise FedGPTError("the server's question has no tokenizer; install its version of fedgpt")
    definition = _vector(content, "tokenizer").tobytes().decode()
    return Question(definition, read_base(content) if "base" in content else None)


def base_record(base: BaseInfo, **more: str | int) -> ConfigRecord:
    """What a server says of base weights."""
    return ConfigRecord({**asdict(base), **more})


def read_base(content: RecordDict) -> BaseInfo:
    """What `base_record` wrote; any exception for anything else."""
    about = content["base"]
    if not isinstance(about, ConfigRecord):
        raise TypeError(f"base is a {type(about).__name__}")
    return BaseInfo(_short(about["digest"]), _short(about["layout"]), int(str(about["bytes"])))


def info_content(info: ClientInfo, digest: str, base: int = 0) -> RecordDict:
    """The answer to the server's first query: the client, its text's digest, and its versions.

    `base`: bytes that a site has of the run's base weights.
    """
    size = MetricRecord({"tokens": info.tokens})
    who = ConfigRecord({"id": info.id, "digest": digest, "protocol": PROTOCOL, "base": base})
    return RecordDict({"size": size, "who": who, "versions": ConfigRecord({**versions()})})


def refusal_content(problems: Sequence[str]) -> RecordDict:
    """The answer to the server's first query of a client that cannot use the run's options."""
    return RecordDict({"refused": ConfigRecord({"problems": list(problems)})})


def read_info(message: Message) -> Introduction:
    """A node's answer to a query.

    Raises ConfigError where the client refuses the run's options, and any exception for a malformed
    answer, such as a client without text.
    """
    content = message.content
    if "refused" in content:
        problems = content.config_records["refused"]["problems"]
        if not isinstance(problems, list) or not problems:
            raise TypeError("a refusal without problems")
        raise ConfigError(one_line(str(one), MOST_REASON) for one in problems[:MOST_PROBLEMS])
    who, size = content.config_records["who"], content.metric_records["size"]
    tokens, base = int(str(size["tokens"])), int(str(who.get("base", 0)))
    if tokens < 1 or base < 0:
        raise ValueError("a client without text, or with less than nothing of the base weights")
    told = content.config_records["versions"] if "versions" in content else {}
    return Introduction(
        ClientInfo(_short(who["id"]), tokens),
        _short(who["digest"]),
        int(str(who.get("protocol", 0))),
        {name: one_line(str(told[name]), MOST_VERSION) for name in COMPARED if name in told},
        base,
    )


def _short(value: object) -> str:
    """A name of a client, which may send any; raises ValueError for a very long one, and for one
    with line breaks or control codes.
    """
    text = str(value)
    if len(text) > MOST_REASON or not text.isprintable():
        raise ValueError("a text that is no name")
    return text


# Records are read by name, because properties of a RecordDict (`array_records` and others) create a
# reference cycle, which would keep each large array in memory until the garbage collector runs.


def _config_text(content: RecordDict, name: str) -> str:
    record = content[name]
    if not isinstance(record, ConfigRecord):
        raise TypeError(f"{name} is a {type(record).__name__}")
    return str(record["json"])


def _update(content: RecordDict) -> tuple[str, np.ndarray]:
    """(header, array) of an update; raises UpdateRejected if the reply contains anything else."""
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
    return header, values_of(array)


def values_of(array: Array) -> np.ndarray:
    """The values of an array in a message, a read-only view; raises UpdateRejected.

    Flower's `numpy` copies them twice, and trusts what the array says of itself.
    """
    if isinstance(array, NdArray):  # from a process of this machine: an array in memory, no bytes
        return array.numpy()
    if array.stype != SType.NUMPY:
        raise UpdateRejected("bad_encoding", f"an array of stype {array.stype!r:.40}")
    return read_npy(array.data)


def _exactly(record: Mapping[str, object], *names: str) -> None:
    if missing := sorted(set(names) - set(record)):
        raise UpdateRejected("missing_key", ", ".join(missing))
    if extra := set(record) - set(names):
        raise UpdateRejected("extra_key", f"{len(extra)} keys besides {', '.join(names)}")


def _vector(content: RecordDict, name: str) -> np.ndarray:
    record = content[name]
    if not isinstance(record, ArrayRecord):
        raise TypeError(f"{name} is a {type(record).__name__}")
    return values_of(record[ARRAY])


def _job_json(job: Job) -> str:
    plan = plan_as_json(job.plan)
    about = {"client": job.client, "task": job.number, "version": job.version, "plan": plan}
    return json.dumps(about)
