"""What a model's options mean in numbers: are they valid, and which parameters do they make.

Free of torch, so that `fedgpt --help` and the check of a configuration stay fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from fedgpt.core.errors import nearest
from fedgpt.core.options import ModelOptions

CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "gelu": ("exact", "tanh"),
}


def check_model(options: ModelOptions) -> list[str]:
    """Every problem of `options`, each naming the option as typed; empty if they are valid."""
    problems = []
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        value = getattr(options, name)
        if value < 1:
            problems.append(f"model.{name}={value}: must be at least 1")
    for name, allowed in CHOICES.items():
        value = getattr(options, name)
        if value not in allowed:
            problems.append(
                f"model.{name}={value}: must be"
                f" {' or '.join(allowed)}{nearest(str(value), allowed)}"
            )
    if not 0 <= options.dropout < 1:
        problems.append(f"model.dropout={options.dropout}: must be at least 0 and below 1")
    if options.n_head >= 1 and options.n_embd >= 1:
        problems += _check_heads(options)
    return problems + _check_trainable(options)


def parameter_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of `GPT(options, vocab_size)`, in the module's order.

    A tied head is listed under its own name, too: whoever counts leaves out `lm_head.weight`.
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
    shapes = parameter_shapes(options, vocab_size)
    names = {name for name in shapes if is_trainable([name], options.trainable)}
    if options.tie and names & {"transformer.wte.weight", "lm_head.weight"}:
        names = names - {"lm_head.weight"} | {"transformer.wte.weight"}
    return sum(math.prod(shapes[name]) for name in names)


def is_trainable(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """Whether `model.trainable=patterns` selects a parameter that has these names.

    No pattern selects every parameter. `*` stands for any characters, dots among them. A tied
    weight has two names and is selected by either.

    >>> is_trainable(["transformer.h.1.ln_1.weight"], ["transformer.h.1.*"])
    True
    """
    return not patterns or any(fnmatchcase(name, p) for name in names for p in patterns)


def _check_heads(options: ModelOptions) -> list[str]:
    n_embd, n_head = options.n_embd, options.n_head
    # rotary positions turn pairs of channels, so that a head needs an even number of them
    unit = 2 * n_head if options.positions == "rotary" else n_head
    if n_embd % unit == 0:
        return []
    below, above = n_embd // unit * unit, (n_embd // unit + 1) * unit
    proposal = f"try {below} or {above}" if below else f"try {above}"
    if n_embd % n_head == 0:
        return [
            f"model.n_embd={n_embd}: model.positions=rotary needs a multiple of 2 *"
            f" model.n_head={unit}; {proposal}"
        ]
    return [f"model.n_embd={n_embd}: must be a multiple of model.n_head={n_head}; {proposal}"]


def _check_trainable(options: ModelOptions) -> list[str]:
    """A pattern that selects nothing is a typing error, or meant for another model."""
    if not options.trainable:
        return []
    names = list(parameter_shapes(options, vocab_size=1))
    # what a pattern usually is: the name of one parameter, or a module's name and `.*`
    known = dict.fromkeys(names)
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(f"{'.'.join(parts[:end])}.*" for end in range(1, len(parts)))
    return [
        f"model.trainable=[{pattern}]: selects no parameter of this model; take names such as"
        f" {names[0]}, with * for any characters{nearest(pattern, known)}"
        for pattern in options.trainable
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _norm(name: str, options: ModelOptions) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (options.n_embd,)}
    return shapes | ({f"{name}.bias": (options.n_embd,)} if options.norm == "layernorm" else {})


def _linear(name: str, shape: tuple[int, int], options: ModelOptions) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return shapes | ({f"{name}.bias": shape[:1]} if options.bias else {})
