"""The work of a job: load shard and state, train, save the state, compress, encode."""

from __future__ import annotations

import faulthandler
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from fedgpt.client.account import SiteAccount
from fedgpt.client.attack import attacked
from fedgpt.client.bases import SiteBases
from fedgpt.client.fitting import FittingTrainer
from fedgpt.client.privacy import ClientPrivacy, job_digest, promise_of
from fedgpt.client.state import ClientState, ClientStore
from fedgpt.client.texts import CommonText, Texts
from fedgpt.core.errors import FedGPTError, UpdateRejected
from fedgpt.core.faults import reach
from fedgpt.core.messages import Job, Update
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.text import Text
from fedgpt.local.optimizer import Moments
from fedgpt.local.trainer import Trainer
from fedgpt.update.codecs.none import Plain
from fedgpt.update.compress import codec_of
from fedgpt.update.downlink import STEPS, rebuilt
from fedgpt.update.feedback import feed, measured, rest
from fedgpt.update.wire import compress, digest, header_of

# client name under which the server keeps its optimiser state, if the strategy needs a root update
ROOT = "the server"


class ClientWork:
    """The work of all clients of this process, which share its data and buffers."""

    def __init__(
        self,
        options: RunOptions,
        state_root: str,
        texts: Texts | None = None,
        account: SiteAccount | None = None,
        bases: SiteBases | None = None,
    ):
        """`texts`: where the clients' text comes from, if it is not the text of the run; `account`
        counts the private releases of a site over all its runs; `bases` has the base weights that
        servers have sent to a site.
        """
        self.options, self.state_root, self.account = options, state_root, account
        self.texts = texts or CommonText(options)
        self._fitting = FittingTrainer(options, self.texts)
        self.codec = codec_of(options.update, options.trusted_packages)
        self._bases = bases

    @property
    def trainer(self) -> Trainer:
        """The model and the training buffers of this process."""
        return self._fitting.trainer

    def train(self, job: Job, index: int) -> tuple[str, np.ndarray]:
        """Do one job; returns the header and the array of its update.

        The next job reuses the array's memory, so the caller must copy or send the array first. The
        same job gives the same bits in every process with micro-batches of the same size. Raises
        ValueError if the job is for another client, TextChanged if this process has prepared other
        text than the run's, PartMissing if a site lacks what the server sends once, and FedGPTError
        if this client's shards or frozen weights are not the run's, or if its memory is too small.
        """
        text = self.texts.of(job, index)
        digest = job.plan.digests.get("base", "")
        if self._bases is not None:
            self._fitting.use_base(self._bases, digest)
        self._check_base(digest)
        job = self._received(job)
        began = time.monotonic()
        lies = index < self.options.attack.clients
        with watchdog(self.options.runtime.watchdog, job.plan.seconds):
            reach("client.begin")
            header, payload = self._do(job, job.client, text, lies)
            # a simulated fleet on the real clock: wait until the modelled time of this job is over
            time.sleep(max(0.0, began + job.plan.seconds - time.monotonic()))
            reach("client.done")
        return header, payload

    def train_root(self, job: Job) -> Update:
        """The server's own update: the same training on the public text."""
        assert isinstance(self.texts, CommonText), "the server has the text of the run"
        text = self.texts.public(job)
        before = self._state(job, ROOT)
        update, state = self._fitting.run(
            lambda: self._trained(job, ROOT, text, before), private=False
        )
        self._keep(job, ROOT, state)
        return update

    def _check_base(self, expected: str) -> None:
        """Raise FedGPTError if the frozen weights differ from the run's: the update would harm all
        clients.
        """
        found = self.trainer.base_digest
        if found != expected:
            source = self.options.init_from or f"seed {self.options.seed}"
            raise FedGPTError(
                f"base weights differ: this client's are {found[:16] or 'none'} (from {source}),"
                f" the run's are {expected[:16] or 'none'}; use the same init_from for both"
            )

    def _received(self, job: Job) -> Job:
        """The job with its complete params, cached if later jobs may be sent as deltas to them."""
        downlink = self.options.update.downlink
        if downlink not in STEPS:
            return job
        store = ClientStore(self.state_root, job.plan.run, job.client)
        if job.plan.cached_version >= 0:
            cached = store.load_model(job.plan.cached_version)
            if cached is None:  # after this error the server sends the full model
                raise LookupError(
                    f"the model of version {job.plan.cached_version} is not in the client's cache"
                )
            payload = job.params if job.version > job.plan.cached_version else np.empty(0, np.uint8)
            job = replace(
                job, params=rebuilt(cached, payload, downlink) if payload.size else cached
            )
        store.save_model(job.version, job.params)
        return job

    def _do(self, job: Job, name: str, text: Text, lies: bool) -> tuple[str, np.ndarray]:
        """Train, add the residual of earlier jobs, compress, keep the new residual, encode."""
        options = self.options.update
        before = self._state(job, name)
        update, after = self._fitting.run(
            lambda: self._trained(job, name, text, before, self._privacy(job, text)),
            private=self.options.privacy.unit == "example",
        )
        if lies:
            delta = attacked(
                update.delta, self.options.attack, self.options.seed, job.client, job.number
            )
            update = replace(update, delta=delta)
        if options.error_feedback:
            residual = None if before is None else before.residual
            update = replace(update, delta=feed(update.delta, residual, options.decay))
        payload = compress(update.delta, self.codec)
        left = self._left_out(update.delta, payload)
        if options.error_feedback:
            after = replace(after, residual=left)
        # computed from the text without noise, so only for runs without privacy
        if left is not None and self.options.privacy.unit == "none":
            update = replace(update, metrics={**update.metrics, **measured(update.delta, left)})
        self._keep(job, name, after)
        return header_of(job.plan.run, update, payload, self.codec), payload

    def _left_out(self, delta: np.ndarray, payload: np.ndarray) -> np.ndarray | None:
        """The compression error of a delta; None if there is none or if the delta is not finite."""
        if isinstance(self.codec, Plain):
            return None
        try:
            return rest(delta, self.codec.decode(payload, delta.size))
        except UpdateRejected:  # NaN or infinity, for which the server also rejects the update
            return None

    def _privacy(self, job: Job, text: Text) -> ClientPrivacy | None:
        """The private part of a client's job; None for a run without privacy at the client."""
        if self.options.privacy.unit == "client":
            self._promised(job, text)
        if self.options.privacy.unit not in ("example", "local"):
            return None
        compute, micro_batch = self.trainer.compute, self.trainer.micro_batch
        environment = {
            "device": compute.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        if micro_batch < self.options.local.batch_size:
            environment["micro_batch"] = micro_batch
        # results on other devices depend on more than is recorded here, so that a repeated job
        # counts as a new one and gets new noise
        if compute.device != "cpu":
            environment["once"] = secrets.token_hex(8)
        folder = ClientStore(self.state_root, job.plan.run, job.client).folder
        task, account = self.trainer.task, self.account
        return ClientPrivacy(self.options, folder, text, environment, task, account)

    def _promised(self, job: Job, text: Text) -> None:
        """Charge the site's account for what a run promises in which the server adds the noise."""
        promise = promise_of(self.options)
        if self.account is not None and promise is not None:
            self.account.charge_job(job.plan.run, promise, job_digest(job, text))

    def _trained(
        self,
        job: Job,
        name: str,
        text: Text,
        before: ClientState | None,
        privacy: ClientPrivacy | None = None,
    ) -> tuple[Update, ClientState]:
        options = self.options
        moments = None if before is None else before.moments
        if privacy is not None and options.privacy.unit == "example":
            self.trainer.private.rehearse(self.trainer.grad, privacy.units)
            batches = privacy.steps(job, _named(moments))
        else:
            seed = derive_seed(options.seed, "batches", name, job.number)
            window, size = options.model.block_size, options.local.batch_size
            batches = self.trainer.task.batches(text, window, size, seed)
        trained = self.trainer.train(
            job.params,
            batches,
            job.plan,
            moments,
            derive_seed(options.seed, "dropout", name, job.number),
        )
        if privacy is not None and options.privacy.unit == "local":
            trained = replace(trained, delta=privacy.hidden(job, trained.delta, _named(moments)))
        # in a private run the client sends no measurement of its text
        metrics = (
            trained.metrics if options.privacy.unit == "none" else {"lr": trained.metrics["lr"]}
        )
        if privacy is not None:
            metrics["charged"] = privacy.charged
        if self._keeps:
            metrics["state_lost"] = float(before is None and job.plan.state_job >= 0)
        kept = ClientState(trained.moments if options.local.moments == "keep" else None)
        return (
            Update(job.client, job.number, job.version, trained.delta, trained.tokens, metrics),
            kept,
        )

    @property
    def _keeps(self) -> bool:
        return self.options.local.moments == "keep" or self.options.update.error_feedback

    def _state(self, job: Job, name: str) -> ClientState | None:
        return (
            ClientStore(self.state_root, job.plan.run, name).load(job.plan.state_job)
            if self._keeps
            else None
        )

    def _keep(self, job: Job, name: str, state: ClientState) -> None:
        if self._keeps:
            store = ClientStore(self.state_root, job.plan.run, name)
            store.save(job.number, state)
            store.keep({job.number, *job.plan.keep})


def _named(moments: Moments | None) -> str:
    """A text that identifies the moments from which a job starts: equal only for equal bits."""
    if moments is None:
        return "fresh"
    return (
        f"{digest(moments.first.cpu().numpy())} {digest(moments.second.cpu().numpy())}"
        f" {moments.steps}"
    )


@contextmanager
def watchdog(seconds: float, slow: float = 0.0) -> Iterator[None]:
    """End this process if the block takes more than `seconds` (0: no limit) and `slow` seconds.

    Its stacks go to stderr, and the server is informed that the process has ended. `slow` is the
    time that the job of a simulated slow client takes. The timer is a thread of the interpreter
    that needs no lock, so a library that hangs while it holds the GIL cannot stop it.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds + slow, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
