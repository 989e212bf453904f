"""The client: computes an update from a job, with local state, privacy and simulated attacks."""
