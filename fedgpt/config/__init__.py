"""Configuration: what a user types, composed by Hydra, checked, every mistake reported at once."""
