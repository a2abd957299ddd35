"""Does a patched model compute what it did? Asked of its own code, on random input, before a patch is let stand."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.integrations.swap import Plan, refuse, require, swap, unpatch
from fastgpt.kernels import use_backend

# Two right ways to compute a module differ by rounding, here a few 1e-6 of the output's norm; two activations that
# pass for each other, by 1e-4.
MODULE_TOLERANCE = 5e-5

# The whole model runs where and in what dtype it lies, TF32 included.
MODEL_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
MODEL_TOLERANCE_LOW_PRECISION = 5e-2

# Standard deviation of the logits that the loss is compared on: far enough out for a cap or a penalty on them to show.
LOGIT_SCALE = 30.0

SEED = 1337


@torch.no_grad()
def check_norm(name: str, norm: Any, plan: Plan) -> None:
    """Refuse a norm that ``plan`` would change, on rows whose variance is that of eps, and on ordinary ones."""
    width = norm.weight.shape[0]
    rows = torch.randn(8, width, generator=_generator()) + 1.0
    _check_module(name, norm, plan, width, rows, rows * 3e-3)


@torch.no_grad()
def check_block(name: str, block: nn.Module, plan: Plan, width: int) -> None:
    """Refuse a transformer block that ``plan`` would change."""
    _check_module(name, block, plan, width, torch.randn(2, 8, width, generator=_generator()))


def _check_module(name: str, module: nn.Module, plan: Plan, width: int, *inputs: Tensor) -> None:
    # A copy, so that its numbers may be such that everything shows: biases that are not zero, attention that is not
    # uniform, fp32.
    original = copy.deepcopy(module).to("cpu", torch.float32)
    renamed = dict(zip(module.modules(), original.modules(), strict=True))
    generator = _generator()
    for parameter in original.parameters():
        scale = parameter.std() * width**0.5
        if parameter.dim() < 2 or not scale > 0:
            parameter.normal_(0.0, 1.0 if parameter.dim() < 2 else width**-0.5, generator=generator)
        else:
            parameter.div_(scale)
    for part in original.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "dropout", None), float):
            part.dropout = 0.0  # type: ignore[assignment]
    expected = _attempt(name, "it fails", lambda: _in_both_modes(original, inputs))
    swap({renamed[part]: mixin for part, mixin in plan.items() if part in renamed})
    with use_backend("auto"):  # whatever was chosen for the model may not run on a CPU
        got = _attempt(name, "patched, it would fail", lambda: _in_both_modes(original, inputs))
    for a, b in zip(expected, got, strict=True):
        _require_equal(name, "output", a, b, MODULE_TOLERANCE)


def patch_and_check(
    model: nn.Module, plan: Plan, final_norm: Any, n_vocab: int, run: Callable[[Tensor, Tensor], Any]
) -> None:
    """Carry out ``plan``, unless logits or losses then are others: nothing has happened in that case.

    Args:
        model: what ``plan`` is about; in whatever mode, and left in it.
        plan: as for :func:`swap`.
        final_norm: the module whose output becomes the logits.
        n_vocab: tokens lie below.
        run: calls the model with tokens and targets ``(B, T)``, of which one is to be ignored; gives the logits, or
            ``None``, and the loss.
    """
    device, dtype = final_norm.weight.device, final_norm.weight.dtype
    tolerance = MODEL_TOLERANCE.get(dtype, MODEL_TOLERANCE_LOW_PRECISION)
    tokens, targets = torch.randint(n_vocab, (2, 2, 8), generator=_generator()).to(device)
    modes = (False, True)  # of training

    def outputs() -> list[tuple[Tensor | None, Tensor]]:
        return [_outputs(model, run, tokens, targets, training) for training in modes]

    ((logits, _), _) = _attempt("", "it fails", outputs)
    gain = LOGIT_SCALE / max(logits.float().std().item(), 1e-3)
    hook = final_norm.register_forward_hook(lambda module, args, output: output * gain)
    try:
        expected = _attempt("", "it fails", outputs)
        swap(plan)
        try:
            got = _attempt("", "patched, it would fail", outputs)
            for (logits, loss), (our_logits, our_loss) in zip(expected, got, strict=True):
                _require_equal("", "loss", loss, our_loss, tolerance)
                if our_logits is not None:
                    _require_equal("", "logits", logits, our_logits, tolerance)
        except BaseException:
            unpatch(model)
            raise
    finally:
        hook.remove()


def _outputs(
    model: nn.Module, run: Callable[[Tensor, Tensor], Any], tokens: Tensor, targets: Tensor, training: bool
) -> tuple[Tensor | None, Tensor]:
    """Logits and loss. Only the model's own flag says training: what draws random numbers lies in the modules below."""
    with _evaluating(model), torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        model.training = training
        logits, loss = run(tokens, targets)
        return logits, loss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation, and back in its own mode after."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _require_equal(name: str, what: str, expected: Tensor, got: Tensor, tolerance: float) -> None:
    require(expected.shape == got.shape, name, f"patched, its {what} has shape {got.shape}, not {expected.shape}")
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not error <= tolerance:
        refuse(name, f"its maths is not that of GPT-2: patched, its {what} would be off by {error.item():.1e}")


def _in_both_modes(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):
        outputs = [module.train(mode)(x) for mode in (True, False) for x in inputs]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _attempt(name: str, verdict: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{name or 'model'}: {verdict} on random input: {error}") from error


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)
