"""From a shard's tokens to the inputs and targets of a model.

    tokens    t0 t1 t2 t3 t4 t5 ..
    inputs    t0 t1 t2 t3                a window of block_size = 4
    targets      t1 t2 t3 t4             each input's next token

Training draws random windows (Batches). Evaluation reads every token once (windows). Differential
privacy needs windows that share no token (Blocks).
"""

from __future__ import annotations

import numpy as np
import torch

IGNORE = -100  # target that torch's cross_entropy ignores by default


class Batches:
    """An endless stream of random windows over one shard; same seed, same batches."""

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int):
        """Copy `tokens` (n,) into memory; raises ValueError if there are fewer than one window."""
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for block_size={block_size}: a window needs"
                f" {block_size + 1}"
            )
        self._tokens = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # (n,)
        self._offsets = torch.arange(block_size + 1)
        self._starts = len(tokens) - block_size  # number of places where a window can start
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of the next batch, each (batch_size, block_size) int64."""
        starts = torch.randint(self._starts, (self._batch_size, 1), generator=self._generator)
        chunk = self._tokens[starts + self._offsets]  # (batch, block_size + 1)
        return chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()


def windows(tokens: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets, each (windows, block_size) int64.

    Every token but the first is a target exactly once. The last window is padded with input 0 and
    target IGNORE, so cross_entropy and a mask `targets >= 0` both ignore the padding. Raises
    ValueError for fewer than two tokens.
    """
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens have no target: evaluation needs at least 2")
    stream = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    targets = len(stream) - 1
    padding = -targets % block_size
    x = torch.nn.functional.pad(stream[:-1], (0, padding), value=0)
    y = torch.nn.functional.pad(stream[1:], (0, padding), value=IGNORE)
    return x.view(-1, block_size), y.view(-1, block_size)


class Blocks:
    """A shard cut once, from its start, into blocks of block_size + 1 tokens: the units of privacy.

    No two blocks share a token. With random or overlapping windows one token would be in many
    units, and the protection of one unit would not protect that token.
    """

    def __init__(self, tokens: np.ndarray, block_size: int):
        """Cut `tokens` (n,) into blocks; an incomplete last block is dropped.

        Raises ValueError if there are too few tokens for one block.
        """
        count = len(tokens) // (block_size + 1)
        if not count:
            raise ValueError(
                f"{len(tokens)} tokens do not fill a block of block_size={block_size} and a target"
            )
        filled = np.asarray(tokens[: count * (block_size + 1)], dtype=np.int64)
        self._blocks = torch.from_numpy(filled.reshape(count, block_size + 1))

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets of some blocks, each (len(indices), block_size) int64."""
        chosen = self._blocks[torch.from_numpy(indices)]
        return chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous()
