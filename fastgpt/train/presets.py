"""Named runs: what each overrides of ``TrainConfig``'s defaults, and why."""

from typing import Any

_GPT2_SHAPES = {
    "gpt2-124m": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-350m": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-774m": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-1558m": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}
GPT2_TOKENS = 2**19  # of an update: GPT-2's half a million
# Peak rates of the GPT-3 paper (Brown et al. 2020, table 2.1) at the nearest sizes.
_GPT2_RATES = {"gpt2-124m": 6e-4, "gpt2-350m": 3e-4, "gpt2-774m": 2.5e-4, "gpt2-1558m": 2e-4}


def _gpt2(name: str) -> dict[str, Any]:
    """GPT-2 on FineWeb's ten billion tokens: one pass is 19 073 updates."""
    rate = _GPT2_RATES[name]
    return {
        **_GPT2_SHAPES[name],
        "dataset": "fineweb10b",
        "batch_size": None,  # auto: chosen for the device
        "total_batch_size": GPT2_TOKENS,
        "max_iters": 19_073,
        "lr_decay_iters": 19_073,
        "learning_rate": rate,
        "min_lr": rate / 10,
        "warmup_iters": 700,
        "eval_interval": 250,
        "eval_iters": 20,
        "checkpoint_interval": 1000,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # What nanoGPT's train.py does without flags; its config files change this.
    "nanogpt": {
        "dataset": "openwebtext",
        "out_dir": "out",
        "gradient_accumulation_steps": 5 * 8,
        "learning_rate": 6e-4,
        "max_iters": 600_000,
    },
    # Offline, on the text of Python's own library; about a minute on two cores.
    "quickstart": {
        "dataset": "stdlib",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 128,
        "batch_size": 16,
        "max_iters": 800,
        "lr_decay_iters": 800,
        "learning_rate": 2e-3,
        "min_lr": 2e-4,
        "warmup_iters": 40,
        "eval_interval": 200,
        "eval_iters": 10,
        "log_interval": 10,
    },
    # nanoGPT's config/train_shakespeare_char.py, for a GPU.
    "shakespeare-char": {
        "dataset": "shakespeare-char",
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "block_size": 256,
        "batch_size": 64,
        "dropout": 0.2,
        "max_iters": 5000,
        "lr_decay_iters": 5000,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 100,
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_iters": 200,
        "log_interval": 10,
    },
    # The small one that nanoGPT's README gives for a CPU.
    "shakespeare-char-cpu": {
        "dataset": "shakespeare-char",
        "device": "cpu",
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 128,
        "block_size": 64,
        "batch_size": 12,
        "max_iters": 2000,
        "lr_decay_iters": 2000,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 100,
        "beta2": 0.99,
        "eval_interval": 250,
        "eval_iters": 20,
        "log_interval": 10,
    },
    # 6 layers of 384 on OpenWebText: 30M parameters without positions, most of them in the embedding.
    # 1223 updates of 524 288 tokens are Chinchilla's 20 tokens a parameter.
    "gpt2-30m": {
        "dataset": "openwebtext",
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 384,
        "batch_size": None,  # auto: chosen for the device
        "total_batch_size": GPT2_TOKENS,
        "max_iters": 1223,
        "lr_decay_iters": 1223,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "warmup_iters": 100,
        "eval_interval": 100,
        "eval_iters": 20,
    },
    **{name: _gpt2(name) for name in _GPT2_SHAPES},
}
