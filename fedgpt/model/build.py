"""Makes a run's model, and freezes the parameters that the run does not train.

`model.trainable` selects parameters by name. The selected parameters are the flat vector of
core/flat.py, which the server averages and clients send. The others are the base weights of the
run: they get their values here and do not change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedgpt.core.flat import frozen_weights
from fedgpt.core.options import ModelOptions
from fedgpt.model.gpt import GPT
from fedgpt.model.shape import is_trainable


def build_model(
    options: ModelOptions, vocab_size: int, base: Mapping[str, Tensor] | None = None
) -> GPT:
    """A float32 GPT on the CPU whose frozen parameters are those of `base`.

    The trainable parameters have initial values that the caller replaces after `flatten`. Raises
    ValueError unless `base` has exactly the parameters that `model.trainable` does not select.
    """
    model = GPT(options, vocab_size)
    freeze(model, options.trainable)
    frozen, base = frozen_weights(model), base or {}
    if frozen.keys() != base.keys():
        differing = sorted(frozen.keys() ^ base.keys())
        raise ValueError(
            f"the model has {len(frozen)} frozen parameters, the base holds {len(base)} weights;"
            f" they differ in {', '.join(differing[:3])}"
        )
    with torch.no_grad():
        for name, parameter in frozen.items():
            parameter.copy_(base[name])
    return model


def freeze(model: GPT, trainable: Sequence[str]) -> None:
    """Freeze all parameters that the patterns `trainable` do not select; none, if there is no
    pattern.

    A tied weight is one parameter: it is trainable if either of its names is selected.
    """
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    for parameter, its_names in names.items():
        parameter.requires_grad_(is_trainable(its_names, trainable))
