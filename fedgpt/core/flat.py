"""All parameters of a model are views into ONE contiguous vector.

An update is then one subtraction, an optimiser step one fused kernel, a strategy a few lines of
vector arithmetic and a message one array. The model stays an ordinary nn.Module.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class FlatParams:
    """Layout of the flat vector: name, shape and offset of every parameter; tied weights stand
    once, buffers never.

    Parameters that weight decay applies to (matrices and embeddings) come first, so decay is one
    range.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    decayed: int  # the first `decayed` elements take weight decay

    @classmethod
    def of(cls, module: nn.Module) -> FlatParams:
        """Layout of `module`'s parameters; matrices first, each group in the module's own order."""
        # named_parameters leaves out the second name of a tied weight
        params = dict(module.named_parameters())
        matrices = [name for name, p in params.items() if p.dim() >= 2]
        vectors = [name for name, p in params.items() if p.dim() < 2]
        names = (*matrices, *vectors)
        shapes = tuple(tuple(params[name].shape) for name in names)
        return cls(names, shapes, sum(params[name].numel() for name in matrices))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """Short hash that two sides compare before they exchange vectors."""
        text = json.dumps([self.names, self.shapes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each parameter as a view of `vector`; raises ValueError where the length does not fit."""
        if vector.numel() != self.size:
            raise ValueError(
                f"a vector of {vector.numel()} elements does not fit a layout of {self.size}"
            )
        parts = vector.split(list(self.sizes))
        return {
            n: part.view(shape)
            for n, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }


def flatten(module: nn.Module) -> tuple[FlatParams, torch.Tensor]:
    """Move `module`'s parameters into one new vector and make them views of it; returns layout and
    vector.

    The vector has the dtype and device of the parameters; writing to it changes the module.
    """
    import torch

    layout = FlatParams.of(module)
    params = dict(module.named_parameters())
    first = next(iter(params.values()))
    vector = torch.empty(layout.size, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        for name, view in layout.views(vector).items():
            view.copy_(params[name])
            params[name].data = view
    return layout, vector
