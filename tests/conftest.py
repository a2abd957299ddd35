import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. That is chosen when Triton is imported, which torch's
# compiler does for any test that comes first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import fastgpt.kernels.triton  # noqa: F401
    from tests.kernels import interpreter

    interpreter.mend()
    del os.environ["TRITON_INTERPRET"]

WHOLE_MODELS = {"integration", "integrations", "model", "train"}


@pytest.fixture(autouse=True)
def one_thread(request):
    """Whole models run on one thread: small as they are here, threads would cost them more than they give."""
    threads = torch.get_num_threads()
    if request.path.parent.name in WHOLE_MODELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
