"""The privacy ledger: a file that records the charge of every release.

A charge is written to disk with fsync before the release is made, and a restart refuses to continue
without the file. So a crash can lose a release that was charged, but never a charge.

A charge identifies its release by a tag, an HMAC of all inputs of the release. If the server
computes the same release again after a crash, the tag is the same and there is no second charge.
Another tag under the same number is another release, and both are charged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.privacy.accounting import Event, epsilon_of

FORMAT = 1
ROUNDING = 1e-9  # relative tolerance for an epsilon that was calibrated to meet the budget
REMEMBERED = 256  # newest releases whose tags are kept; repeating an older one is charged again


class BudgetExhausted(FedGPTError):
    """The next release would exceed the budget; nothing was charged."""


@dataclass(frozen=True)
class Release:
    """A release that was charged, and whose tag is still stored."""

    number: int  # number of the version (privacy=client) or of the job
    tag: str
    # client -> its share of one full charge, if each client is charged separately
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """The content of a ledger."""

    unit: str
    data: str  # digest of the text that is protected
    delta: float
    events: tuple[Event, ...] = ()  # releases for which every unit is charged
    releases: tuple[Release, ...] = ()  # the newest releases, for their tags
    # client -> number of full charges, if each client is charged separately
    spent: dict[str, float] = field(default_factory=dict)
    noise_multiplier: float = 0.0  # noise multiplier of one full charge of a client

    @property
    def total(self) -> tuple[Event, ...]:
        """All events; if each client is charged separately, the events of the client with most
        charges.
        """
        most = max(self.spent.values(), default=0.0)
        own = () if not most else (_full_charges(self.noise_multiplier, most),)
        return (*self.events, *own)

    @property
    def epsilon(self) -> float:
        """Epsilon of all releases so far, at `delta`."""
        return epsilon_of(self.total, self.delta)

    def within(self, planned: Event, more: Event) -> bool:
        """Whether the charged events and `more` are of the planned kind and do not exceed the
        plan.
        """
        kind = (planned.noise_multiplier, planned.sampling_probability)
        events = (*self.events, more)
        same = all((e.noise_multiplier, e.sampling_probability) == kind for e in events)
        return same and sum(e.count for e in events) <= planned.count


class Ledger:
    """One ledger file."""

    def __init__(self, path: Path, unit: str, data: str, delta: float, fresh: bool):
        """Open the ledger of `data`; create it if it is missing and `fresh`.

        Raises FedGPTError if it is missing without `fresh`, damaged, or belongs to other data.
        """
        self.path = path
        if path.exists():
            self.account = _read(path)
            account = self.account
            differing = {
                f"privacy={account.unit}, not {unit}": account.unit != unit,
                f"delta {account.delta:g}, not {delta:g}": account.delta != delta,
                "other text": account.data != data,  # no digest, which could confirm a guess
            }
            if what := [words for words, differs in differing.items() if differs]:
                raise FedGPTError(
                    f"{path} is the ledger of {' and '.join(what)}; start a new run in another"
                    " folder"
                )
        elif fresh:
            self.account = Account(unit, data, delta)
            self._write(self.account)
        else:
            raise FedGPTError(
                f"{path} is missing: the privacy loss so far is unknown, so nothing may be released"
            )

    def known(self, number: int, tag: str) -> bool:
        """Whether exactly this release was charged."""
        return any(
            (release.number, release.tag) == (number, tag) for release in self.account.releases
        )

    def made(self, number: int) -> bool:
        """Whether a release with this number was charged, with any tag.

        A later number proves it as well, because the tags of old releases are deleted.
        """
        return any(release.number >= number for release in self.account.releases)

    def spent_before(self, client: str, number: int) -> float:
        """Full charges of a client before release `number`.

        After a restart the releases from `number` on are made again, so they do not count.
        """
        later = sum(r.shares.get(client, 0.0) for r in self.account.releases if r.number >= number)
        return self.account.spent.get(client, 0.0) - later

    def charge(self, number: int, tag: str, event: Event, budget: float | None) -> None:
        """Charge a release before it is made.

        Raises BudgetExhausted if epsilon would exceed `budget`.
        """
        if self.known(number, tag):
            return
        events = added(self.account.events, event)
        account = replace(self.account, events=events, releases=self._noted(Release(number, tag)))
        self._check(account, budget)
        self._write(account)

    def charge_clients(
        self,
        number: int,
        tag: str,
        shares: Mapping[str, float],
        noise_multiplier: float,
        most: int,
        budget: float | None = None,
    ) -> None:
        """Charge a release in which each client has its own share, at most 1.

        Raises BudgetExhausted if the shares of a client over the run would exceed `most`, or the
        epsilon of the client with most charges would exceed `budget`.
        """
        if self.known(number, tag):
            return
        before = self.account.noise_multiplier
        if before not in (0.0, noise_multiplier):
            raise FedGPTError(
                f"{self.path} is for noise {before:g}, this run has {noise_multiplier:g}; start a"
                " new run in another folder"
            )
        spent = dict(self.account.spent)
        for client, share in shares.items():
            spent[client] = spent.get(client, 0.0) + share
            if spent[client] > most + 1e-9:
                raise BudgetExhausted(
                    f"client {client} would be charged for {spent[client]:.4g} releases,"
                    f" privacy.participations={most}"
                )
        releases = self._noted(Release(number, tag, dict(shares)))
        account = replace(
            self.account, spent=spent, releases=releases, noise_multiplier=noise_multiplier
        )
        self._check(account, budget)
        self._write(account)

    def note(self, number: int, tag: str) -> None:
        """Store the tag of a release that was charged as part of a series.

        Raises BudgetExhausted if this or a later release was made before, from another sum.
        """
        if self.known(number, tag):
            return
        if self.made(number):
            raise BudgetExhausted(
                f"release {number} of this series was made before, from another sum: a series of"
                " correlated noise cannot go back to an earlier version"
            )
        self._write(replace(self.account, releases=self._noted(Release(number, tag))))

    def _check(self, account: Account, budget: float | None) -> None:
        if budget is not None and (epsilon := account.epsilon) > budget * (1 + ROUNDING):
            raise BudgetExhausted(
                f"the next release would bring epsilon from {self.account.epsilon:.4g} to"
                f" {epsilon:.4g}, privacy.target_epsilon={budget:g}"
            )

    def _noted(self, release: Release) -> tuple[Release, ...]:
        return (*self.account.releases, release)[-REMEMBERED:]

    def _write(self, account: Account) -> None:
        charged = {"charged": [asdict(event) for event in account.events]}
        about = {
            "format": FORMAT,
            **asdict(account),
            **charged,
            "events": [asdict(e) for e in account.total],
        }
        write_text(
            self.path,
            json.dumps({**about, "sha256": digest_of(about)}, indent=1) + "\n",
            mode=PRIVATE,
        )
        self.account = account


def _read(path: Path) -> Account:
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if about.pop("sha256") != digest_of(about):
            raise ValueError("its digest does not match its content")
        if about.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        about["events"] = tuple(Event(**event) for event in about.pop("charged"))
        about["releases"] = tuple(Release(**release) for release in about["releases"])
        account = Account(**about)
        if not all(event.count >= 0 and event.noise_multiplier >= 0 for event in account.events):
            raise ValueError("it has negative numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FedGPTError(
            f"{path} is damaged ({error}): the privacy loss so far is unknown; start a new run in"
            " another folder"
        ) from error
    return account


def digest_of(about: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of the content of a file of charges, which that file has, too."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def added(events: tuple[Event, ...], more: Event) -> tuple[Event, ...]:
    """The events with one more; events of the same kind are merged into one."""
    kind = (more.noise_multiplier, more.sampling_probability)
    same = [
        event for event in events if (event.noise_multiplier, event.sampling_probability) == kind
    ]
    others = tuple(event for event in events if event not in same)
    return (*others, replace(more, count=more.count + sum(event.count for event in same)))


def _full_charges(noise_multiplier: float, charges: float) -> Event:
    """A fractional number of charges as an integer number with less noise each and the same mu."""
    count = max(1, int(-(-charges // 1)))
    return Event(noise_multiplier * (count / charges) ** 0.5, 1.0, count)
