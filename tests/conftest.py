"""Settings for all tests."""

import signal

# background jobs of a shell ignore SIGINT, and so would every process that a test starts from one
signal.signal(signal.SIGINT, signal.default_int_handler)
