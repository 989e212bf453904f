"""Examples as tensors: padded to one shape, and combined in batches for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedgpt.data.batches import IGNORE

# Tensors whose row i belongs to example i: the inputs, (batch, time) int64 token ids; the targets,
# int64, IGNORE for positions without a loss; then other tensors that a task needs in its loss.
Batch = tuple[Tensor, ...]


class BatchSource(Protocol):
    """An endless stream of training batches, all of one shape."""

    def next(self) -> Batch:
        """The next batch."""
        ...


class ExampleSet(Protocol):
    """A fixed list of examples, read by number."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch:
        """The examples with these numbers, in this order."""
        ...


@dataclass(frozen=True, eq=False)
class Examples:
    """An example set in memory.

    >>> Examples.padded([([1, 2], [2, 3]), ([4], [5])], width=2).take(np.array([1, 0]))
    (tensor([[4, 0],
            [1, 2]]), tensor([[   5, -100],
            [   2,    3]]))
    """

    rows: Batch

    @classmethod
    def padded(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> Examples:
        """Inputs and targets of equal length, at most `width`, padded with 0 and IGNORE.

        A pair without a counted target is dropped, because it has no loss. Raises ValueError for
        wrong lengths, and if no example remains.
        """
        inputs, targets = [], []
        for each, wanted in pairs:
            if len(each) != len(wanted) or len(each) > width:
                raise ValueError(
                    f"an example of {len(each)} inputs and {len(wanted)} targets: as many of both,"
                    f" and at most {width}"
                )
            if not np.any(np.asarray(wanted) != IGNORE):
                continue
            rest = (0, width - len(each))
            inputs.append(np.pad(np.asarray(each, np.int64), rest))
            targets.append(np.pad(np.asarray(wanted, np.int64), rest, constant_values=IGNORE))
        if not inputs:
            raise ValueError("the text has no example with a counted target")
        return cls((torch.from_numpy(np.stack(inputs)), torch.from_numpy(np.stack(targets))))

    def __len__(self) -> int:
        return len(self.rows[0])

    def take(self, indices: np.ndarray) -> Batch:
        """The examples with these numbers, in this order."""
        chosen = torch.from_numpy(indices)
        return tuple(tensor[chosen] for tensor in self.rows)

    def spread(self, tokens: int) -> Examples:
        """Examples that span about `tokens` input positions, evenly over all; 0: all of them."""
        width = self.rows[0].size(1)
        # the last example may be shorter; with few targets in each, only the positions tell
        span = max((len(self) - 1) * width + 1, int(counted((self.rows[0], self.rows[1]))))
        if not 0 < tokens <= span:
            return self
        count = max(1, tokens // width)
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return Examples(self.take(np.unique(chosen)))


class Epochs:
    """All examples in a random order, then again in another one; same seed, same batches."""

    def __init__(self, examples: ExampleSet, batch_size: int, seed: int):
        self._examples, self._batch_size = examples, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)  # remaining examples of the current epoch

    def next(self) -> Batch:
        """The next batch; if the epoch has too few examples for it, the next epoch begins."""
        while len(self._order) < self._batch_size:
            epoch = torch.randperm(len(self._examples), generator=self._generator)
            self._order = torch.cat([self._order, epoch])
        chosen, self._order = self._order.split(
            [self._batch_size, len(self._order) - self._batch_size]
        )
        return self._examples.take(chosen.numpy())


def counted(batch: Batch) -> Tensor:
    """The number of targets that count, a 0-d int64 tensor."""
    return (batch[1] != IGNORE).sum()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`."""
    return tuple(tensor.to(device) for tensor in batch)
