"""The central evaluation: scores and samples of a model on held-out text."""
