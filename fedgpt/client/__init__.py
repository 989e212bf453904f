"""The client's side: from a job to an update, with local state, privacy and simulated attacks."""
