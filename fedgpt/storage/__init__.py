"""What survives a restart: the run folder, checkpoints, the journal, the best weights, the initial
weights.
"""
