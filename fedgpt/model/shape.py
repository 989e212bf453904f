"""The parameters of a model and those that are trained, computed from its options.

Free of torch, so that `fedgpt --help` and the check of a configuration stay fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from fedgpt.core.errors import nearest
from fedgpt.core.options import ModelOptions

NORM_EPS = 1e-5  # GPT-2's; torch's default for RMSNorm depends on the dtype and is 8e-3 in bf16
ROTARY_BASE = 10_000.0  # base of the rotation angles; larger values rotate more slowly


def parameter_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `GPT(options, vocab_size)`, in the module's order.

    A tied head is also listed under its own name, so a count must exclude `lm_head.weight`.
    """
    width = options.n_embd
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab_size, width)}
    if options.positions == "learned":
        shapes["transformer.wpe.weight"] = (options.block_size, width)
    for layer in range(options.n_layer):
        block = f"transformer.h.{layer}"
        shapes |= _norm(f"{block}.ln_1", options)
        shapes |= _linear(f"{block}.attn.c_attn", (3 * width, width), options)
        shapes |= _linear(f"{block}.attn.c_proj", (width, width), options)
        shapes |= _norm(f"{block}.ln_2", options)
        shapes |= _linear(f"{block}.mlp.c_fc", (4 * width, width), options)
        shapes |= _linear(f"{block}.mlp.c_proj", (width, 4 * width), options)
    shapes |= _norm("transformer.ln_f", options)
    return shapes | {"lm_head.weight": (vocab_size, width)}


def count_parameters(options: ModelOptions, vocab_size: int) -> int:
    """Number of all parameters, trainable or frozen; a tied head counts once."""
    shapes = parameter_shapes(options, vocab_size)
    if options.tie:
        del shapes["lm_head.weight"]
    return sum(map(math.prod, shapes.values()))


def count_trainable(options: ModelOptions, vocab_size: int) -> int:
    """Number of trainable parameters: elements of the flat vector, and of every update."""
    frozen = frozen_shapes(options, vocab_size)
    return count_parameters(options, vocab_size) - sum(map(math.prod, frozen.values()))


def frozen_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter that is not trainable, sorted by name; a tied weight once.

    >>> small = ModelOptions(n_layer=1, n_head=1, n_embd=2, trainable=["transformer.h.*"])
    >>> list(frozen_shapes(small, vocab_size=5))[:2]
    ['transformer.ln_f.bias', 'transformer.ln_f.weight']
    """
    shapes = parameter_shapes(options, vocab_size)
    names = {name: [name] for name in shapes}
    if options.tie:
        names["transformer.wte.weight"] += names.pop("lm_head.weight")
    frozen = [name for name in names if not is_trainable(names[name], options.trainable)]
    return {name: shapes[name] for name in sorted(frozen)}


def count_activations(options: ModelOptions, vocab_size: int) -> int:
    """Numbers that a training step keeps for each token until its backward pass, at least.

    These are its logits, and with all parameters trained what each block keeps: two residuals (C
    channels each), the normalised inputs of attention and MLP (2 C), queries, keys and values
    (3 C), the output of attention (C), and the MLP's values before and after the GELU (8 C).
    """
    block = 0 if options.trainable else 16 * options.n_embd
    return options.n_layer * block + vocab_size


def is_trainable(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether `model.trainable=patterns` selects a parameter that has these names.

    No pattern selects every parameter. `*` stands for any characters, dots among them. A tied
    weight has two names and is selected by either.

    >>> is_trainable(["transformer.h.1.ln_1.weight"], ["transformer.h.1.*"])
    True
    """
    return not patterns or any(fnmatchcase(name, p) for name in names for p in patterns)


def trainable_problems(options: ModelOptions) -> Iterator[str]:
    """Yield a message for each pattern that selects no parameter."""
    if not options.trainable:
        return
    names = list(parameter_shapes(options, vocab_size=1))
    # usual patterns: the name of one parameter, or a module's name and `.*`
    known = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(f"{'.'.join(parts[:end])}.*" for end in range(1, len(parts)))
    for pattern in options.trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            yield (
                f"model.trainable=[{pattern or repr('')}]: selects no parameter of this model; take"
                f" names such as {names[0]}, with * for any characters{nearest(pattern, known)}"
            )


def _norm(name: str, options: ModelOptions) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (options.n_embd,)}
    return shapes | ({f"{name}.bias": (options.n_embd,)} if options.norm == "layernorm" else {})


def _linear(name: str, shape: tuple[int, int], options: ModelOptions) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return shapes | ({f"{name}.bias": shape[:1]} if options.bias else {})
