"""The trainable parameters of a model are views into ONE contiguous vector.

An update is then one subtraction, an optimiser step one fused kernel, a strategy a few lines of
vector arithmetic and a message one array. The model stays an ordinary nn.Module.

Parameters with requires_grad=False are not in the vector. They are the base weights of the run:
frozen, equal at the server and at every client (compared by digest), and in no job and no update.
Strategies, codecs, privacy and checkpoints use only the vector and ignore the base weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedgpt.core.messages import BaseInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

BYTES = 4  # of a float32 value


@dataclass(frozen=True)
class FlatParams:
    """Layout of the flat vector: name, shape and order of every trainable parameter.

    A tied weight is included once; buffers and frozen parameters are not included. Parameters that
    take weight decay (matrices and embeddings) come first, so that decay applies to one range of
    the vector.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    decayed: int  # number of elements at the start of the vector that take weight decay

    @classmethod
    def of(cls, module: nn.Module) -> FlatParams:
        """Layout of `module`'s trainable parameters: matrices first, otherwise in its own order."""
        params = _trainable(module)
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
        """Short hash of names and shapes, which two sides compare before they exchange vectors."""
        text = json.dumps([self.names, self.shapes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def views(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each parameter as a view of `vector`; raises ValueError if the lengths differ."""
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
    """Make `module`'s trainable parameters views of one new vector; returns layout and vector.

    The vector has the dtype and device of the parameters. Writing to it changes the module. Frozen
    parameters keep their own tensors. Raises ValueError if every parameter is frozen.
    """
    import torch

    layout, params = FlatParams.of(module), _trainable(module)
    if not params:
        raise ValueError("the module has no trainable parameter")
    first = next(iter(params.values()))
    vector = torch.empty(layout.size, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        for name, view in layout.views(vector).items():
            view.copy_(params[name])
            params[name].data = view
    return layout, vector


def frozen_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The base of `module`: name -> tensor of each parameter that is not trainable."""
    # named_parameters leaves out the second name of a tied weight
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def base_digest(base: Mapping[str, torch.Tensor]) -> str:
    """sha256 over name, shape and float32 bytes of each frozen weight; "" if there is none.

    The digest does not depend on the order of the weights, nor on their dtype if float32 represents
    their values exactly.

    >>> import torch
    >>> base_digest({"scale": torch.ones(2)})[:8], base_digest({})
    ('ba7422d9', '')
    """
    if not base:
        return ""
    digest = hashlib.sha256()
    for name in sorted(base):
        weights = base[name].detach().cpu().float().contiguous()
        digest.update(json.dumps([name, list(weights.shape)]).encode())
        digest.update(weights.numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()


def base_info(base: Mapping[str, torch.Tensor]) -> BaseInfo:
    """What identifies the frozen weights, before any of their values is sent."""
    shapes = {name: tuple(base[name].shape) for name in sorted(base)}
    return BaseInfo(base_digest(base), *layout_of(shapes))


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    """(digest of names and shapes, bytes of all values in float32) of weights, sorted by name."""
    layout = FlatParams(tuple(shapes), tuple(shapes.values()), 0)
    return layout.digest, BYTES * layout.size


def base_values(base: Mapping[str, torch.Tensor], begin: int, end: int) -> np.ndarray:
    """Bytes `begin` to `end` of all frozen weights: float32, little-endian, in the order of names.

    >>> import torch
    >>> base_values({"b": torch.ones(1), "a": torch.zeros(2)}, 6, 99).tolist()
    [0, 0, 0, 0, 128, 63]
    """
    parts, first = [], 0
    for name in sorted(base):
        size = BYTES * base[name].numel()
        if first < end and begin < first + size:
            values = (
                base[name].detach().cpu().float().contiguous().numpy().astype("<f4", copy=False)
            )
            inside = slice(max(0, begin - first), min(size, end - first))
            parts.append(values.reshape(-1).view(np.uint8)[inside])
        first += size
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
