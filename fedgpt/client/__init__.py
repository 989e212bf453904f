"""One client's work: from a job to an update, with its state, its privacy and, for research, its
attacks.
"""
