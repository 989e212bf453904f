"""Configuration: Hydra composes the typed options, and all wrong options are reported at once."""
