"""Loss and gradients of a batch; on a GPU recorded once, because a small model leaves it waiting
for launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedgpt.model.gpt import GPT

WARM_UP = 3  # passes before a recording, in which libraries make what cannot be made in it


class BatchGradient:
    """The mean loss of a batch and its gradient with respect to every trainable parameter."""

    def __init__(self, model: GPT):
        self.model = model
        self._leaves = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """inputs and targets (batch, time) int64 -> scalar, and gradients in the order of the
        trainable ones of `model.parameters()`.
        """
        loss = self.model.loss(inputs, targets)
        return loss.detach(), torch.autograd.grad(loss, self._leaves)


class RecordedGradient(BatchGradient):
    """As BatchGradient, for batches of one shape: a CUDA graph, whose kernels take one launch all
    together.

    A step of the nano model takes an H100 1 ms, and one CPU core 10 ms to launch kernel by kernel.
    The recording reads and writes at fixed places: the parameters must stay where they are, and
    what a call returns is overwritten by the next. Dropout draws anew at every call, as torch's
    generator tells it.
    """

    def __init__(self, model: GPT, batch_size: int):
        super().__init__(model)
        device = self._leaves[0].device
        shape = (batch_size, model.options.block_size)
        self._inputs, self._targets = (
            torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2)
        )
        self._graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        # dropout draws here, too, and the next job's seed is set already
        with torch.random.fork_rng([device]):
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    super().__call__(self._inputs, self._targets)
            torch.cuda.current_stream(device).wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._recorded = super().__call__(self._inputs, self._targets)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As BatchGradient, of a batch on any device; raises ValueError for one of another
        shape.
        """
        if not inputs.shape == targets.shape == self._inputs.shape:
            raise ValueError(
                f"recorded for batches of {tuple(self._inputs.shape)}, this one is"
                f" {tuple(inputs.shape)}"
            )
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        return self._recorded
