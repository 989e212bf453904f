"""The grid of the default runtime: persistent worker processes, and arrays in shared memory."""
