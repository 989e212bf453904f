"""Differential privacy: what a release must contain, what it costs, and what a run promises.

plan.py        the mechanism of a run in numbers, and its cost, before anything runs
problems.py    combinations of options that are refused
clipping.py    the norm that bounds one unit's influence on a sum
randomness.py  the noise, from a keyed stream
toeplitz.py    correlated noise for a series of releases
accounting.py  epsilon of a list of releases
ledger.py      the file of what has been paid
statement.py   the promise of a run in words
"""
