"""Simulated time: how fast modelled clients are, and the virtual clock that delivers their
replies.
"""
