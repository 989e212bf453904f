"""The parameters of a model and those that are trained, computed from its options.

Free of torch, so that `fedgpt --help` and the check of a configuration stay fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from fedgpt.core.errors import nearest
from fedgpt.core.options import ModelOptions


def parameter_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `GPT(options, vocab_size)`, in the module's order.

    `vocab_size` is that of the tokenizer, as in the other functions here. A tied head is also
    listed under its own name, so a count must exclude `lm_head.weight`.
    """
    channels, inner, rows = options.n_embd, options.inner, options.rows(vocab_size)
    heads, qkv = options.n_head * options.width, sum(qkv_sizes(options))
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (rows, channels)}
    if options.positions == "learned":
        shapes["transformer.wpe.weight"] = (options.block_size, channels)
    for layer in range(options.n_layer):
        block = f"transformer.h.{layer}"
        shapes |= _norm(f"{block}.ln_1", options)
        shapes |= _linear(f"{block}.attn.c_attn", (qkv, channels), options.has_bias("qkv"))
        shapes |= _linear(f"{block}.attn.c_proj", (channels, heads), options.bias)
        shapes |= _norm(f"{block}.ln_2", options)
        shapes |= _linear(f"{block}.mlp.c_fc", (inner, channels), options.has_bias("mlp"))
        shapes |= _linear(f"{block}.mlp.c_proj", (channels, inner), options.has_bias("mlp"))
        if options.mlp == "swiglu":
            shapes |= _linear(f"{block}.mlp.c_gate", (inner, channels), options.has_bias("mlp"))
    shapes |= _norm("transformer.ln_f", options)
    return shapes | {"lm_head.weight": (rows, channels)}


def qkv_sizes(options: ModelOptions) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the one matrix that computes them, in this order."""
    keys = options.kv_heads * options.width
    return options.n_head * options.width, keys, keys


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

    These are its logits, and with all parameters trained what each block keeps: two residuals and
    the normalised inputs of attention and MLP (n_embd channels each), queries, keys and values, the
    output of attention, and the MLP's values before and after its activation, with swiglu also the
    gate's and their product.
    """
    block = 4 * options.n_embd + sum(qkv_sizes(options)) + options.n_head * options.width
    block += (4 if options.mlp == "swiglu" else 2) * options.inner
    return options.n_layer * (0 if options.trainable else block) + options.rows(vocab_size)


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


def _linear(name: str, shape: tuple[int, int], bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return shapes | ({f"{name}.bias": shape[:1]} if bias else {})
