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


# What public recipes of small models share beyond GPT-2, as far as it is an option here: modded-nanogpt's record of
# 14 October 2024 ("ModernArch") has all of it but the soft cap. That is 15 in its record of 4 January 2025 and in
# nanochat (nanochat/gpt.py), which both normalise the embedding too. Nothing of it has been measured here on a GPU.
_MODERN: dict[str, Any] = {
    "positions": "rotary",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "relu2",
    "zero_init": True,
    "softcap": 15.0,
    "optimizer": "muon",
    "momentum": 0.95,  # of all these recipes
    "beta1": 0.8,  # AdamW's beside Muon: modded-nanogpt since January 2025, and nanochat
    "beta2": 0.95,
    # One decay serves both optimizers here. The sources' differ, from none (modded-nanogpt in 2024) to 0.00125 of a
    # matrix in an update (result 36 of its optimization track: rate 0.025, decay 0.05). Ours is 0.1 of the rates below:
    # 0.00045 in an update.
    "weight_decay": 0.1,
    "schedule": "wsd",
    "cooldown": 0.7,  # of result 36; nanochat has 0.65, the records of 2024 and early 2025 0.3 to 0.4
    "min_lr": 0.0,  # of result 36
    "warmup_iters": 40,  # nanochat's; modded-nanogpt has none
}


def _modern_rates(n_embd: int) -> dict[str, float]:
    """Peak rates for a width, in updates of half a million tokens.

    AdamW has one rate here, for embeddings, output layer and vectors: 0.0036 is that of the record of 14 October 2024,
    the last one with one rate. It falls as 1 / sqrt(width), as nanochat's do.

    Muon's is 0.025 of result 36, whose step of a square matrix is the rate times an orthogonal matrix. On AdamW's scale
    that is 0.025 / (0.2 sqrt(width)): 0.0045 at width 768.
    """
    return {"learning_rate": 3.6e-3 * (768 / n_embd) ** 0.5, "muon_learning_rate": 0.025 / (0.2 * n_embd**0.5)}


def _modern(of: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A preset of GPT-2's with the modern recipe, on half of its tokens.

    Half, because llm.c's GPT-2 124M took ten billion tokens of FineWeb to a validation loss of 3.28, and the record of
    14 October 2024 took 2.7: half leaves room for what differs here.
    """
    n_updates = of["max_iters"] // 2
    rates = _modern_rates(of["n_embd"])
    return {**of, **_MODERN, **rates, "max_iters": n_updates, "lr_decay_iters": n_updates, **changes}


_GPT2_30M: dict[str, Any] = {
    # 6 layers of 384 on OpenWebText: 30M parameters without positions, most of them in the embedding.
    # 1223 updates of 524 288 tokens are Chinchilla's 20 tokens a parameter.
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
    "gpt2-30m": _GPT2_30M,
    **{name: _gpt2(name) for name in _GPT2_SHAPES},
    # Tied: at this width an output layer of its own would be two thirds more parameters, and no public run of such a
    # size tells what it is worth.
    "modern-30m": _modern(_GPT2_30M),
    # An output layer of its own took modded-nanogpt from 5100 to 4578 updates (3 November 2024), together with rates of
    # their own for both, which are no option here. nanochat has one at every size.
    "modern-124m": _modern(_gpt2("gpt2-124m"), tied=False),
    "modern-350m": _modern(_gpt2("gpt2-350m"), tied=False),
    # FineWeb to a validation loss of 3.28, on one small GPU.
    #
    # 3250 updates of half a million tokens, 1.70 billion: result 36 of modded-nanogpt's optimization track, its tuned
    # Muon baseline, reaches 3.2787 with them (10 runs). Its model is GPT-2 124M's shape with rotary positions, RMS
    # norm, QK-norm, squared ReLU, an output layer of its own, zero projections and a soft cap of 15 (of another form),
    # in contexts of 1024 without windows or masks. It also has biases and a norm of the embedding, and its AdamW has a
    # rate of 0.7 for the embedding and 0.004 for the output layer; here both have 0.0036. The value embeddings, which
    # it lacks, are to make up for that. The record of 4 January 2025 has them too, and long contexts with windows: 1390
    # updates, 0.73 billion tokens. That is not claimed here.
    "speedrun-124m": _modern(
        _gpt2("gpt2-124m"),
        n_head=6,  # heads of 128: modded-nanogpt since October 2024, and nanochat
        tied=False,
        value_embeddings=True,  # those of nanochat's gpt.py: every other layer
        max_iters=3250,
        lr_decay_iters=3250,
        eval_interval=125,  # as there, to see when 3.28 is reached
    ),
}
