"""What all packages share: the flat parameter vector, jobs and updates, seeds, options, errors."""
