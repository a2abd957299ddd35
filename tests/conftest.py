import json
import os
import random
from contextlib import contextmanager
from pathlib import Path

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

# Once deterministic algorithms are asked for, PyTorch warns of every product on a GPU without this; it looks when the
# first one runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What a GPU's errors say after which it does nothing more for this process.
LOST_GPU = (
    "CUDA error",
    "AcceleratorError",
    "outside graph capture",
    "operation not permitted when stream is capturing",
)

LOST = pytest.StashKey[bool]()

WHOLE_MODELS = {"end_to_end", "evaluation", "integrations", "model", "train"}

# Files that take longest, which processes that share the tests by file begin with: none is then left with one at last.
LONGEST = [
    "test_ahead_of_time.py", "test_output.py", "test_ops.py", "test_packaging.py", "test_trainer.py",
    "test_cpu_bench.py", "test_agreement.py", "test_limits.py", "test_compile.py", "test_twins.py",
    "test_plan_command.py", "test_commands.py", "test_mfu_bench.py", "test_doctor.py", "test_attention.py",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what runs on a GPU, and put the longest files first."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        needs_gpu = item.get_closest_marker("needs_gpu") is not None
        on_triton = parameters.get("backend") == "triton" and item.get_closest_marker("no_kernel") is None
        if needs_gpu or on_triton or parameters.get("place") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if needs_gpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_runtest_makereport(item, call):
    """A process that shares the tests ends once it has lost the GPU: another takes its place, and its tests."""
    lost = call.excinfo is not None and any(words in str(call.excinfo.value) for words in LOST_GPU)
    item.config.stash[LOST] = lost or item.config.stash.get(LOST, False)


def pytest_runtest_setup(item):
    if item.config.stash.get(LOST, False) and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def pytest_runtest_logreport(report):
    """A line of JSON for each test as it ends, in the file FASTGPT_TEST_RECORD, whatever becomes of the run."""
    path = os.environ.get("FASTGPT_TEST_RECORD")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and (report.when == "call" or not report.passed):
        why = str(report.longrepr)[-500:] if report.failed else None
        entry = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": why}
        with Path(path).open("a") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.fixture(autouse=True)
def one_thread(request):
    """Whole models run on one thread: small as they are here, threads would cost them more than they give."""
    threads = torch.get_num_threads()
    if request.path.parent.name in WHOLE_MODELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def capturing(monkeypatch):
    """A block in which a CUDA graph seems to be captured; what it would record runs at once."""

    @contextmanager
    def pretend():
        with monkeypatch.context() as patch:
            for name in ("is_initialized", "is_current_stream_capturing"):
                patch.setattr(torch.cuda, name, lambda: True)
            yield

    return pretend


# ---- small runs ----


# A run of a tenth of a second.
TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 8, "warmup_iters": 2,
    "lr_decay_iters": 8, "learning_rate": 1e-2, "min_lr": 1e-3, "eval_interval": 4, "eval_iters": 2,
    "log_interval": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with the dataset ``words``: random words, a few per line."""
    from fastgpt.data.prepare import prepare

    folder = tmp_path_factory.mktemp("datasets")
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(8)]
    lines = (" ".join(rng.choices(vocabulary, k=8)) for _ in range(400))
    (folder / "words.txt").write_text("\n".join(lines))
    prepare("text", [folder / "words.txt"], tokenizer="char", data_dir=folder)
    return folder


@pytest.fixture
def trainer(data_dir, tmp_path):
    """Makes a trainer of a tiny model from ``only`` and flags given as keywords, in ``tmp_path/run`` by default."""
    from fastgpt.train.presets import PRESETS
    from fastgpt.train.resume import parse
    from fastgpt.train.settle import settle  # here, so that tests of the step alone need torch alone
    from fastgpt.train.trainer import Trainer

    def make(only=TINY, **flags):
        flags = {"dataset": "words", "data_dir": data_dir, "out_dir": tmp_path / "run", **only, **flags}
        return Trainer(settle(parse([f"--{name}={value}" for name, value in flags.items()], PRESETS)))

    return make
