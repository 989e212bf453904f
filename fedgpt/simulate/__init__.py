"""Simulated time: fleets of modelled clients, the virtual clock, and replays of recorded runs."""
