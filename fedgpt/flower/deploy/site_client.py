"""A site's client: checks, limits, and the persistent node, until it is stopped.

SIGTERM   stops after the job under way, exit code 0
SIGINT    the same, exit code 130; a second signal of either kind ends the process at once
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType

from flwr.app import ConfigRecord, Context, Message, MessageType

from fedgpt.client.limits import limit_process
from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.core.errors import ConfigError, FedGPTError
from fedgpt.core.lines import one_line
from fedgpt.flower.deploy.doctor import Doctor, Finding, KitConnection
from fedgpt.flower.deploy.kit import Kit
from fedgpt.flower.deploy.node import App, PersistentNode
from fedgpt.flower.deploy.site_app import site_app
from fedgpt.flower.run_config import options_of_server_run

INTERRUPTED = 130
LONGEST = 200  # characters of a server's text in a line of the log
log = logging.getLogger(__name__)


class NotReady(FedGPTError):
    """A check has failed that waiting does not mend."""


@dataclass(frozen=True)
class Ready:
    """A site that has passed the checks: its kit, and the host to connect to."""

    kit: Kit
    host: str


def preflight(kit: str, site: Site, policy: Policy) -> Ready:
    """Run the checks and log each of them.

    What waiting may mend, such as a server that is not there yet, is a warning. For the first of
    the others it raises ConfigError if an option is wrong, and otherwise NotReady.
    """
    doctor = Doctor(kit, site, policy)
    for finding in doctor.findings(key=False):
        _log(finding)
        if finding.typed:
            raise ConfigError(finding.problem)
        if finding.problem and not finding.passing:
            raise NotReady(f"{finding.about}: {finding.problem}")
    assert doctor.kit is not None, "otherwise the first check has failed"
    return Ready(doctor.kit, doctor.host)


def run(ready: Ready, site: Site, policy: Policy) -> int:
    """Answer the server's messages until a signal; returns the exit code.

    Raises NotAccepted if the server does not accept the client, and ConfigError for limits that
    this machine cannot hold.
    """
    if limits := limit_process(policy):
        log.info("memory: %s", limits)
    log.info(
        "connecting to %s, port %d, as %s; the fingerprint of its CA is %s",
        *(ready.host, ready.kit.approval.port, site.name, ready.kit.approval.ca_fingerprint),
    )
    app = site_app(replace(site, server=ready.kit.approval.ca_fingerprint), policy)
    node = PersistentNode(KitConnection(ready.kit, ready.host), JobLog(app), {})
    with _stopped_by_signals(node) as received:
        node.run()
    log.info("stopped")
    return INTERRUPTED if received[:1] == [signal.SIGINT] else 0


class JobLog:
    """An app that writes a line for each job that `app` has done."""

    def __init__(self, app: App):
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """Pass a message on, and log what it was."""
        began = time.monotonic()
        asked = message.metadata.message_type == MessageType.QUERY
        if asked:
            log.info("a run asks who this is: %s", _run_name(context))
        reply = self._app(message, context)
        if asked and reply.has_content():
            log.info("%s: answered in %.2f s", _run_name(context), time.monotonic() - began)
        if message.metadata.message_type == MessageType.TRAIN and reply.has_content():
            log.info(
                "%s: %s in %.2f s", _run_name(context), _job(message), time.monotonic() - began
            )
        return reply


def _run_name(context: Context) -> str:
    try:
        return f"run {one_line(options_of_server_run(context.run_config).name, LONGEST)}"
    except FedGPTError:  # which the app reports
        return "a run whose options cannot be read"


def _job(message: Message) -> str:
    record = message.content["job"]  # by name: `config_records` would keep the model in memory
    assert isinstance(record, ConfigRecord), "the app has read it"
    about = json.loads(str(record["json"]))
    job = f"job {about['task']}, version {about['version']}, {about['plan']['steps']} steps"
    return one_line(job, LONGEST)


def _log(finding: Finding) -> None:
    log.log(logging.WARNING if finding.problem else logging.INFO, "%s", finding)


@contextmanager
def _stopped_by_signals(node: PersistentNode) -> Iterator[list[int]]:
    """Stop the node at a signal; yields the list of those that came."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        log.info("stopping after the job under way; a second signal ends it at once")
        node.stop()

    before = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
