"""Flower apps, runtimes and adapters: the only place that imports flwr."""
