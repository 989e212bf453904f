"""AdamW on the flat vector: one fused kernel for the decayed range, one for the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedgpt.core.options import LocalOptions


@dataclass(frozen=True)
class Moments:
    """The state of Adam at one client."""

    first: torch.Tensor  # (parameters,) float32
    second: torch.Tensor  # (parameters,) float32
    steps: int  # number of optimiser steps so far


class FlatAdamW:
    """AdamW (Loshchilov & Hutter, 1711.05101) on one parameter and one gradient vector.

    The first `decayed` elements take weight decay. It calls the kernel of
    torch.optim.AdamW(fused=True) and gives the same bits. Constructing torch's own optimiser would
    import torch's compiler, which takes 1.8 s in every worker.
    """

    def __init__(
        self, params: torch.Tensor, grad: torch.Tensor, decayed: int, options: LocalOptions
    ):
        self.params, self.grad, self.options = params, grad, options
        self.first, self.second = torch.zeros_like(params), torch.zeros_like(params)
        # the kernel takes the number of steps as a float tensor
        self._steps = torch.zeros((), device=params.device)
        self._ranges = (
            (slice(0, decayed), options.weight_decay),
            (slice(decayed, params.numel()), 0.0),
        )

    def load(self, moments: Moments | None) -> None:
        """Start from a client's moments; None: from zero."""
        if moments is None:
            self.first.zero_()
            self.second.zero_()
        else:
            self.first.copy_(moments.first)
            self.second.copy_(moments.second)
        self._steps.fill_(0 if moments is None else moments.steps)

    def moments(self) -> Moments:
        """The current moments, in buffers that the next job overwrites."""
        return Moments(self.first, self.second, int(self._steps.item()))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One AdamW step on the gradient vector."""
        self._steps += 1
        for elements, decay in self._ranges:
            if elements.start == elements.stop:
                continue
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [self.params[elements]],
                [self.grad[elements]],
                [self.first[elements]],
                [self.second[elements]],
                [],
                [self._steps],
                amsgrad=False,
                lr=lr,
                beta1=self.options.beta1,
                beta2=self.options.beta2,
                weight_decay=decay,
                eps=1e-8,
                maximize=False,
            )
