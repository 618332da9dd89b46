"""What every test of the suite needs."""

import signal

# A shell that runs the suite in the background has it ignore SIGINT, and its children with it; the tests of
# interruption need the usual way.
signal.signal(signal.SIGINT, signal.default_int_handler)
