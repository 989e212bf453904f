"""The interface of a task: what local training, evaluation and a run's figures must know of it.

A task never sees options, clients or the network. It turns documents into examples, examples and a
model's outputs into losses, and sums of these into named scores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fedgpt.core.errors import ConfigError
from fedgpt.core.options import RunOptions
from fedgpt.core.score import Score, Scoring
from fedgpt.core.targets import Members, calling, typed_class
from fedgpt.data.batches import IGNORE
from fedgpt.data.examples import Batch, BatchSource, Epochs, Examples, ExampleSet, counted
from fedgpt.data.text import Text
from fedgpt.data.tokenizer import Tokenizer
from fedgpt.model.generate import generate
from fedgpt.model.gpt import GPT, cross_entropy


@dataclass(frozen=True)
class SampleRequest:
    """What a sample may depend on."""

    held_out: Text
    prompt: str | None  # evaluate.prompt; None: the task chooses
    opening: str  # the corpus' own prompt
    tokens: int  # at most so many are written
    seed: int


@dataclass(frozen=True)
class Sample:
    """A text that a model wrote."""

    prompt: str
    written: str


@dataclass(frozen=True)
class Task(ABC):
    """A kind of learning problem. Its options are its fields; what differs is overridden.

    Only `examples` has no default: it says which tokens of a document are given and which count.
    This task continues documents, and only the second half of each of them counts:

    >>> @dataclass(frozen=True)
    ... class SecondHalf(Task):
    ...     def examples(self, tokens, label, block_size):
    ...         tokens = tokens[: block_size + 1].astype(int)
    ...         targets = tokens[1:].copy()
    ...         targets[: len(targets) // 2] = IGNORE
    ...         yield tokens[:-1], targets
    >>> task, text = SecondHalf(), Text.of([[1, 2, 3, 4, 5], [6, 7, 8]])
    >>> batch = task.held_out(text, block_size=4).take(np.array([0, 1]))
    >>> batch[1].tolist()
    [[-100, -100, 4, 5], [-100, 8, -100, -100]]

    A model's outputs give the loss of the batch, that of each example, and held-out scores. This
    model holds its ten tokens for equally likely, log(10) = 2.303:

    >>> outputs = F.one_hot(batch[0], 10).float() * 0
    >>> round(task.loss(outputs, batch).item(), 3), task.example_losses(outputs, batch).shape
    (2.303, torch.Size([2]))
    >>> totals = {name: float(sum) for name, sum in task.tally(outputs, batch, None).items()}
    >>> {name: round(score, 3) for name, score in task.scores(totals).items()}
    {'loss': 2.303, 'perplexity': 10.0}
    """

    # the names of the scores; ONE is the score that best weights, rollback and sweeps go by
    scoring: ClassVar[Scoring] = Scoring(Score("loss"), ("loss", "perplexity"))
    # whether `units` are blocks of block_size + 1 tokens, as the accounting of privacy=example
    # counts them
    units_are_blocks: ClassVar[bool] = False

    # ---- from text to batches

    @abstractmethod
    def examples(
        self, tokens: np.ndarray, label: str, block_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of each example of one document, of equal length up to block_size.

        Position t of the model's outputs should give `targets[t]` from `inputs[: t + 1]`; IGNORE
        where nothing counts.
        """

    def batches(self, text: Text, block_size: int, batch_size: int, seed: int) -> BatchSource:
        """What a client trains on, a function of the arguments alone.

        Raises ValueError where the text is not enough for one batch.
        """
        return Epochs(self.units(text, block_size), batch_size, seed)

    def units(self, text: Text, block_size: int) -> ExampleSet:
        """What privacy=example protects one of: no text is in two of them."""
        return self.held_out(text, block_size)

    def held_out(self, text: Text, block_size: int) -> Examples:
        """What a model is scored on, every counted token of the text once."""
        found = (pair for document in text for pair in self.examples(*document, block_size))
        return Examples.padded(found, block_size)

    # ---- from batches to numbers

    def forward(self, model: GPT, batch: Batch) -> Tensor:
        """What the losses and tallies of a batch are computed from: (batch, time, vocabulary)."""
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean over all counted targets of the batch, a scalar with a gradient."""
        return cross_entropy(outputs, batch[1])

    def example_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """(batch,) the mean over each example's own counted targets; 0 for one without any.

        Entry i depends on example i alone: DP-SGD takes its gradient by itself.
        """
        logits, targets = outputs.flatten(0, 1), batch[1]
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="none")
        counts = (targets != IGNORE).sum(1).clamp(min=1)
        return losses.view(len(targets), -1).sum(1) / counts

    def tally(self, outputs: Tensor, batch: Batch, token_bytes: Tensor | None) -> dict[str, Tensor]:
        """Named 0-d tensors of a held-out batch, which are added up over all batches.

        `token_bytes`, (vocabulary,) int64: bytes of text that each token stands for.
        """
        count = counted(batch)
        return {"nats": self.loss(outputs, batch).detach().double() * count, "tokens": count}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """The scores that `scoring` names, from the tallies added up over the held-out text."""
        loss = totals["nats"] / totals["tokens"]
        # exp overflows from 710 on
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}

    def sample(self, model: GPT, tokenizer: Tokenizer, request: SampleRequest) -> Sample:
        """A text that shows a person what the model has learnt."""
        prompt = request.opening if request.prompt is None else request.prompt
        ids = list(tokenizer.encode(prompt)) or [tokenizer.end]
        how = {"temperature": 0.8, "top_k": 50, "stop": tokenizer.end, "seed": request.seed}
        return Sample(prompt, tokenizer.decode(generate(model, ids, request.tokens, **how)[0]))

    # ---- before a run

    def problems(self, options: RunOptions) -> Iterator[str]:
        """What is wrong with the other options of a run beside this task."""
        if options.privacy.unit == "example" and not self.units_are_blocks:
            yield (
                f"privacy=example: its accounting counts blocks of model.block_size + 1 tokens, and"
                f" task={options.task.name} ({type(self).__name__}) has other examples; take"
                " task=lm, or privacy=client"
            )


TASKS = Members("task", "task.name", Task)


def make_task(options: RunOptions) -> Task:
    """The task that `options.task` names; raises ConfigError where it cannot be built, or where its
    scores have names that they must not have.
    """
    task = TASKS.build(options.task, options.trusted_packages)
    with calling("task", task, "scoring"):
        problem = task.scoring.problem
    if problem:
        raise ConfigError(f"{typed_class('task', task)}: {problem}")
    return task
