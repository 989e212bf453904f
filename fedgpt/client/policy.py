"""A site's policy: what its owner lets a server ask of it, from one YAML file of the site.

Nothing that a server sends changes the policy. A request beyond it is refused with a reason for
both sides, which has only what the server asked and what the policy says, and nothing of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from fedgpt.core.errors import ForServer
from fedgpt.core.messages import Job
from fedgpt.core.options import CorpusOptions, RunOptions
from fedgpt.core.options.option import (
    Allowed,
    above,
    at_least,
    one_of,
    option,
    typed,
)
from fedgpt.local.schedule import tokens_per_step

FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
UNITS = ("none", "example", "client", "local")
AGAIN_SECONDS = 3600.0  # after which a server may ask a site again: its owner may have changed it
HOURS = re.compile(r"(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})")
DAY = 24 * 60  # minutes


class PolicyRefused(ForServer):
    """A request is beyond the site's policy."""

    def __init__(self, limit: str, asked: str, again: float = AGAIN_SECONDS):
        """`limit`: key and value as in the policy; `again`: seconds until the next attempt may be
        of use.
        """
        super().__init__(
            f"the site's policy has {limit}, {asked}; it may be asked again in {again:.0f} s"
        )


def _named(words: str) -> Allowed:
    return Allowed(f"a list of at least one {words}, or left out for all", bool)


@dataclass(frozen=True)
class PrivacyLimits:
    """The least privacy under which a site trains."""

    units: list[str] | None = option(
        None,
        "Units of privacy under which the site takes part.",
        allowed=Allowed(
            f"a list of at least one of {', '.join(UNITS)}, or left out for all",
            lambda value: bool(value) and set(value) <= set(UNITS),
        ),
    )
    most_epsilon: float | None = option(
        None,
        "Largest epsilon of all private runs of this site together, of any server.",
        allowed=above(0, most=10**6),
    )
    delta: float | None = option(
        None,
        "Delta of most_epsilon.",
        allowed=Allowed("at least 1e-300 and below 1", lambda value: 1e-300 <= value < 1),
    )


@dataclass(frozen=True)
class Policy:
    """The limits of a site; without a file there are none but those of every site."""

    servers: list[str] | None = option(
        None,
        "Fingerprints of the CAs of the servers that the site accepts.",
        allowed=Allowed(
            "a list of fingerprints SHA256:..., as the kit's approval has one",
            lambda value: bool(value) and all(map(FINGERPRINT.fullmatch, value)),
        ),
    )
    runs: list[str] | None = option(
        None, "Names of runs (name=) in which the site takes part.", allowed=_named("run's name")
    )
    tasks: list[str] | None = option(
        None, "Learning problems (task=) for which the site trains.", allowed=_named("task")
    )
    most_steps: int | None = option(
        None, "Largest number of local steps of a job.", allowed=at_least(1)
    )
    most_tokens: int | None = option(
        None, "Largest number of tokens that a job trains on.", allowed=at_least(1)
    )
    hours: str | None = option(
        None,
        "Hours of the day, in local time, in which the site works, such as 20:00-06:00.",
        allowed=Allowed("from-to, such as 20:00-06:00", lambda value: _hours(value) is not None),
    )
    device: str = option(
        "auto",
        "Device on which the site trains. auto: a GPU if one is available.",
        allowed=one_of("auto", "cpu", "cuda"),
    )
    memory: float | None = option(
        None,
        "Share of the memory that the site's process may use: of the GPU's if it trains on a GPU,"
        " of the machine's otherwise.",
        allowed=above(0, most=1),
    )
    threads: int | None = option(
        None, "Number of PyTorch threads of the site.", allowed=at_least(1, end=4096)
    )
    text: CorpusOptions = field(default_factory=lambda: CorpusOptions(name="files", client="file"))
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)

    def refuse_server(self, fingerprint: str) -> None:
        """Raise PolicyRefused for a server with another CA than the policy names."""
        if self.servers is not None and fingerprint not in self.servers:
            raise PolicyRefused(_said("servers", self.servers), f"and the CA is {fingerprint}")

    def refuse_options(self, options: RunOptions) -> None:
        """Raise PolicyRefused if the site takes no part in this run at any hour."""
        for limit, asked in self._run_problems(options):
            raise PolicyRefused(limit, f"and the server asks for {asked}")

    def refuse_run(self, options: RunOptions, now: datetime) -> None:
        """Raise PolicyRefused if the site takes no part in this run, or not at this hour.

        `now` is in local time.
        """
        self.refuse_options(options)
        self._refuse_hour(now)

    def refuse_job(self, options: RunOptions, job: Job, now: datetime) -> None:
        """Raise PolicyRefused for a job of a run that `refuse_run` refuses, or that is too large.

        What the job costs in privacy is a matter of the site's account.
        """
        self.refuse_run(options, now)
        steps = job.plan.local_steps
        asked = (
            ("most_steps", self.most_steps, steps, "steps"),
            ("most_tokens", self.most_tokens, steps * tokens_per_step(options), "tokens"),
        )
        for key, most, number, noun in asked:
            # not `number > most`, which NaN passes: a server may send any number
            if most is not None and not number <= most:
                raise PolicyRefused(
                    f"{key}={most}", f"and the server asks for a job of {number} {noun}"
                )

    def _run_problems(self, options: RunOptions) -> Iterator[tuple[str, str]]:
        """(the limit, what the server asks) of all that is beyond the policy."""
        for key, allowed, asked in (
            ("runs", self.runs, ("name", options.name)),
            ("tasks", self.tasks, ("task", options.task.name)),
            ("privacy.units", self.privacy.units, ("privacy", options.privacy.unit)),
        ):
            if allowed is not None and asked[1] not in allowed:
                yield _said(key, allowed), "=".join(asked)
        yield from self._privacy_problems(options)

    def _privacy_problems(self, options: RunOptions) -> Iterator[tuple[str, str]]:
        limits, asked = self.privacy, options.privacy
        demands = limits.units is not None and "none" not in limits.units
        said = _said("privacy.units", limits.units)
        if limits.most_epsilon is not None:
            demands, said = True, f"privacy.most_epsilon={limits.most_epsilon:g}"
            if asked.unit == "none":
                yield said, "privacy=none, which has no limit"
            elif asked.unit == "client" and (asked.target_epsilon is None or asked.delta is None):
                # the server adds the noise, so the site can count only what the run promises
                yield said, "privacy=client without privacy.target_epsilon and privacy.delta"
        if demands and asked.unit != "none" and asked.rng != "secure":
            yield said, f"privacy.rng={asked.rng}, whose noise the server knows"

    def _refuse_hour(self, now: datetime) -> None:
        if self.hours is None:
            return
        begin, end = _hours(self.hours) or (0, DAY)
        minute = now.hour * 60 + now.minute
        if not (begin <= minute < end if begin < end else minute >= begin or minute < end):
            again = ((begin - minute) % DAY) * 60 - now.second
            raise PolicyRefused(f"hours={self.hours}", f"and it is {now:%H:%M} there", again)


def _hours(text: str) -> tuple[int, int] | None:
    """The first minute of the day and the one after the last; None if `text` is no such time.

    >>> _hours("20:00-06:30"), _hours("8-12")
    ((1200, 390), None)
    """
    found = HOURS.fullmatch(text)
    if found is None:
        return None
    numbers = [int(part) for part in found.groups()]
    begin, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
    right = max(numbers[1], numbers[3]) < 60 and begin < DAY and end <= DAY and begin != end
    return (begin, end) if right else None


def _said(key: str, values: list[str] | None) -> str:
    return f"{key}={typed(values)}"
