"""Privacy at the server: limits on participation, clipping and noise.

privacy=client: the server clips each decoded update to C, gives it a weight of at most 1, and adds
noise to the sum: D = (sum_i s_i clip(D_i) + N(0, (z C)^2)) / K, where K is a constant. The ledger
`ledger.json` is charged for every release before its noise is drawn. privacy=example and local:
each client has its own ledger. The server counts jobs, sends none beyond the plan, and reports the
largest epsilon of a client.
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
from fedgpt.core.files import PRIVATE, write_text
from fedgpt.core.messages import ClientInfo, Job, Pacing, ServerState, Update
from fedgpt.core.options import RunOptions
from fedgpt.privacy.accounting import Event, epsilon_of
from fedgpt.privacy.clipping import AdaptiveClip, clipped
from fedgpt.privacy.ledger import BudgetExhausted, Ledger
from fedgpt.privacy.plan import PrivacyPlan, count_blocks, sampling_probability
from fedgpt.privacy.randomness import SecureStream, derive, secret_key
from fedgpt.privacy.toeplitz import correlate
from fedgpt.storage.tables import Clients

CLIP = "privacy/clip"  # names of arrays in the state's memory
NOISE = "privacy/noise"
OFTEN = (
    ", the other clients have reached privacy.participations or took part too recently"
    " (privacy.separation)"
)


class Privacy:
    """A run without privacy, which has no limits. The classes below override its methods."""

    central = False  # whether the server adds noise to the sum of a version's updates
    reason = ""  # why no client may take part, as the end of a message

    def job_numbers(self) -> dict[str, Any]:
        """Fields of the plan that every job contains."""
        return {}

    def meet(self, infos: Iterable[ClientInfo]) -> None:
        """Set the clients of this run, before its first job."""

    def may_ask(self, client: str, version: int, clients: Clients) -> bool:
        """Whether a client may take part in the version that is made from `version`."""
        return True

    def asked(self, client: str, steps: int, clients: Clients) -> None:
        """Count a job of `steps` local steps that was made for a client."""

    def refused(self, job: Job, clients: Clients) -> None:
        """Take back what was counted for a job that a site's policy has refused."""

    def answered(self, update: Update, clients: Clients) -> None:
        """Count an accepted update."""

    def noise_length(self, size: int) -> float:
        """The norm that noise alone may give to an update of `size` parameters."""
        return 0.0

    def tokens(self, accepted: Sequence[Update], pacing: Pacing, job_tokens: int) -> int:
        """The number of tokens by which a version advances the learning-rate schedule."""
        return sum(update.tokens for update in accepted)

    def coins(self, version: int, count: int) -> np.ndarray | None:
        """(count,) secret uniform values that choose the clients; None: the run's seed chooses
        them.
        """
        return None

    def metrics(self, clients: Clients) -> dict[str, Any]:
        """Privacy metrics of a version that is scored; computing an epsilon takes half a second."""
        return {"epsilon": None}


class PaidByClients(Privacy):
    """privacy=example and local: every client has its own ledger, and the server also counts its
    jobs.
    """

    reason = OFTEN

    def __init__(self, options: RunOptions, plan: PrivacyPlan, folder: Path):
        self.options, self.plan, self.folder = options, plan, folder
        self.per_job = options.local.steps if plan.unit == "example" else 1
        self.probability: dict[str, float] = {}

    def job_numbers(self) -> dict[str, Any]:
        """The noise multiplier, the number of jobs for which it is planned, and delta."""
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
        """True if a complete job of the client is within the plan."""
        charged = clients.charges.get(client, 0.0)
        return charged + self.per_job <= self.plan.participations * self.per_job

    def asked(self, client: str, steps: int, clients: Clients) -> None:
        """Count the job as charged: the client's ledger is charged when the job begins."""
        clients.charge(client, self._releases(steps))

    def refused(self, job: Job, clients: Clients) -> None:
        """Uncharge the job: a site's policy refuses it before the site's ledger is charged."""
        clients.charge(job.client, -self._releases(job.plan.local_steps))

    def _releases(self, steps: int) -> int:
        return steps if self.plan.unit == "example" else 1

    def noise_length(self, size: int) -> float:
        """privacy=local: twice the expected length, 2 C z sqrt(size), as some draws are longer."""
        if self.plan.unit != "local":
            return 0.0
        return 2 * 2 * self.options.privacy.clip * self.plan.noise_multiplier * size**0.5

    def answered(self, update: Update, clients: Clients) -> None:
        """Store the charges that the client reports; after a crash they may exceed the server's
        count.
        """
        clients.charged_at_least(update.client, float(update.metrics.get("charged", 0.0)))

    def metrics(self, clients: Clients) -> dict[str, Any]:
        """The largest epsilon of a client; it holds for all clients, because shards share no
        block.
        """
        plan, worst, most = self.plan, None, 0.0
        paid = {(self.probability[client], int(n)) for client, n in clients.charges.items()}
        for probability, count in paid:
            if any(p >= probability and n >= count for p, n in paid - {(probability, count)}):
                continue  # another client has a larger epsilon in any case
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
        write_text(self.folder / "ledger.json", json.dumps(about, indent=1) + "\n", mode=PRIVATE)
        return {"epsilon": most}


class PaidByServer(Privacy):
    """privacy=client: the release of one noisy sum for each version."""

    central = True
    reason = OFTEN

    def __init__(
        self, options: RunOptions, plan: PrivacyPlan, folder: Path, data: str, fresh: bool
    ):
        """`folder` contains ledger and key; `data` is the digest of the protected text; with
        `fresh` the run is new, and ledger and key are created.
        """
        self.options, self.plan = options, plan
        # the key is created after the ledger, so if the key exists, the ledger existed
        fresh = fresh and not (folder / "privacy.key").exists()
        self.ledger = Ledger(folder / "ledger.json", "client", data, plan.delta, fresh)
        self.key = secret_key(folder / "privacy.key", fresh)
        if options.privacy.rng == "seeded":
            self.key = hashlib.sha256(f"{options.seed}".encode()).digest()
        self.adaptive = AdaptiveClip() if options.privacy.adaptive else None
        self.clip, self.bits, self.shares = options.privacy.clip, 0.0, dict[str, float]()

    def may_ask(self, client: str, version: int, clients: Clients) -> bool:
        """Limit the participations and forbid two updates in one sum. With coins every client may
        take part, because the accounting includes all clients.
        """
        if self.plan.sampling == "poisson":
            return True
        last, separation = clients.released(client), self.options.privacy.separation
        if client in self.shares or (last is not None and version - last < separation):
            return False
        paid = self.ledger.spent_before(client, version)
        return paid + 1 <= self.plan.participations + 1e-9

    def coins(self, version: int, count: int) -> np.ndarray | None:
        """Secret values, so that nobody can guess the sample."""
        return SecureStream(self.key, "coins", version).uniform(count)

    def tokens(self, accepted: Sequence[Update], pacing: Pacing, job_tokens: int) -> int:
        """The expected number of tokens, so that learning rates do not reveal which clients took
        part.
        """
        return pacing.goal * job_tokens

    def begin(self, state: ServerState) -> None:
        """Clear the last version's updates; the clip is constant until the next release."""
        self.clip = float(state.memory.get(CLIP, self.options.privacy.clip))
        self.bits, self.shares = 0.0, {}

    def take(self, update: Update, rule: Strategy, staleness: int) -> tuple[Update, float]:
        """The clipped update and its weight, at most 1. The weight must not depend on a client's
        number of tokens.
        """
        whole = update.metrics["update_norm"] <= self.clip
        share = min(1.0, rule.discount(staleness))
        self.bits += (0.5 if whole else -0.5) * share
        self.shares[update.client] = share**2
        return replace(update, delta=clipped(update.delta, self.clip)), share

    def divisor(self, rule: Strategy, pacing: Pacing) -> float:
        """The constant K, instead of the number of updates or the sum of their weights."""
        if pacing.name == "buffer":
            return rule.divisor([1.0] * pacing.goal, pacing)
        return self.plan.cohort

    def release(
        self, mean: np.ndarray, divisor: float, state: ServerState, clients: Clients
    ) -> tuple[np.ndarray, ServerState]:
        """Charge the ledger for one release, then add its noise to the clipped sum divided by
        `divisor`; changes `mean`.

        Raises StoppedEarly if the budget does not allow the release.
        """
        version = state.version
        digest = hashlib.sha256(mean.data).hexdigest()
        # the ledger holds the tag, which names the noise without giving it away
        tag = derive(self.key, "release", version, digest, repr(self.bits), self.clip).hex()
        try:
            self._charge(version, tag)
        except BudgetExhausted as error:
            raise StoppedEarly(
                f"privacy: {error}; the model of version {version} is the last with a charged"
                " release"
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
        elif version == 0 and not ledger.account.events:  # one release for the complete run
            ledger.charge(0, tag, plan.planned, plan.budget)
        else:
            ledger.note(version, tag)

    def _covered(self, event: Event) -> bool:
        """Whether the budget covers the complete plan, and the plan covers one more release."""
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
        """Epsilon so far and the clip, which were released with noise."""
        return {"epsilon": self.ledger.account.epsilon, "privacy_clip": self.clip}


def make_privacy(
    options: RunOptions, plan: PrivacyPlan | None, folder: Path, data: str, fresh: bool
) -> Privacy:
    """The server's privacy object for `plan`; raises FedGPTError if the ledger is missing or
    damaged.
    """
    if plan is None:
        return Privacy()
    if plan.unit == "client":
        return PaidByServer(options, plan, folder, data, fresh)
    return PaidByClients(options, plan, folder)
