"""Settings for all tests."""

import os
import signal

# background jobs of a shell ignore SIGINT, and so would every process that a test starts from one
signal.signal(signal.SIGINT, signal.default_int_handler)

# Ray lowers the priority of its workers, and beside the other tests they would hardly run
os.environ.update(RAY_worker_niceness="0")
