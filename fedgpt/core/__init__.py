"""Shared types: the flat parameter vector, jobs and updates, seeds, options, errors."""
