"""What a model's options mean in numbers: validity and parameters. Free of torch, so `--help` stays
fast.
"""

from __future__ import annotations

from fedgpt.core.errors import nearest
from fedgpt.core.options import ModelOptions

CHOICES = {
    "positions": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "gelu": ("exact", "tanh"),
}


def check_model(options: ModelOptions) -> list[str]:
    """Every problem of `options`, each naming the option as typed; an empty list means they are
    usable.
    """
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
    return problems


def _check_heads(options: ModelOptions) -> list[str]:
    n_embd, n_head = options.n_embd, options.n_head
    # rotary turns channels in pairs, so a head needs an even number of them
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


def count_parameters(options: ModelOptions, vocab_size: int) -> int:
    """Trainable parameters of `GPT(options, vocab_size)`; a tied head counts once."""
    channels = options.n_embd
    norm = 2 * channels if options.norm == "layernorm" else channels
    block = 12 * channels**2 + 2 * norm + (9 * channels if options.bias else 0)
    embeddings = vocab_size * channels * (1 if options.tie else 2)
    positions = options.block_size * channels if options.positions == "learned" else 0
    return embeddings + positions + options.n_layer * block + norm
