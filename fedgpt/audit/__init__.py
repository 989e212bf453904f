"""Attacks on what a private run promises, with the statistics that turn them into bounds."""
