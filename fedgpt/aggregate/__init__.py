"""Strategies: updates -> next global model."""
