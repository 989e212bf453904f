"""The gradient of a step: the mean over batches, written into one flat vector.

A batch that does not fit into memory is computed in several micro-batches.

On a GPU the passes of a batch are captured once as a CUDA graph and replayed, because with a small
model the GPU is idle between kernel launches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedgpt.core.flat import FlatParams
from fedgpt.data.examples import Batch, BatchSource, counted, on_device
from fedgpt.model.gpt import GPT
from fedgpt.tasks.base import Task

WARM_UP = 3  # passes before the capture, in which libraries allocate memory


class BatchGradient:
    """The mean loss of a batch and its gradient with respect to every trainable parameter."""

    def __init__(
        self, model: GPT, task: Task, layout: FlatParams, grad: Tensor, at_once: int | None = None
    ):
        """`grad` is the flat gradient vector, of the layout `layout`.

        A batch of more than `at_once` examples is computed in parts; None: in one.
        """
        self.model, self.task, self.grad, self.at_once = model, task, grad, at_once
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        views = layout.views(grad)
        self._leaves, self._views = list(trained.values()), [views[name] for name in trained]

    def __call__(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a scalar, and the gradients in the order of the trainable parameters."""
        batch = on_device(batch, self.grad.device)
        loss = self.task.loss(self.task.forward(self.model, batch), batch)
        return loss.detach(), torch.autograd.grad(loss, self._leaves)

    def fill(self, source: BatchSource, count: int) -> Tensor:
        """Write the mean gradient of `count` batches into `grad`; returns their mean loss."""
        copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]  # no public form
        total, first = torch.zeros((), device=self.grad.device), True
        for _ in range(count):
            for part, share in self._parts(source.next()):
                loss, grads = self(part)
                if first:
                    copy(self._views, grads)
                    if share != 1:
                        self.grad.mul_(share)
                else:
                    for view, grad in zip(self._views, grads, strict=True):
                        view.add_(grad, alpha=share)
                total.add_(loss, alpha=share)
                first = False
                del grads  # before those of the next part
        if count > 1:
            self.grad.div_(count)
        return total / count

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """The parts of a batch, each with its share of the targets that count.

        The loss of the batch is the sum of share x loss. A part without such targets has no loss
        and is left out.
        """
        if self.at_once is None or len(batch[0]) <= self.at_once:
            yield batch, 1.0
            return
        targets = counted(batch).double()
        for part in zip(*(tensor.split(self.at_once) for tensor in batch), strict=True):
            if share := float(counted(part) / targets):
                yield part, share


class RecordedGradient(BatchGradient):
    """BatchGradient as a CUDA graph, for batches of one shape.

    A step of the nano model takes 1 ms on an H100, but launching its kernels takes a CPU core 10
    ms. The first batch is captured. A graph reads and writes fixed addresses: the parameters must
    not move, and the next call overwrites the returned tensors. Dropout draws new numbers in every
    replay, from torch's generator.
    """

    def __init__(
        self, model: GPT, task: Task, layout: FlatParams, grad: Tensor, at_once: int | None = None
    ):
        super().__init__(model, task, layout, grad, at_once)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = ()
        self._recorded: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __call__(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients as in BatchGradient, for a batch on any device.

        Raises ValueError for a batch of another shape than the first one.
        """
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None and self._recorded is not None
        shapes = [[tuple(tensor.shape) for tensor in each] for each in (self._batch, batch)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"recorded for batches of {shapes[0]}, this one is {shapes[1]}")
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor)
        self._graph.replay()
        return self._recorded

    def _record(self, batch: Batch) -> None:
        device = self.grad.device
        self._batch = tuple(tensor.to(device, copy=True) for tensor in batch)
        self._graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        # the capture also draws dropout, and this job's seed is already set
        with torch.random.fork_rng([device]):
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    super().__call__(self._batch)
            torch.cuda.current_stream(device).wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._recorded = super().__call__(self._batch)
