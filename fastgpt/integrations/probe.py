"""Checks that a patched model computes the same as its own code, on random input."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.integrations.swap import Plan, refuse, require, swap, unpatch
from fastgpt.kernels import use_backend

# Largest difference, relative to the norm of the output. Correct implementations differ by rounding, a few 1e-6. The
# two forms of GELU, which are easily confused, differ by 1e-4.
MODULE_TOLERANCE = 5e-5

# The whole model runs on its own device and in its own dtype, which may mean TF32.
MODEL_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
MODEL_TOLERANCE_LOW_PRECISION = 5e-2

# Standard deviation of the logits in the comparison of losses: large enough to show a cap or a penalty on logits.
LOGIT_SCALE = 30.0

SEED = 1337


@torch.no_grad()
def check_norm(name: str, norm: Any, plan: Plan) -> None:
    """Refuse a norm whose results ``plan`` would change, on ordinary rows and on rows with a variance like eps."""
    width = norm.weight.shape[0]
    rows = torch.randn(8, width, generator=_generator()) + 1.0
    _check_module(name, norm, plan, width, rows, rows * 3e-3)


@torch.no_grad()
def check_block(name: str, block: nn.Module, plan: Plan, width: int) -> None:
    """Refuse a transformer block whose results ``plan`` would change."""
    _check_module(name, block, plan, width, torch.randn(2, 8, width, generator=_generator()))


def _check_module(name: str, module: nn.Module, plan: Plan, width: int, *inputs: Tensor) -> None:
    # A copy in fp32 gets parameters that show every difference: nonzero biases, attention that is not uniform.
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
    with use_backend("auto"):  # the backend chosen for the model may not run on a CPU
        got = _attempt(name, "if patched, it would fail", lambda: _in_both_modes(original, inputs))
    for a, b in zip(expected, got, strict=True):
        _require_equal(name, "output", a, b, MODULE_TOLERANCE)


def patch_and_check(
    model: nn.Module, plan: Plan, final_norm: Any, n_vocab: int, run: Callable[[Tensor, Tensor], Any]
) -> None:
    """Carry out ``plan``, and undo it if logits or losses change.

    Args:
        model: the model. Its training mode does not matter, and is kept.
        plan: as for :func:`swap`.
        final_norm: the module whose output becomes the logits.
        n_vocab: size of the vocabulary.
        run: a function that calls the model with tokens and targets ``(B, T)``, one of which is to be ignored. It
            returns the logits or ``None``, and the loss.

    Raises:
        ValueError: logits or losses differ. The model is unchanged.
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
            got = _attempt("", "if patched, it would fail", outputs)
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
    """Logits and loss. Only the model itself is in training mode, because its submodules would draw random numbers."""
    with _evaluating(model), torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        model.training = training
        logits, loss = run(tokens, targets)
        return logits, loss


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and restore its own mode at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def _require_equal(name: str, what: str, expected: Tensor, got: Tensor, tolerance: float) -> None:
    require(
        expected.shape == got.shape, name, f"if patched, its {what} would have shape {got.shape}, not {expected.shape}"
    )
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    if not error <= tolerance:
        refuse(
            name, f"its maths is not what it is taken for: if patched, its {what} would be off by {error.item():.1e}"
        )


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
