"""How many parameters a model has, from its options alone. Free of torch."""

from __future__ import annotations

from fedgpt.core.options import ModelOptions


def count_parameters(options: ModelOptions, vocab_size: int) -> int:
    """Trainable parameters of `GPT(options, vocab_size)`; a tied head counts once."""
    channels = options.n_embd
    norm = 2 * channels if options.norm == "layernorm" else channels
    block = 12 * channels**2 + 2 * norm + (9 * channels if options.bias else 0)
    embeddings = vocab_size * channels * (1 if options.tie else 2)
    positions = options.block_size * channels if options.positions == "learned" else 0
    return embeddings + positions + options.n_layer * block + norm
