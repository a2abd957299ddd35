import random

import pytest

from fastgpt.train.presets import PRESETS

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
    """Makes a trainer of a tiny model from flags given as keywords, in ``tmp_path/run`` if not told otherwise."""
    from fastgpt.train.resume import parse
    from fastgpt.train.settle import settle  # here, so that tests of the step alone need torch alone
    from fastgpt.train.trainer import Trainer

    def make(**flags):
        flags = {"dataset": "words", "data_dir": data_dir, "out_dir": tmp_path / "run", **TINY, **flags}
        return Trainer(settle(parse([f"--{name}={value}" for name, value in flags.items()], PRESETS)))

    return make
