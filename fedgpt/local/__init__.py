"""What a client does with a job: optimiser, schedule, precision, training."""
