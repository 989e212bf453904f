"""A persistent client: one process that answers the messages of a server until it is stopped.

Flower's SuperNode starts a Python process for each message, which takes seconds. This one keeps the
text, the model and its buffers in memory. It never asks for code: what it does is the ClientApp
that is installed here.

    connect -> wait for a message -> answer it -> upload the answer
       ^______________________________________________________|
    server away: the connection is tried again, with a growing pause; each reason is logged once

What ends a client that the server has accepted before is only what no waiting mends: a key that is
not approved any more, a certificate of another server, or a refusal that this version does not
know. Clocks that differ and a certificate whose time is over are waited for, as a lost connection.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.error import FlowerError
from flwr.supercore.task_identity import TaskIdentity

from fedgpt.client.policy import PolicyRefused
from fedgpt.core.errors import FedGPTError
from fedgpt.core.lines import one_line
from fedgpt.flower.deploy import probe
from fedgpt.flower.deploy.connection import FleetConnection, Upload, UploadEnded, passes
from fedgpt.flower.messages import MOST_REASON

App = Callable[[Message, Context], Message]  # such as a ClientApp
Found = TypeVar("Found")
HEARTBEAT_SECONDS = 12.0  # the server gives a client up after 30 seconds without one, at least
SHORTEST, LONGEST = 0.05, 0.5  # pause between two questions for messages: after one, and when idle
MOST_PAUSE = 20.0  # longest pause between two attempts to connect
# the server counts a client that was killed as connected for a minute, and refuses its restart
RESTART_SECONDS = 90.0
# reasons of the guard for which it is no use to wait at the start
UNKNOWN_KEY, CLOCK = " unknown_key: ", " clock: "
TOO_LARGE, UNAUTHORIZED = httpx.codes.REQUEST_ENTITY_TOO_LARGE, httpx.codes.UNAUTHORIZED
log = logging.getLogger(__name__)


class NotAccepted(FedGPTError):
    """The server does not accept this client."""


class PersistentNode:
    """Answers the messages of one server with `app` until it is stopped."""

    def __init__(self, connection: FleetConnection, app: App, config: Mapping[str, Any]):
        """`config`: what a SuperNode gets as --node-config."""
        self._connection, self._app, self._config = connection, app, dict(config)
        # not an Event, whose lock a signal handler may find taken by the code that it interrupts
        self._stopped = False
        self._accepted = False  # whether the server has accepted this client once
        self._contexts: dict[int, Context] = {}  # of the newest run
        self._told: set[str] = set()  # why the server does not respond, as the log has it

    def run(self) -> None:
        """Connect and answer messages until `stop`; raises NotAccepted."""
        try:
            node = self._activate()
            if node is None:
                return
            self._accepted = True
            log.info("connected; waiting for jobs")
            TaskIdentity.node_id, TaskIdentity.task_id = node, 1
            with self._heartbeats():
                self._answer_messages(node)
            with suppress(httpx.HTTPError):  # the server notices it later by itself
                self._connection.deactivate()
        finally:
            self._connection.close()

    def stop(self) -> None:
        """Let `run` return after the message under way; for other threads and signal handlers."""
        self._stopped = True

    def _pause(self, seconds: float) -> bool:
        """Wait, unless `stop` is called; whether it was."""
        end = time.monotonic() + seconds
        while not self._stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, SHORTEST))
        return self._stopped

    def _activate(self) -> int | None:
        deadline = time.monotonic() + RESTART_SECONDS
        while not self._stopped:
            try:
                return self._persist(self._connection.activate)
            except httpx.HTTPStatusError as error:
                why = reason_of(error)
                waits = error.response.status_code == httpx.codes.PRECONDITION_FAILED
                if not waits or any(reason in why for reason in (UNKNOWN_KEY, CLOCK)):
                    raise NotAccepted(why) from error
                if time.monotonic() > deadline:
                    raise NotAccepted(
                        "the server does not accept this client: its key is not approved there, or"
                        " a client with the same key is connected already"
                    ) from error
                self._tell("the server may still count an earlier start of this client")
                self._pause(5.0)
        return None

    def _answer_messages(self, node: int) -> None:
        pause = SHORTEST
        while not self._stopped:
            asked = time.monotonic()
            try:
                message = self._persist(self._connection.receive)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.FORBIDDEN:  # a key that was revoked
                    raise NotAccepted(reason_of(error)) from error
                log.warning("a job was not read: %s", reason_of(error))  # its run is over
                self._pause(LONGEST)
                continue
            except NotAccepted:
                raise
            except Exception as error:  # of an answer that is not Flower's
                log.warning("the server's answer cannot be read (%s)", type(error).__name__)
                self._pause(LONGEST)
                continue
            if message is None:  # a guard of this package has let the question wait
                self._pause(pause - (time.monotonic() - asked))
                pause = min(LONGEST, 1.1 * pause)
                continue
            pause = SHORTEST
            self._answer(message, node)

    def _answer(self, message: Message, node: int) -> None:
        began = time.monotonic()
        TaskIdentity.run_id = message.metadata.run_id
        try:
            reply = self._reply(message, node)
            seconds = time.monotonic() - began
            upload = self._announced(message, reply, seconds)
            while upload is not None and self._persist(lambda: self._connection.upload(upload)):
                pass
        except UploadEnded:
            log.warning("the server does not want the last reply any more")
        except httpx.HTTPStatusError as error:
            # its run is over, or it turned out to be too large
            if error.response.status_code not in (httpx.codes.FORBIDDEN, TOO_LARGE):
                raise NotAccepted(reason_of(error)) from error
            log.warning("the last reply was not taken: %s", reason_of(error))

    def _reply(self, message: Message, node: int) -> Message:
        """The app's reply, or an error without which the server would wait for the job."""
        if message.has_error():  # it could not be read
            return Message(message.error, reply_to=message)
        context = self._context(message.metadata.run_id, node)
        try:
            return self._app(message, context)
        except Exception as error:  # the app has made its message safe to tell
            if isinstance(error, PolicyRefused):
                log.warning("refused: %s", one_line(str(error), MOST_REASON))
            elif isinstance(error, FedGPTError):
                log.warning("a job failed: %s", one_line(str(error), MOST_REASON))
            else:
                log.exception("a job failed")
            failure = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, repr(error))
            return Message(failure, reply_to=message)

    def _announced(self, message: Message, reply: Message, seconds: float) -> Upload | None:
        """A reply that was announced; an error instead of one that the server finds too large."""
        try:
            return self._persist(lambda: self._connection.announce(reply, seconds))
        except httpx.HTTPStatusError as error:
            if error.response.status_code != TOO_LARGE:
                raise
            why = (
                f"the reply is too large ({reason_of(error)}); the server's operator can allow a"
                " larger one with: fedgpt server DIR --reply-objects N"
            )
        log.warning(why)
        # without an answer the server would wait for the job
        failure = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, why), reply_to=message)
        return self._persist(lambda: self._connection.announce(failure, seconds))

    def _context(self, run_id: int, node: int) -> Context:
        if run_id not in self._contexts:
            config: dict[str, Any] = (
                self._persist(lambda: self._connection.run_config(run_id)) or {}
            )
            self._contexts = {run_id: Context(run_id, node, self._config, RecordDict(), config)}
        return self._contexts[run_id]

    def _persist(self, request: Callable[[], Found]) -> Found | None:
        """The request's answer, however long the server is away; None if it is away once `stop` was
        called. One attempt is made in any case, so that the reply to the job under way arrives.

        Raises NotAccepted where it is no use to wait, and HTTPStatusError for a refusal.
        """
        pause, doubted = SHORTEST, False
        while True:
            try:
                answer = request()
            except httpx.HTTPStatusError as error:
                why = reason_of(error)
                unknown = self._accepted and error.response.status_code == UNAUTHORIZED
                if unknown and CLOCK in why:
                    self._tell(why, CLOCK)  # once, whatever the seconds are
                elif unknown and UNKNOWN_KEY not in why and not doubted:
                    # of Flower, to a question that waited there while a clock was set: the next
                    # answer is the guard's, and has the reason
                    doubted = True
                elif passes(error):
                    self._tell(why)
                else:
                    raise
            except httpx.TransportError as error:
                if hopeless(error, self._accepted):
                    raise NotAccepted(reason_of(error)) from error
                self._tell(reason_of(error))
            else:
                if self._told:
                    log.warning("the server responds again")
                    self._told.clear()
                return answer
            if self._pause(pause):
                return None
            pause = min(MOST_PAUSE, 2 * pause)

    def _tell(self, why: str, reason: str = "") -> None:
        """Log why the server is not reached, once for each reason, or else for each text."""
        if (reason or why) not in self._told:
            log.warning("%s; trying again", why)
            self._told.add(reason or why)

    def _heartbeats(self) -> _Heartbeats:
        return _Heartbeats(self._connection)


class _Heartbeats:
    """A thread that tells the server that this client is alive, also while it trains."""

    def __init__(self, connection: FleetConnection):
        self._connection, self._ended = connection, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5.0)

    def _beat(self) -> None:
        told = False  # why the server hears nothing, once until it hears again
        while not self._ended.wait(HEARTBEAT_SECONDS):
            try:
                self._connection.heartbeat()
                told = False
            except httpx.HTTPError:
                pass  # the other thread says what is wrong
            except Exception as error:  # without heartbeats the server gives this client up
                if not told:
                    log.warning("a heartbeat failed (%s); trying again", type(error).__name__)
                told = True


def hopeless(error: httpx.TransportError, accepted: bool) -> bool:
    """Whether waiting cannot mend an error: the server's certificate is not the expected one.

    Where the server has `accepted` the client before, it can be that of a time: it is renewed, or a
    clock is set.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return not (accepted and cause.verify_code in (probe.NOT_YET, probe.EXPIRED))
        cause = cause.__cause__ or cause.__context__
    return False


def reason_of(error: httpx.HTTPError) -> str:
    """Why a request failed, in one line."""
    if isinstance(error, httpx.HTTPStatusError):
        # not by its `text`, for which the server names the coding, which may unpack it
        told = FlowerError.from_json(error.response.content.decode(errors="replace"))
        about = f": {told.message}" if told else ""
        why = f"the server refuses with status {error.response.status_code}{about}"
    else:
        why = f"the server does not respond ({error or type(error).__name__})"
    return one_line(why, MOST_REASON)
