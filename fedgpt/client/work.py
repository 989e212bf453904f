"""What a client does with a job: find its shard and state, train, keep the new state, lie if told
to, encode.
"""

from __future__ import annotations

import faulthandler
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from fedgpt.client.attack import attacked
from fedgpt.client.privacy import ClientPrivacy
from fedgpt.client.state import ClientState, ClientStore
from fedgpt.core.device import choose_compute
from fedgpt.core.errors import FedGPTError, UpdateRejected
from fedgpt.core.faults import reach
from fedgpt.core.messages import ClientInfo, Job, Update
from fedgpt.core.options import RunOptions
from fedgpt.core.seeds import derive_seed
from fedgpt.data.batches import Batches
from fedgpt.data.partition import Shard, partition
from fedgpt.data.prepare import Prepared, prepare
from fedgpt.local.optimizer import Moments
from fedgpt.local.trainer import Trainer
from fedgpt.storage.initial_weights import base_weights
from fedgpt.update.codec import compress, digest, header_of
from fedgpt.update.compress import Plain, compressor_of
from fedgpt.update.downlink import STEPS, rebuilt
from fedgpt.update.feedback import feed, measured, rest

# under this name it keeps its own optimiser state, where a rule wants a root update
ROOT = "the server"


class ClientWork:
    """The work of every client that this process plays; data and buffers are made once and
    reused.
    """

    def __init__(self, options: RunOptions, state_root: str):
        self.options, self.state_root = options, state_root
        self.compressor = compressor_of(options.update)

    @cached_property
    def prepared(self) -> Prepared:
        """The tokens, as every process of this machine shares them."""
        return prepare(self.options.corpus, self.options.tokenizer, self.options.cache_dir)

    @cached_property
    def shards(self) -> list[Shard]:
        """Who holds which text; the same list at every client and at the server."""
        window = self.options.model.block_size + 1
        return partition(self.prepared, self.options.partition, self.options.seed, window)

    @cached_property
    def trainer(self) -> Trainer:
        """The buffers of this process."""
        options, tokenizer = self.options, self.prepared.tokenizer
        private = options.privacy.unit == "example"
        compute = choose_compute(options.runtime.device, options.local.precision, private)
        return Trainer(
            options.model,
            tokenizer.vocab_size,
            options.local,
            compute,
            options.privacy.engine,
            base_weights(options, tokenizer),
        )

    def info(self, index: int) -> ClientInfo:
        """Who the client with partition number `index` is."""
        shard = self.shards[index]
        return ClientInfo(shard.client, shard.size)

    def train(self, job: Job, index: int) -> tuple[str, np.ndarray]:
        """Do one job; returns the update's header and its array (a kept buffer: copy or send it at
        once).

        The same job gives the same bits however often and wherever it is done. Raises FedGPTError
        if this client's frozen weights are not the run's.
        """
        shard = self.shards[index]
        if shard.client != job.client:
            raise ValueError(
                f"the job is for client {job.client!r}, partition {index} is {shard.client!r}"
            )
        self._check_base(job.plan.base_digest)
        job = self._received(job)
        began = time.monotonic()
        lies = index < self.options.attack.clients
        tokens = shard.read(self.prepared.tokens)
        with watchdog(self.options.runtime.watchdog, job.plan.seconds):
            reach("client.begin")
            header, payload = self._do(job, job.client, tokens, lies)
            # a slow client of a simulated fleet
            time.sleep(max(0.0, began + job.plan.seconds - time.monotonic()))
            reach("client.done")
        return header, payload

    def train_root(self, job: Job) -> Update:
        """The server's own update: the same training, on the public text."""
        update, state = self._trained(job, ROOT, self.prepared.public(), self._state(job, ROOT))
        self._keep(job, ROOT, state)
        return update

    def _check_base(self, expected: str) -> None:
        """An update to other frozen weights than the run's would harm every other client."""
        found = self.trainer.base_digest
        if found != expected:
            source = self.options.init_from or f"seed {self.options.seed}"
            raise FedGPTError(
                f"base weights differ: this client's are {found[:16] or 'none'} (from {source}),"
                f" the run's are {expected[:16] or 'none'}; give both the same init_from"
            )

    def _received(self, job: Job) -> Job:
        """The job with its whole vector, which is kept where later ones may be steps from it."""
        downlink = self.options.update.downlink
        if downlink not in STEPS:
            return job
        store = ClientStore(self.state_root, job.plan.run, job.client)
        if job.plan.cached_version >= 0:
            held = store.load_model(job.plan.cached_version)
            if held is None:  # the server sends the whole model then
                raise LookupError(
                    f"the model of version {job.plan.cached_version} is not here any more"
                )
            payload = job.params if job.version > job.plan.cached_version else np.empty(0, np.uint8)
            job = replace(job, params=rebuilt(held, payload, downlink) if payload.size else held)
        store.save_model(job.version, job.params)
        return job

    def _do(self, job: Job, name: str, tokens: np.ndarray, lies: bool) -> tuple[str, np.ndarray]:
        """Train, add what was left out before, compress, keep what is left out now, encode."""
        options = self.options.update
        before = self._state(job, name)
        update, after = self._trained(job, name, tokens, before, self._privacy(job, tokens))
        if lies:
            delta = attacked(
                update.delta, self.options.attack, self.options.seed, job.client, job.number
            )
            update = replace(update, delta=delta)
        if options.error_feedback:
            residual = None if before is None else before.residual
            update = replace(update, delta=feed(update.delta, residual, options.decay))
        payload = compress(update.delta, self.compressor)
        left = self._left_out(update.delta, payload)
        if options.error_feedback:
            after = replace(after, residual=left)
        if left is not None and self.options.privacy.unit == "none":  # it is measured on the text
            update = replace(update, metrics={**update.metrics, **measured(update.delta, left)})
        self._keep(job, name, after)
        return header_of(job.plan.run, update, payload, self.compressor), payload

    def _left_out(self, delta: np.ndarray, payload: np.ndarray) -> np.ndarray | None:
        """What the server will not get of a delta; None where all of it travels, or no server takes
        it.
        """
        if isinstance(self.compressor, Plain):
            return None
        try:
            return rest(delta, self.compressor.decode(payload, delta.size))
        except UpdateRejected:  # NaN or infinity: the server says so, too
            return None

    def _privacy(self, job: Job, tokens: np.ndarray) -> ClientPrivacy | None:
        """What makes a client's job private; the server's own, on public text, is not."""
        if self.options.privacy.unit not in ("example", "local"):
            return None
        compute = self.trainer.compute
        environment = {
            "device": compute.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        # whose bits hang on more than we record: there a job is another one each time
        if compute.device != "cpu":
            environment["once"] = secrets.token_hex(8)
        folder = ClientStore(self.state_root, job.plan.run, job.client).folder
        return ClientPrivacy(self.options, folder, tokens, environment)

    def _trained(
        self,
        job: Job,
        name: str,
        tokens: np.ndarray,
        before: ClientState | None,
        privacy: ClientPrivacy | None = None,
    ) -> tuple[Update, ClientState]:
        options = self.options
        moments = None if before is None else before.moments
        if privacy is not None and options.privacy.unit == "example":
            batches = privacy.steps(job, _named(moments))
        else:
            seed = derive_seed(options.seed, "batches", name, job.number)
            batches = Batches(tokens, options.model.block_size, options.local.batch_size, seed)
        trained = self.trainer.train(
            job.params,
            batches,
            job.plan,
            moments,
            derive_seed(options.seed, "dropout", name, job.number),
        )
        if privacy is not None and options.privacy.unit == "local":
            trained = replace(trained, delta=privacy.hidden(job, trained.delta, _named(moments)))
        # in a private run nothing leaves of what was measured on the text
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
    """A name of the moments that a job starts from, the same only for the same bits."""
    if moments is None:
        return "fresh"
    return (
        f"{digest(moments.first.cpu().numpy())} {digest(moments.second.cpu().numpy())}"
        f" {moments.steps}"
    )


@contextmanager
def watchdog(seconds: float, slow: float = 0.0) -> Iterator[None]:
    """End this process where the block hangs: its stack goes to stderr, the server is told and goes
    on.

    `slow`: seconds that the job is meant to last. The timer is the interpreter's own thread, which
    needs no lock that a hanging library could hold.
    """
    if seconds:
        faulthandler.dump_traceback_later(seconds + slow, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
