"""Local training: optimiser, schedule, precision, gradients with and without DP-SGD."""
