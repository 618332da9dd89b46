"""What every test of the suite needs."""

import signal

import pytest

# A shell that runs the suite in the background has it ignore SIGINT, and its children with it; the tests of
# interruption need the usual way.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread():
    """Compute on one thread in torch: matrices this small are slower on several."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
