"""What a site has spent of its privacy: one file over all runs and servers.

A run's own ledger (privacy/ledger.py) goes with the folder of its state, and knows one run. This
file counts every release of the site, is charged before each of them, and stays.

    releases to which this site adds the noise     composed exactly: the events of all runs
    privacy=client, where the server adds it       epsilon and delta of each run are added up, and
                                                   counted again for more jobs than they are for

The composition holds for a passage of the site's text that is inside one block in each run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedgpt.client.policy import PolicyRefused, PrivacyLimits
from fedgpt.core.errors import FedGPTError
from fedgpt.core.files import PRIVATE, is_there, write_text
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.ledger import ROUNDING, added, digest_of

FILE = "privacy.json"
MARKER = "privacy.begun"  # tells that FILE has existed
BEGUN = f"This site has made private releases. {FILE} counts them, and none is made without it.\n"
FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promise:
    """What a run with privacy=client promises a site for its jobs."""

    epsilon: float
    delta: float
    jobs: int  # largest number of jobs for which it holds
    settings: str = ""  # digest of the options that have an effect on a job


@dataclass(frozen=True)
class Promised:
    """What the jobs of one run with privacy=client have been charged."""

    promise: Promise  # the newest one
    epsilon: float  # all its charges together
    delta: float
    left: int = 0  # further jobs for which the newest promise holds
    job: str = ""  # digest of the last job: it may be repeated

    def allows(self, promise: Promise, job: str) -> bool:
        """Whether a job of this promise is charged already."""
        return promise == self.promise and (job == self.job or self.left > 0)


@dataclass(frozen=True)
class Spent:
    """The releases of a site, and what the runs with privacy=client have promised it."""

    events: tuple[Event, ...] = ()
    promised: dict[str, Promised] = field(default_factory=dict)  # by server and id of the run

    def epsilon(self, delta: float) -> float:
        """Epsilon of everything together at `delta`; inf if the runs' deltas are more than that."""
        left = delta - sum(each.delta for each in self.promised.values())
        if left < 0 or (left == 0 and self.events):
            return float("inf")
        own = epsilon_of(self.events, left) if self.events else 0.0
        return own + sum(each.epsilon for each in self.promised.values())

    def within(self, other: Spent) -> bool:
        """Whether nothing here is more than in `other`."""
        counts = {(e.noise_multiplier, e.sampling_probability): e.count for e in other.events}
        charges = {run: (each.epsilon, each.delta) for run, each in self.promised.items()}
        known = {run: (each.epsilon, each.delta) for run, each in other.promised.items()}
        return charges == known and all(
            e.count <= counts.get((e.noise_multiplier, e.sampling_probability), 0)
            for e in self.events
        )


class SiteAccount:
    """The file `privacy.json` in the folder of a site's state.

    Every charge raises PolicyRefused, and charges nothing, if the site's limit does not allow it.
    """

    def __init__(self, folder: str | Path, limits: PrivacyLimits, server: str = ""):
        """`server`: fingerprint of the server's CA, as servers choose the ids of their runs."""
        self.path, self._limits, self._server = Path(folder) / FILE, limits, server
        self._allowed = Spent()  # known to be within the limit

    def begin(self) -> None:
        """Make the file if this site has made no release yet."""
        with self._open() as spent:
            if not self.path.exists():
                self._write(spent)

    def charge(self, event: Event, planned: Event) -> None:
        """Charge releases before they are made; `planned`: these and all later ones of the run."""
        with self._open() as before:
            after = replace(before, events=added(before.events, event))
            whole = replace(before, events=added(before.events, planned))
            self._check(before, after, whole)
            self._write(after)

    def charge_job(self, run: str, promise: Promise, job: str) -> None:
        """Charge a run with privacy=client, with all that it promises, for as many jobs as that
        holds for.

        `job` identifies the job with all that it starts from. The site sees neither the noise nor
        the other jobs of the run: what is beyond the promise, or has another one, is charged as
        another run would be, even if it has the same id.
        """
        with self._open() as before:
            name = f"{self._server} {run}".strip()
            known = before.promised.get(name)
            if known is not None and known.allows(promise, job):
                left = known.left - (job != known.job)
                now = replace(known, left=left, job=job)
            else:
                spent = (known.epsilon, known.delta) if known else (0.0, 0.0)
                charges = spent[0] + promise.epsilon, spent[1] + promise.delta
                now = Promised(promise, *charges, promise.jobs - 1, job)
            after = replace(before, promised={**before.promised, name: now})
            self._check(before, after, after)
            self._write(after)

    def read(self) -> Spent:
        """What was spent; raises FedGPTError for a file that is damaged, or lost.

        A site with the marker, or with ledgers of runs, has had this file. Runs with
        privacy=client have no ledger, and an account of an earlier version of fedgpt no marker.
        """
        if not is_there(self.path):
            marker = self.path.with_name(MARKER)
            ledgers = sorted(self.path.parent.glob("runs/**/ledger.json"))
            if proof := [marker] if is_there(marker) else ledgers:
                raise FedGPTError(
                    f"{self.path} is missing, and the site has made releases ({proof[0]}): put"
                    " the file back from a backup"
                )
            return Spent()
        try:
            about: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if about.pop("sha256") != digest_of(about) or about.pop("format") != FORMAT:
                raise ValueError("its digest or its format is another")
            events = tuple(Event(**event) for event in about["events"])
            promised = {
                run: Promised(Promise(**each.pop("promise")), **each)
                for run, each in about["promised"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FedGPTError(
                f"{self.path} is damaged ({error}), and what the site has spent is unknown: put the"
                " file back from a backup"
            ) from error
        return Spent(events, promised)

    def _check(self, before: Spent, after: Spent, whole: Spent) -> None:
        """Raise PolicyRefused unless `after` is within the limit.

        If `whole` is, too, nothing has to be computed for the later charges of the same run.
        """
        most, delta = self._limits.most_epsilon, self._limits.delta
        if most is None or delta is None or after.within(self._allowed):
            return
        for wanted in (whole, after):
            if wanted.epsilon(delta) <= most * (1 + ROUNDING):
                self._allowed = wanted
                return
        log.warning(
            "refused: the job would bring epsilon at this site from %.4g to %.4g at delta %g, and"
            " privacy.most_epsilon is %g",
            *(before.epsilon(delta), after.epsilon(delta), delta, most),
        )
        # without the numbers, which depend on the amount of the site's text
        raise PolicyRefused(
            f"privacy.most_epsilon={most:g} for all runs together",
            "and what is left of it is not enough for the job",
        )

    @contextmanager
    def _open(self) -> Iterator[Spent]:
        """What was spent, while no other client of this site charges."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{FILE}.lock"), mode=PRIVATE):
            yield self.read()

    def _write(self, spent: Spent) -> None:
        about = {
            "format": FORMAT,
            "events": [asdict(event) for event in spent.events],
            "promised": {run: asdict(each) for run, each in spent.promised.items()},
        }
        text = json.dumps({**about, "sha256": digest_of(about)}, indent=1) + "\n"
        write_text(self.path, text, mode=PRIVATE)
        # before the release that was charged; not before the file, which a crash in between would
        # make a lost one
        if not is_there(marker := self.path.with_name(MARKER)):
            write_text(marker, BEGUN, mode=PRIVATE)
