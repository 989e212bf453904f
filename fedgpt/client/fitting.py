"""The trainer of a process, in micro-batches that fit into the memory of its device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from fedgpt.client.bases import SiteBases
from fedgpt.client.texts import Texts
from fedgpt.core.device import choose_compute, free_memory, out_of_memory
from fedgpt.core.errors import ForServer, PartMissing
from fedgpt.core.options import RunOptions
from fedgpt.local.trainer import Trainer
from fedgpt.storage.initial_weights import base_weights
from fedgpt.tasks.base import make_task

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class OutOfMemory(ForServer):
    """The memory that this process may use of its machine or of its GPU is too small for a job."""

    def __init__(self, options: RunOptions, split: bool = False):
        """`split`: the job was tried in micro-batches of one sequence."""
        model, size = options.model, options.local.batch_size
        tried = f", also in micro-batches of 1 sequence instead of local.batch_size={size}"
        device = choose_compute(options.runtime.device).device
        super().__init__(
            f"out of memory ({device}){tried * split}; lower model.block_size={model.block_size},"
            f" model.n_layer={model.n_layer} or model.n_embd={model.n_embd}, or raise memory in the"
            " site's policy"
        )


class FittingTrainer:
    """Makes the trainer, and makes it again for smaller micro-batches if a job does not fit."""

    def __init__(self, options: RunOptions, texts: Texts):
        self.options, self.texts = options, texts
        # largest number of sequences that are computed at the same time; it never rises again, so
        # that a repeated job has the same bits
        self.micro_batch = options.local.batch_size
        self._sent: Mapping[str, Tensor] = {}  # frozen weights that a server has sent
        self._trainer: Trainer | None = None

    @property
    def trainer(self) -> Trainer:
        """The model and the training buffers, which are made when they are needed."""
        if self._trainer is None:
            self._trainer = self._made()
        return self._trainer

    def _made(self) -> Trainer:
        options, tokenizer = self.options, self.texts.tokenizer
        private = options.privacy.unit == "example"
        compute = choose_compute(options.runtime.device, options.local.precision, private)
        engine, task = options.privacy.engine, make_task(options)
        base = self._sent or base_weights(options, tokenizer)
        trainer = Trainer(
            options.model, tokenizer.vocab_size, options.local, compute, engine, task, base
        )
        trainer.micro_batch = self.micro_batch
        return trainer

    def use_base(self, bases: SiteBases, digest: str) -> None:
        """Use the frozen weights with this digest: those that a server has sent, or of the seed.

        Raises PartMissing if neither has it.
        """
        if self._trainer is not None and self._trainer.base_digest == digest:
            return
        self._trainer = None
        self._sent = bases.of(digest, self.texts.tokenizer.vocab_size)
        if self.trainer.base_digest == digest:
            return
        self._trainer = None
        bases.remove(digest)
        raise PartMissing(
            "this site does not have the run's base weights: those that a server has sent are gone"
            f" or damaged, and seed={self.options.seed} gives others here, as another version of"
            " torch may"
        )

    def run(self, job: Callable[[], Result], private: bool) -> Result:
        """The result of `job`, which is repeated in smaller micro-batches while it does not fit.

        It is repeated from its beginning and not from the step that failed, so that the bits of its
        result follow from the job and the size of its micro-batches. `private`: its steps are
        those of privacy=example. Raises OutOfMemory if one sequence does not fit.
        """
        while True:
            size = 0  # smaller micro-batches do not help if the trainer itself does not fit
            try:
                size = self.trainer.private.examples if private else self.micro_batch
                return job()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if size <= 1:
                    split = size == 1 < self.options.local.batch_size
                    raise OutOfMemory(self.options, split) from error
            # here the exception is gone, which kept the tensors of the job
            self._halve(size)

    def _halve(self, size: int) -> None:
        self.micro_batch = -(-size // 2)
        device = self.trainer.compute.device
        self._trainer = None  # with all that it may keep of the failed job
        free_memory(device)
        log.warning(
            "a micro-batch of %d sequences does not fit into the memory (%s): jobs of local."
            "batch_size=%d are computed in micro-batches of %d from now on, which gives the same"
            " updates, up to rounding",
            size,
            device,
            self.options.local.batch_size,
            self.micro_batch,
        )
