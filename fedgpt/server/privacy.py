"""The server's side of privacy: who may take part how often, and what stands between a sum and the
model.

privacy=client: each decoded update is clipped to C, counts once with a weight of at most 1, and the
sum gets noise before anything is made of it: D = (sum_i s_i clip(D_i) + N(0, (z C)^2)) / K, K a
constant. Every release is paid for in `ledger.json` before its noise is drawn. privacy=example and
local: clients pay for themselves; the server counts, asks nobody beyond the plan and reports the
client that has paid most.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedgpt.aggregate.base import Strategy
from fedgpt.core.errors import StoppedEarly
from fedgpt.core.files import write_text
from fedgpt.core.messages import ClientInfo, Pacing, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.clipping import AdaptiveClip, clipped
from fedgpt.privacy.ledger import BudgetExhausted, Ledger
from fedgpt.privacy.plan import PrivacyPlan, count_blocks, sampling_probability
from fedgpt.privacy.randomness import SecureStream, derive, secret_key
from fedgpt.privacy.toeplitz import correlate
from fedgpt.storage.tables import Clients

CLIP = "privacy/clip"  # names in the state's memory
NOISE = "privacy/noise"
OFTEN = (
    ", the others have taken part as often as they may (privacy.participations) or too lately"
    " (privacy.separation)"
)


class Privacy:
    """A run without privacy: nothing is limited. The classes below override what differs."""

    central = False  # whether the server noises the sum of a version's updates
    reason = ""  # why nobody may take part, as the end of a message

    def job_numbers(self) -> dict[str, Any]:
        """Fields of the plan that every job carries."""
        return {}

    def meet(self, infos: Iterable[ClientInfo]) -> None:
        """The clients of this run, before its first job."""

    def may_ask(self, client: str, version: int, clients: Clients) -> bool:
        """Whether a client may take part in the version that is made from `version`."""
        return True

    def asked(self, client: str, steps: int, clients: Clients) -> None:
        """A job of so many local steps has been made for a client."""

    def answered(self, update: Update, clients: Clients) -> None:
        """A job's update has been accepted."""

    def noise_length(self, size: int) -> float:
        """How long an update of `size` parameters may be through its noise alone."""
        return 0.0

    def tokens(self, accepted: Sequence[Update], pacing: Pacing, job_tokens: int) -> int:
        """By how many tokens a version moves the learning-rate schedule."""
        return sum(update.tokens for update in accepted)

    def coins(self, version: int, count: int) -> np.ndarray | None:
        """(count,) secret uniform values that choose the clients; None: the run's seed does."""
        return None

    def metrics(self, clients: Clients) -> dict[str, Any]:
        """Fields of the line of a version that is scored; an epsilon takes half a second."""
        return {"epsilon": None}


class PaidByClients(Privacy):
    """privacy=example and local: every client keeps its own ledger, and the server counts along."""

    reason = OFTEN

    def __init__(self, options: RunOptions, plan: PrivacyPlan, folder: Path):
        self.options, self.plan, self.folder = options, plan, folder
        self.per_job = options.local.steps if plan.unit == "example" else 1
        self.probability: dict[str, float] = {}

    def job_numbers(self) -> dict[str, Any]:
        """The noise, the number of jobs that it is meant for, and delta."""
        plan = self.plan
        return {
            "noise_multiplier": plan.noise_multiplier,
            "participations": plan.participations,
            "delta": plan.delta,
        }

    def meet(self, infos: Iterable[ClientInfo]) -> None:
        """Compute each client's sampling probability: a smaller shard is sampled more often."""
        for info in infos:
            probability = 1.0
            if self.plan.unit == "example":
                blocks = max(1, count_blocks(info.tokens, self.options))
                probability = sampling_probability(self.options, blocks)
            self.probability[info.id] = probability

    def may_ask(self, client: str, version: int, clients: Clients) -> bool:
        """As long as a complete job is within the plan."""
        charged = clients.charges.get(client, 0.0)
        return charged + self.per_job <= self.plan.participations * self.per_job

    def asked(self, client: str, steps: int, clients: Clients) -> None:
        """The client pays when it begins a job; the server counts as if it always began."""
        clients.charge(client, steps if self.plan.unit == "example" else 1)

    def noise_length(self, size: int) -> float:
        """privacy=local: twice the expected length, 2 C z sqrt(size), as some draws are longer."""
        if self.plan.unit != "local":
            return 0.0
        return 2 * 2 * self.options.privacy.clip * self.plan.noise_multiplier * size**0.5

    def answered(self, update: Update, clients: Clients) -> None:
        """Note what the client says it has paid: more than the server knows after a crash."""
        clients.charged_at_least(update.client, float(update.metrics.get("charged", 0.0)))

    def metrics(self, clients: Clients) -> dict[str, Any]:
        """Epsilon of the client that has paid most; it holds for all, as shards share no block."""
        plan, worst, most = self.plan, None, 0.0
        paid = {(self.probability[client], int(n)) for client, n in clients.charges.items()}
        for probability, count in paid:
            if any(p >= probability and n >= count for p, n in paid - {(probability, count)}):
                continue  # another client pays more in any case
            event = Event(plan.noise_multiplier, probability, count)
            if (epsilon := epsilon_of((event,), plan.delta)) >= most:
                worst, most = event, epsilon
        about = {
            "unit": plan.unit,
            "delta": plan.delta,
            "epsilon": most,
            "clients": dict(clients.charges),
            "events": [] if worst is None else [asdict(worst)],
        }
        write_text(self.folder / "ledger.json", json.dumps(about, indent=1) + "\n")
        return {"epsilon": most}


class PaidByServer(Privacy):
    """privacy=client: the release of one noisy sum for each version."""

    central = True
    reason = OFTEN

    def __init__(
        self, options: RunOptions, plan: PrivacyPlan, folder: Path, data: str, fresh: bool
    ):
        """`folder` holds ledger and key; `data` names what is protected; `fresh`: the run begins,
        so they may too.
        """
        self.options, self.plan = options, plan
        # which is made last: with it, there was a ledger
        fresh = fresh and not (folder / "privacy.key").exists()
        self.ledger = Ledger(folder / "ledger.json", "client", data, plan.delta, fresh)
        self.key = secret_key(folder / "privacy.key", fresh)
        if options.privacy.rng == "seeded":
            self.key = hashlib.sha256(f"{options.seed}".encode()).digest()
        self.adaptive = AdaptiveClip() if options.privacy.adaptive else None
        self.clip, self.bits, self.shares = options.privacy.clip, 0.0, dict[str, float]()

    def may_ask(self, client: str, version: int, clients: Clients) -> bool:
        """So often at most, and never twice for one sum; by coins anybody, as the accounting has
        them all.
        """
        if self.plan.sampling == "poisson":
            return True
        last, separation = clients.released(client), self.options.privacy.separation
        if client in self.shares or (last is not None and version - last < separation):
            return False
        paid = self.ledger.spent_before(client, version)
        return paid + 1 <= self.plan.participations + 1e-9

    def coins(self, version: int, count: int) -> np.ndarray | None:
        """Secret ones: the sample must not be guessed."""
        return SecureStream(self.key, "coins", version).uniform(count)

    def tokens(self, accepted: Sequence[Update], pacing: Pacing, job_tokens: int) -> int:
        """As many as were expected: who came must not show in the learning rates of others."""
        return pacing.goal * job_tokens

    def begin(self, state: ServerState) -> None:
        """Forget the last version's updates; the clip stays the same until the next release."""
        self.clip = float(state.memory.get(CLIP, self.options.privacy.clip))
        self.bits, self.shares = 0.0, {}

    def take(self, update: Update, rule: Strategy, staleness: int) -> tuple[Update, float]:
        """The clipped update and its weight, at most 1: how many tokens a client has must not
        count.
        """
        whole = update.metrics["update_norm"] <= self.clip
        share = min(1.0, rule.discount(staleness))
        self.bits += (0.5 if whole else -0.5) * share
        self.shares[update.client] = share**2
        return replace(update, delta=clipped(update.delta, self.clip)), share

    def divisor(self, rule: Strategy, pacing: Pacing) -> float:
        """K: never how many came, nor the sum of their weights."""
        if pacing.name == "buffer":
            return rule.divisor([1.0] * pacing.goal, pacing)
        return self.plan.cohort

    def release(
        self, mean: np.ndarray, divisor: float, state: ServerState, clients: Clients
    ) -> tuple[np.ndarray, ServerState]:
        """Add the noise of one release, paid for before it is drawn, to the clipped sum over
        `divisor`; changes `mean`.

        Raises StoppedEarly where the budget does not allow the release.
        """
        version = state.version
        digest = hashlib.sha256(mean.data).hexdigest()
        # the ledger holds the tag, which names the noise without giving it away
        tag = derive(self.key, "release", version, digest, repr(self.bits), self.clip).hex()
        try:
            self._charge(version, tag)
        except BudgetExhausted as error:
            raise StoppedEarly(
                f"privacy: {error}; the model of version {version} is the last that is paid for"
            ) from error
        for client in self.shares:
            clients.note_release(client, version)
        return self._noised(mean, divisor, SecureStream(self.key, "noise", tag), state)

    def _charge(self, version: int, tag: str) -> None:
        plan, ledger = self.plan, self.ledger
        if plan.sampling == "poisson":
            # of a version made again with another sum, the coins are those of before: that sample
            # is no news
            again = ledger.made(version)
            event = Event(
                plan.noise_multiplier, 1.0 if again else plan.planned.sampling_probability, 1
            )
            ledger.charge(version, tag, event, None if self._covered(event) else plan.budget)
        elif plan.sampling == "bounded":
            ledger.charge_clients(
                version, tag, self.shares, plan.noise_multiplier, plan.participations, plan.budget
            )
        elif version == 0 and not ledger.account.events:  # one release for the whole run
            ledger.charge(0, tag, plan.planned, plan.budget)
        else:
            ledger.note(version, tag)

    def _covered(self, event: Event) -> bool:
        """Whether the budget has room for the whole plan, and the plan for one release more."""
        fits = self.plan.budget is None or self.plan.epsilon <= self.plan.budget
        return fits and self.ledger.account.within(self.plan.planned, event)

    def _noised(
        self, mean: np.ndarray, divisor: float, stream: SecureStream, state: ServerState
    ) -> tuple[np.ndarray, ServerState]:
        plan, memory = self.plan, dict(state.memory)
        z = plan.noise_multiplier * plan.scale
        if self.adaptive is not None:
            z = self.adaptive.release_noise(z, plan.cohort)
            draw = float(stream.normal(1)[0])
            memory[CLIP] = np.array(self.adaptive.next(self.clip, self.bits, plan.cohort, draw))
        std = z * self.clip / divisor
        if plan.sampling != "correlated":
            stream.add_normal(torch.from_numpy(mean), std)
            return mean, replace(state, memory=memory)
        bands = self.options.privacy.bands
        names = [f"{NOISE}/{age}" for age in range(1, bands)]
        earlier = [memory[name] for name in names if name in memory]
        noise = correlate(stream.normal(mean.size), earlier, bands)
        memory |= dict(zip(names, [noise, *earlier], strict=False))
        mean += np.float32(std) * noise
        return mean, replace(state, memory=memory)

    def metrics(self, clients: Clients) -> dict[str, Any]:
        """Epsilon so far and the clip; nothing that was not released with noise."""
        return {"epsilon": self.ledger.account.epsilon, "privacy_clip": self.clip}


def make_privacy(
    options: RunOptions, plan: PrivacyPlan | None, folder: Path, data: str, fresh: bool
) -> Privacy:
    """The server's side for `plan`; raises FedGPTError where what has been spent is not known."""
    if plan is None:
        return Privacy()
    if plan.unit == "client":
        return PaidByServer(options, plan, folder, data, fresh)
    return PaidByClients(options, plan, folder)
