"""Differential privacy: mechanisms, accounting, ledger, and the guarantee of a run.

plan.py        the mechanism of a run in numbers, and its cost, before anything runs
problems.py    combinations of options that are refused
clipping.py    the norm that bounds one unit's influence on a sum
randomness.py  the noise, from a keyed stream
toeplitz.py    correlated noise for a series of releases
accounting.py  epsilon of a list of releases
    ledger.py      the file that records all charges
    statement.py   the guarantee of a run in words
"""
