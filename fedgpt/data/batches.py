"""From a shard's tokens to what a model is fed: random training batches, and windows for
evaluation.
"""

from __future__ import annotations

import numpy as np
import torch

IGNORE = -100  # target that torch's cross_entropy leaves out by default


class Batches:
    """An endless stream of random windows over one shard; same seed, same batches."""

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int):
        """Copy `tokens` (n,) into memory once; raises ValueError where they do not fill one
        window.
        """
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for block_size={block_size}: a window needs"
                f" {block_size + 1}"
            )
        self._tokens = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # (n,)
        self._offsets = torch.arange(block_size + 1)
        self._starts = len(tokens) - block_size  # how many places a window can start at
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (batch, block_size) int64; targets are the inputs one token
        later.
        """
        starts = torch.randint(self._starts, (self._batch_size, 1), generator=self._generator)
        chunk = self._tokens[starts + self._offsets]  # (batch, block_size + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def windows(tokens: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (windows, block_size) int64, with every token but the first a target
    exactly once.

    The last window is padded: input 0, target IGNORE, so cross_entropy and a mask `targets >= 0`
    both leave the padding out. Raises ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens hold no target: evaluation needs at least 2")
    stream = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    targets = len(stream) - 1
    padding = -targets % block_size
    x = torch.nn.functional.pad(stream[:-1], (0, padding), value=0)
    y = torch.nn.functional.pad(stream[1:], (0, padding), value=IGNORE)
    return x.view(-1, block_size), y.view(-1, block_size)


class Blocks:
    """A shard cut once, from its start, into blocks of block_size + 1 tokens that share none: the
    units of privacy.

    Random or overlapping windows would put one token into many units, and what protects a unit
    would not protect it.
    """

    def __init__(self, tokens: np.ndarray, block_size: int):
        """Cut `tokens` (n,); the rest that fills no block is left out. Raises ValueError where
        there is no block.
        """
        count = len(tokens) // (block_size + 1)
        if not count:
            raise ValueError(
                f"{len(tokens)} tokens are no block of block_size={block_size} and a target"
            )
        whole = np.asarray(tokens[: count * (block_size + 1)], dtype=np.int64)
        self._blocks = torch.from_numpy(whole.reshape(count, block_size + 1))

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of some blocks, each (len(indices), block_size) int64."""
        chosen = self._blocks[torch.from_numpy(indices)]
        return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
