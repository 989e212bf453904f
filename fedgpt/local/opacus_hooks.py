"""Per-example gradients by Opacus' hooks: the reference implementation for book-keeping."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fedgpt.core.flat import FlatParams


class OpacusHooks:
    """BookKeeping with gradients from Opacus' hooks mode, which is exact for tied weights."""

    def __init__(self, model: nn.Module, layout: FlatParams):
        from opacus.grad_sample import GradSampleModule

        self.layout = layout
        self._parameters = dict(model.named_parameters())
        # with "mean" Opacus would multiply by the batch size; these losses are of single examples
        # and are summed
        self._hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum")
        self._hooked.disable_hooks()

    def add_clipped(
        self, losses: Callable[[], Tensor], clip: float, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See BookKeeping.add_clipped."""
        self._hooked.enable_hooks()
        try:
            values = losses()
            # torch warns that an embedding's input has no gradient, which is not needed
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                values.sum().backward()
        finally:
            self._hooked.disable_hooks()
        with torch.no_grad():
            rows = {
                name: self._taken(p).flatten(1)
                for name, p in self._parameters.items()
                if p.requires_grad
            }
            norms = torch.stack([row.norm(dim=1) for row in rows.values()]).norm(dim=0)
            finite = norms.isfinite()
            factors = torch.where(finite, (clip / norms).clamp(max=1.0), 0.0)
            views = self.layout.views(total)
            for name, row in rows.items():
                row[~finite] = 0
                views[name].view(-1).add_(factors @ row)
        return norms, values.detach()

    def _taken(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's gradients, (batch, *shape), summed over the uses of a tied weight."""
        sample = getattr(parameter, "grad_sample")  # noqa: B009 - an attribute that Opacus adds
        parameter.grad = None
        parameter.grad_sample = None  # pyright: ignore[reportAttributeAccessIssue]
        return torch.stack(sample).sum(0) if isinstance(sample, list) else sample
