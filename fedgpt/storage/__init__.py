"""Files that survive a restart: run folder, checkpoints, journal, best weights, initial weights."""
