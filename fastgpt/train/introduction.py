"""The lines with which a run introduces itself: model, data, schedule, device, predicted speed."""

import torch

from fastgpt import hardware
from fastgpt.train.predict import roofline
from fastgpt.train.settle import Settled
from fastgpt.units import count, count_of, dtype_name, gib, tflops


def lines(settled: Settled, step: int) -> list[str]:
    """What is going to run, a line a subject.

    Args:
        settled: the run.
        step: the update that it continues from; 0 for a new run.
    """
    c, m = settled.config, settled.gpt_config
    planned = c.tokens_before(c.max_iters)
    steps = f"from step {step:,} to step {c.max_iters:,}" if step else f"for {c.max_iters:,} steps"
    ramp = f", from {c.tokens_at(0):,} at the start to all of them at step {c.batch_ramp:,}," if c.batch_ramp else ""
    decay = f" to {c.min_lr:g} over {c.lr_decay_iters:,} steps" if c.decay_lr else ", constant"
    threads = f"{count_of(torch.get_num_threads(), 'thread')}, " if settled.device.type == "cpu" else ""
    found = [
        f"{c.preset}: {count(m.n_params, 2)} parameters ({count(m.n_params_without_positions, 2)} without positions), "
        f"{m.n_layer} layers of {m.n_embd}, vocabulary {m.vocab_size}",
        f"data: {settled.dataset.path}, {c.tokens_per_step:,} tokens a step ({c.gradient_accumulation_steps} x "
        f"{c.batch_size} x {c.block_size}){ramp} {steps}, {planned / 1e6:,.1f}M tokens, "
        f"{planned / m.n_params_without_positions:.3g} a parameter",
        f"learning rate: {c.learning_rate:g}{decay}",
        f"device: {hardware.device_name(settled.device)}, {threads}{gib(settled.memory.amount)} free "
        f"({settled.memory.source}), {dtype_name(settled.dtype)}, recompute {c.recompute}",
    ]
    if settled.changes:
        found.append(f"changed since the run was started: {', '.join(settled.changes)}")
    p, accumulation = settled.prediction, c.gradient_accumulation_steps
    if p is not None:
        mfu = f", MFU {p.mfu(accumulation):.1%} of {tflops(p.peak)}" if p.peak is not None else ""
        found.append(
            f"predicted: {p.tokens_per_second(accumulation):,.0f} tokens/s{mfu}, {gib(p.memory, 2)} in tensors and "
            f"{gib(p.reserve, 2)} beside them; " + roofline.error_words(hardware.device_name(settled.device))
        )
    return found
