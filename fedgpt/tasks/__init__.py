"""Learning problems, one file each: their batches, losses, scores and samples."""
