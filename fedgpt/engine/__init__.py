"""The one server loop, pacing, client work, checkpoints."""
