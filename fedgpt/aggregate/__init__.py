"""Strategies: rules that compute the next global model from updates. Their interface is in
base.py.
"""
