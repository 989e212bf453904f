"""Flower's side: apps, runtimes, grids and adapters; the only package that imports flwr."""
