"""What keeps a site from its server: checks one after the other, each with one line.

    kit -> server of the policy -> name -> proxy -> port -> TLS -> link -> clock -> end -> key
    text, state, cache

`fedgpt doctor` runs all of them, and `fedgpt client` all but the key's, because it connects itself.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

from fedgpt.client.limits import LEAST_FREE, free_bytes
from fedgpt.client.policy import Policy
from fedgpt.client.site import Site
from fedgpt.core.errors import ConfigError, FedGPTError, amount
from fedgpt.core.lines import one_line
from fedgpt.data.corpus import corpus_of
from fedgpt.flower.deploy import probe
from fedgpt.flower.deploy.connection import FleetConnection
from fedgpt.flower.deploy.folder import SOON
from fedgpt.flower.deploy.kit import Kit, read_kit
from fedgpt.flower.deploy.node import reason_of
from fedgpt.flower.deploy.probe import Wrong

# seconds by which the clocks may differ: Flower refuses a signature that is older, or newer
SLOW, FAST = TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE, SYSTEM_TIME_TOLERANCE
log = logging.getLogger(__name__)
REVOKED = "not approved there, or it was revoked"


@dataclass(frozen=True)
class Finding:
    """The result of one check: `problem` is empty where all is well."""

    about: str
    found: str = ""
    problem: str = ""
    passing: bool = False  # whether waiting may mend the problem
    warning: bool = False  # whether the client can work all the same
    typed: bool = False  # whether an option or a value of the policy is wrong

    def __str__(self) -> str:
        state = "ok" if not self.problem else "warning" if self.warning else "WRONG"
        return f"{self.about:<8} {state:<8} {self.problem or self.found}"


class Doctor:
    """The checks of a kit, its server and a site, in order; a check that needs another one that
    fails is left out.
    """

    def __init__(self, kit: str | Path, site: Site | None = None, policy: Policy | None = None):
        """Without `site` the text and the folders are not looked at."""
        self._path, self._site, self._policy = kit, site, policy or Policy()
        self.kit: Kit | None = None
        self.host = ""  # the host of the server to connect to

    def findings(self, key: bool = True) -> Iterator[Finding]:
        """The results, each as soon as it is known; with `key` the client connects for a moment."""
        yield from self._server(key)
        if self._site is not None:
            yield self._checked("text", self._text)
            state, cache = self._site.state_dir, self._site.cache_dir
            yield self._checked("state", lambda: _room(Path(state)))
            yield self._checked("cache", lambda: _room(Path(cache)))

    def _server(self, key: bool) -> Iterator[Finding]:
        yield (found := self._checked("kit", self._kit))
        if self.kit is None or found.problem:
            return
        yield (found := self._checked("name", self._name))
        if found.problem:
            return
        if proxy := probe.proxy_for(self.host):
            yield Finding("proxy", f"connects through {proxy} ({probe.proxy_variable()})")
        yield (found := self._checked("port", self._port))
        if found.problem:
            return
        try:
            answer = probe.ask(self.host, self.kit.approval.port, self.kit.approval)
        except Wrong as wrong:
            yield Finding("TLS", "", str(wrong), wrong.passing)
            return
        yield Finding("TLS", f"the server has a certificate of the CA {self._ca}")
        yield (found := self._checked("link", lambda: _link(answer)))
        if found.problem:
            return
        yield (clock := self._checked("clock", lambda: _clock(answer.date)))
        yield _end(answer.certificate)
        if key and not clock.problem:
            yield self._checked("key", self._key)

    @property
    def _ca(self) -> str:
        assert self.kit is not None, "it was read first"
        return self.kit.approval.ca_fingerprint

    def _checked(self, about: str, check: Callable[[], str]) -> Finding:
        try:
            return Finding(about, check())
        except ConfigError as error:
            return Finding(about, "", "; ".join(error.problems), typed=True)
        except Wrong as wrong:
            return Finding(about, "", str(wrong), wrong.passing)
        except FedGPTError as error:
            return Finding(about, "", str(error))

    def _kit(self) -> str:
        self.kit = read_kit(self._path)
        approval = self.kit.approval
        self._policy.refuse_server(approval.ca_fingerprint)
        return f"{self.kit.name}, approved by the server {approval.address}"

    def _name(self) -> str:
        """Find the first host that is known, and whose port is open if there are several."""
        assert self.kit is not None, "it was read first"
        approval, first = self.kit.approval, None
        for host in approval.hosts:
            self.host = host
            try:
                # behind a proxy it is the proxy that looks the name up
                known = [] if probe.proxy_for(host) else probe.addresses_of(host, approval.port)
                if len(approval.hosts) > 1:
                    probe.connect(host, approval.port).close()
                return f"{host} is {', '.join(known) or 'for the proxy to look up'}"
            except Wrong as wrong:
                first = first or (host, wrong)
        assert first is not None, "an approval has a host"
        self.host = first[0]
        raise first[1]

    def _port(self) -> str:
        assert self.kit is not None, "it was read first"
        probe.check_proxies()
        probe.connect(self.host, self.kit.approval.port).close()
        return f"{self.host}, port {self.kit.approval.port}, accepts connections"

    def _key(self) -> str:
        assert self.kit is not None, "it was read first"
        connection = KitConnection(self.kit, self.host)
        try:
            connection.activate()
            connection.deactivate()
        except httpx.HTTPStatusError as error:
            raise Wrong(self._why_refused(reason_of(error))) from None
        except httpx.HTTPError as error:
            raise Wrong(reason_of(error), passing=True) from None
        finally:
            connection.close()
        return "the server accepts it"

    def _why_refused(self, reason: str) -> str:
        if "unknown_key" in reason:
            return (
                f"the key of this kit is {REVOKED} ({reason}); ask the operator, and make a new"
                " request if it was revoked"
            )
        if "clock" in reason or "no_credentials" in reason:
            return reason
        return (
            f"a client with this kit is connected already, or was killed within the last minute"
            f" ({reason}); stop the other one, or try again in a minute"
        )

    def _text(self) -> str:
        assert self._site is not None, "it was asked about"
        try:
            documents = [len(one.text.encode()) for one in corpus_of(self._site.corpus).documents()]
        except ConfigError as error:
            raise ConfigError(as_typed(problem) for problem in error.problems) from None
        found = f"{amount(len(documents), 'document')}, {amount(sum(documents), 'byte')}"
        return f"{found}: {self._site.corpus.path}"


class KitConnection(FleetConnection):
    """The connection of a kit's client to its server: to `host`, or to another of its hosts where
    that one is not reached.
    """

    def __init__(self, kit: Kit, host: str):
        port = kit.approval.port
        hosts = [host, *(one for one in kit.approval.hosts if one != host)]
        addresses = [f"[{one}]:{port}" if ":" in one else f"{one}:{port}" for one in hosts]
        self._addresses, self._first = itertools.cycle(addresses), addresses[0]
        self._address = next(self._addresses)
        super().__init__(self._address, kit.private_key, kit.approval.ca.encode())

    def activate(self) -> int:
        """Connect; where nobody answers, the next attempt is at the next host."""
        try:
            node = super().activate()
        except (httpx.ConnectError, httpx.ConnectTimeout):
            self._address = next(self._addresses)
            self.move(self._address)
            raise
        if self._address != self._first:
            log.info("the server is reached at %s", self._address)
        return node


def as_typed(problem: str) -> str:
    """A problem of corpus=files, with the names that a site types."""
    return problem.replace("corpus.path=", "--text ").replace("corpus.", "text.")


def _link(answer: probe.Answer) -> str:
    """Whether fedgpt's guard has answered: it refuses a request without credentials as JSON."""
    try:
        detail = str(json.loads(answer.body)["detail"])
    except (ValueError, KeyError, TypeError):
        detail = ""
    if answer.status in (401, 503) and detail:
        return f"fedgpt's server answers ({one_line(detail.partition(':')[0], 40)})"
    raise Wrong(
        f"the server answers with status {answer.status}, and not as fedgpt's: another program has"
        " this port, such as a web server; ask the operator for the port"
    )


def _clock(date: datetime | None) -> str:
    if date is None:
        return "the server does not tell its time"
    behind = probe.seconds_behind(date)
    if behind > SLOW or behind < -FAST - 1:  # the header has whole seconds
        raise Wrong(f"{probe.clocks(date)}; set it (by NTP), as signatures have a time")
    return f"differs from the server's by {abs(behind):.0f} s"


def _end(certificate: x509.Certificate) -> Finding:
    end = certificate.not_valid_after_utc
    days = (end - datetime.now(UTC)).days
    found = f"the certificate is valid until {end:%Y-%m-%d}"
    if days >= SOON:
        return Finding("end", found)
    why = f"the server's certificate ends in {days} days ({end:%Y-%m-%d}); ask the operator for:"
    return Finding("end", found, f"{why} fedgpt keys renew", passing=True, warning=True)


def _room(folder: Path) -> str:
    """The free space of a folder, which may not exist yet; raises Wrong."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise Wrong(f"{folder} cannot be written; choose another folder, or change its owner")
    free = free_bytes(there)
    if free < LEAST_FREE:
        raise Wrong(
            f"{folder} has {free / 2**20:.0f} MiB left, and needs {LEAST_FREE >> 20}; make room"
            " there, or choose a folder on another disk"
        )
    return f"{folder} has {free / 2**30:.1f} GiB left"
