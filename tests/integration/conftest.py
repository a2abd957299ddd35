import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more by threads waiting for each other than they gain, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
