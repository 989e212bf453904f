"""What holds for every test."""

import signal

# a shell's background jobs ignore SIGINT, and so would all that tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
