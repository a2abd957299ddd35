"""The quickstart's first losses, as they were when they were written down: a change that claims to change no maths
may not move them.

``python -m tests.end_to_end.test_golden_losses`` writes them anew, for a change that does.
"""

import json
import random
import tempfile
from pathlib import Path

import pytest

from fastgpt.data.prepare import prepare
from fastgpt.kernels import use_backend
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.train.settle import settle
from fastgpt.train.trainer import Trainer

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20


def losses(backend, folder):
    """Of each of the quickstart's first updates, in fp32, on a text that every Python makes alike."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(50)]
    (folder / "words.txt").write_text(" ".join(rng.choices(words, k=10_000)))
    flags = {
        "dataset": prepare("text", [folder / "words.txt"], tokenizer="byte", data_dir=folder), "dtype": "float32",
        "device": "cpu", "out_dir": folder / "run", "max_iters": STEPS, "log_interval": 1, "eval_iters": 1,
    }  # fmt: skip
    with use_backend(backend):
        Trainer(settle(parse([f"--{name}={value}" for name, value in flags.items()], PRESETS))).train()
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_quickstart_has_the_losses_that_it_had(backend, tmp_path):
    # 1e-5: what other CPUs and versions of PyTorch may round otherwise, 100 units of fp32
    assert losses(backend, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(losses("reference", Path(folder)), indent=1) + "\n")
