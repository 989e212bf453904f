"""`fedgpt audit`: attacks on the privacy guarantee of a run, through the code that a run uses.

attacks.py     the attacks: canaries, membership, token leak; `audit` runs all of them
statistics.py  lower bounds on the privacy loss from an attacker's scores, and AUC
report.py      the text that the command prints
"""
