"""The server: one loop for every pacing, and its state of jobs, clients and versions."""
