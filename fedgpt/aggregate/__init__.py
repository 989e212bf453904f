"""Strategies: the rules that turn clients' updates into the next global model; base.py first."""
