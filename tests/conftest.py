import pytest
import torch

WHOLE_MODELS = {"integration", "integrations", "model", "train"}


@pytest.fixture(autouse=True)
def one_thread(request):
    """Whole models run on one thread: small as they are here, threads would cost them more than they give."""
    threads = torch.get_num_threads()
    if request.path.parent.name in WHOLE_MODELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
