"""The server: one loop for every pacing, with what it knows of jobs, clients and versions."""
