"""Flower's apps, and runtimes, grids and adapters; the only package that imports flwr."""
