"""Configuration: Hydra composes what a user types, and every mistake is reported at once."""
