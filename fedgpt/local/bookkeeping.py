"""Per-example gradients by book-keeping (Bu et al. 2022, arXiv 2210.00038): clipped sums of them
in one backward pass.

Forward hooks keep the input a and the output of each layer. One autograd pass gives the gradients g
of the outputs, not those of the weights. As the loss of example i depends on example i alone, row i
of g belongs to it, and its weight gradients follow layer by layer: a Linear's is g_i^T a_i, an
Embedding's adds g_i to the rows of its tokens, those of norms and biases are sums over time. The
norm of all gradients of an example gives its clip factor. Computing the per-example gradients costs
about as much as computing the gradient of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedgpt.core.flat import FlatParams


class Unsupported(TypeError):
    """A module, or an option of a module, whose per-example gradients are not implemented."""


@dataclass
class Use:
    """One call of a layer in the forward pass."""

    module: nn.Module
    input: Tensor
    output: Tensor


class BookKeeping:
    """Clipped sums of per-example gradients of a model whose parameters lie in one flat vector.

    It supports Linear, Embedding, LayerNorm and RMSNorm. It raises Unsupported for a model with
    other parameters, and for inputs without a batch dimension, because the gradient of positions
    that all examples share cannot be divided among the examples.
    """

    def __init__(self, model: nn.Module, layout: FlatParams):
        self.model, self.layout = model, layout
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._uses: list[Use] = []
        # parameter -> (examples, *shape), reused: new memory costs as much time as the product
        self._buffers: dict[str, Tensor] = {}
        leaves = [
            m for m in model.modules() if any(p is not None for p in m.parameters(recurse=False))
        ]
        for module in leaves:
            _check(module)
        self._leaves = [
            m for m in leaves if any(p.requires_grad for p in m.parameters(recurse=False))
        ]

    def add_clipped(
        self, losses: Callable[[], Tensor], clip: float, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add every example's gradient, scaled to norm `clip` at most, to the flat vector `total`.

        `losses` runs the model and returns the loss of each example, (batch,). An example whose
        gradient is not finite adds nothing. Returns the norms before clipping and the losses,
        (batch,) each.
        """
        with torch.no_grad():
            examples, values = self.gradients(losses)
            norms = self._norms(examples)
            factors = (clip / norms).clamp(max=1.0).nan_to_num(0.0, 0.0, 0.0) * norms.isfinite()
            self._sum(examples, factors, total)
        return norms, values

    @torch.enable_grad()
    def gradients(self, losses: Callable[[], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients by example, parameter -> (batch, *shape), and losses, (batch,).

        The next call overwrites the gradients.
        """
        handles = [module.register_forward_hook(self._keep) for module in self._leaves]
        try:
            values = losses()
            grads = torch.autograd.grad(values.sum(), [use.output for use in self._uses])
            with torch.no_grad():
                return self._examples(grads, len(values)), values.detach()
        finally:
            for handle in handles:
                handle.remove()
            self._uses.clear()

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._uses.append(Use(module, args[0].detach(), output))

    def _examples(self, grads: tuple[Tensor, ...], batch: int) -> dict[str, Tensor]:
        """Parameter -> (batch, *shape): its gradient for each example, summed over its uses."""
        found: dict[str, Tensor] = {}
        # embeddings come last, because they add rows to the gradient of a tied head
        lookups: list[tuple[str, Tensor, Tensor]] = []
        for use, grad in zip(self._uses, grads, strict=True):
            if len(use.input) != batch or use.input.dim() != (
                2 if isinstance(use.module, nn.Embedding) else 3
            ):
                shape = tuple(use.input.shape)
                raise Unsupported(
                    f"{type(use.module).__name__} got {shape}: not (batch, time, ...) of {batch}"
                    " examples"
                )
            if isinstance(use.module, nn.Embedding):
                lookups.append((self._names[id(use.module.weight)], use.input, grad))
                continue
            self._add(found, use.module, use.input, grad)
        for name, indices, grad in lookups:
            if name not in found:
                found[name] = self._buffer(name, grad, batch).zero_()
            rows, width = found[name].shape[1:]
            at = (
                indices.flatten(1) + torch.arange(batch, device=indices.device)[:, None] * rows
            ).flatten()
            found[name].view(-1, width).index_add_(0, at, grad.reshape(-1, width))
        return found

    def _add(self, found: dict[str, Tensor], module: nn.Module, a: Tensor, g: Tensor) -> None:
        """The gradients of one use of a layer: a (batch, time, in), g (batch, time, out)."""
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, nn.Parameter), "guaranteed by _check"
        if weight.requires_grad:
            name = self._names[id(weight)]
            if not isinstance(module, nn.Linear):
                _into(found, name, (_normalized(module, a) * g).sum(1))
            elif name in found:
                found[name].baddbmm_(g.transpose(1, 2), a)
            else:
                found[name] = torch.bmm(g.transpose(1, 2), a, out=self._buffer(name, g, len(g)))
        if bias is not None and bias.requires_grad:
            _into(found, self._names[id(bias)], g.sum(1))

    def _buffer(self, name: str, like: Tensor, batch: int) -> Tensor:
        if name not in self._buffers or len(self._buffers[name]) < batch:
            self._buffers[name] = like.new_empty(
                batch, *self.layout.shapes[self.layout.names.index(name)]
            )
        return self._buffers[name][:batch]

    def _norms(self, examples: dict[str, Tensor]) -> Tensor:
        squares = [
            torch.linalg.vector_norm(g.flatten(1), dim=1).square() for g in examples.values()
        ]
        return torch.stack(squares).sum(0).sqrt()

    def _sum(self, examples: dict[str, Tensor], factors: Tensor, total: Tensor) -> None:
        all_finite = bool((factors > 0).all())
        views = self.layout.views(total)
        for name, gradients in examples.items():
            rows = gradients.flatten(1)
            if not all_finite:  # 0 * NaN is NaN, so excluded rows must be set to 0
                rows[factors == 0] = 0
            views[name].view(-1).addmv_(rows.t(), factors)


def _into(found: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    found[name] = found[name].add_(gradient) if name in found else gradient


def _normalized(norm: nn.Module, a: Tensor) -> Tensor:
    """The normalised input of a norm, before the multiplication with its weight."""
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(a, list(norm.normalized_shape), eps=norm.eps)
    assert isinstance(norm, nn.LayerNorm), "guaranteed by _check"
    return F.layer_norm(a, list(norm.normalized_shape), eps=norm.eps)


def _check(module: nn.Module) -> None:
    """Raise Unsupported for a module with parameters that has no rule."""
    kind = type(module)
    if kind not in (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm):
        raise Unsupported(f"no per-example rule for the parameters of {kind.__name__}")
    if isinstance(module, nn.Embedding):
        options = {
            "padding_idx": module.padding_idx is not None,
            "max_norm": module.max_norm is not None,
            "scale_grad_by_freq": module.scale_grad_by_freq,
            "sparse": module.sparse,
        }
        if used := [name for name, on in options.items() if on]:
            raise Unsupported(f"no per-example rule for an Embedding with {', '.join(used)}")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) != 1:
        raise Unsupported(f"no per-example rule for a norm over {module.normalized_shape}")
