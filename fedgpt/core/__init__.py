"""Words shared by every room: the flat parameter vector, jobs and updates, seeds, options,
errors.
"""
