"""Muon: momentum whose matrices are made orthogonal before they are added; AdamW for everything else, in one step.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; Liu et al., "Muon is Scalable for LLM
Training", 2025.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import checks, sharded
from fastgpt.kernels.adamw import Batch, FusedAdamW, on_device
from fastgpt.kernels.moments_8bit import decode_moment, encode_moment, in_blocks
from fastgpt.kernels.newton_schulz import COEFFICIENTS, orthogonalised
from fastgpt.kernels.philox import philox_4x32

# How the learning rate depends on a matrix's shape (A, B): see FusedMuon.
LR_RATIOS = {
    "original": lambda A, B: math.sqrt(max(1.0, A / B)),
    "match_rms_adamw": lambda A, B: 0.2 * math.sqrt(max(A, B)),
}


class FusedMuon(FusedAdamW):
    """``torch.optim.Muon`` for the matrices of hidden layers and AdamW for the other parameters, in one optimizer.

    The maths of a matrix are those of ``torch.optim.Muon``: the momentum, with Nesterov's step, is replaced by the
    nearest (semi-)orthogonal matrix, approximately, by the Newton-Schulz iteration. Matrices of the same shape are
    iterated in one batch of products: in bf16 on a GPU and on CPUs with AMX, otherwise in fp32. The state is that of
    ``torch.optim.Muon``, and either loads the other's ``state_dict``.

    A parameter group with ``use_muon=False`` is updated by AdamW, as :class:`FusedAdamW` does it, and has ``lr``,
    ``betas``, ``eps`` and ``weight_decay``. Embeddings, the output layer and vectors belong there. Clipping, skipping
    and CUDA graphs are FusedAdamW's, over all groups::

        FusedMuon([
            {"params": hidden_matrices, "lr": 0.02},
            {"params": others, "use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95)},
        ])

    Args:
        params: parameters or parameter groups. With ``use_muon``, which is the default of a group, they are matrices.
        lr: learning rate, a number or a tensor of one element.
        weight_decay: decoupled from the gradient.
        momentum: share of the old momentum in the new one.
        nesterov: step along the gradient of a look-ahead.
        ns_coefficients: of the Newton-Schulz iteration.
        eps: the least norm that a matrix is divided by; in AdamW's groups, whose default is 1e-8, what is added to the
            denominator.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: how the learning rate of a matrix of shape (A, B) depends on the shape: ``"original"``, which is
            the default, multiplies it by sqrt(max(1, A / B)); ``"match_rms_adamw"`` by 0.2 sqrt(max(A, B)), so that a
            step is as large as AdamW's and a learning rate found for AdamW can be used.
        max_grad_norm: as in :class:`FusedAdamW`, of the gradients of all groups.
        copies: as in :class:`FusedAdamW`.
        state_bits: as in :class:`FusedAdamW`. 8 bits take 1.02 bytes for an element of a matrix instead of 4.
        skip_nonfinite: as in :class:`FusedAdamW`.

    Attributes:
        grad_norm: as in :class:`FusedAdamW`.
        found_inf: as in :class:`FusedAdamW`.

    Raises:
        TypeError: an argument has a wrong type, or a parameter a dtype that is not a float.
        ValueError: a hyperparameter is out of range, here or in a group; a parameter of a group with ``use_muon`` is no
            matrix, or a DTensor; or as in :class:`FusedAdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        max_grad_norm: float | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
        state_bits: int = 32,
        skip_nonfinite: bool = False,
    ) -> None:
        self._of_muon = {
            "momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps,
            "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
        }  # fmt: skip
        _check_hyperparameters(self._of_muon)
        super().__init__(
            params, lr, (0.9, 0.95), weight_decay=weight_decay, max_grad_norm=max_grad_norm, copies=copies,
            state_bits=state_bits, skip_nonfinite=skip_nonfinite,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_of_muon": self._of_muon}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :class:`FusedMuon`.

        Raises:
            TypeError: as in ``__init__``.
            ValueError: as in ``__init__``.
        """
        use_muon = param_group.get("use_muon", True)
        checks.boolean("use_muon", use_muon)
        super().add_param_group({"use_muon": use_muon, **(self._of_muon if use_muon else {}), **param_group})

    def _check_group(self, group: Mapping[str, Any]) -> None:
        use_muon = group.get("use_muon", True)  # torch.optim.Muon's groups have no such entry, nor AdamW's betas
        super()._check_group({"betas": (0.9, 0.95), **group} if use_muon else group)
        if use_muon:
            _check_hyperparameters(group)

    def _check_parameter(self, param: Any, group: Mapping[str, Any]) -> None:
        super()._check_parameter(param, group)
        if not group["use_muon"]:
            return
        if param.dim() != 2 or param.numel() == 0:
            raise ValueError(f"params: use_muon takes matrices, got a parameter of shape {tuple(param.shape)}")
        if sharded.is_dtensor(param):
            raise ValueError(f"params: use_muon needs whole matrices, got a DTensor of shape {tuple(param.shape)}")

    def _moment_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group.get("use_muon", True) else super()._moment_names(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of ``FusedMuon`` or, if Muon updates all parameters, of ``torch.optim.Muon``.

        Raises:
            TypeError: as in :class:`FusedAdamW`.
            ValueError: as in :class:`FusedAdamW`.
        """
        states = {
            index: {"step": torch.zeros(()), **state} if "momentum_buffer" in state else state
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})

    def _restore(self, state_dict: dict[str, Any], seeds: list[int | None]) -> None:
        for group in self.param_groups:
            group.setdefault("use_muon", True)  # torch.optim.Muon's has none
        super()._restore(state_dict, seeds)

    def _step_batch(self, batch: Batch, scale: Tensor | None, zero_grad: bool) -> None:
        if not batch.group["use_muon"]:
            super()._step_batch(batch, scale, zero_grad)
            return
        by_shape: dict[torch.Size, list[int]] = {}
        for i, p in enumerate(batch.params):
            by_shape.setdefault(p.shape, []).append(i)
        for chosen in by_shape.values():
            self._step_matrices(batch, chosen, scale)
        if zero_grad:
            torch._foreach_zero_([grad for p in batch.params if (grad := p.grad) is not None])

    def _momentum(self, state: dict[str, Tensor]) -> Tensor:
        """The momentum of a matrix: the state's own tensor, or decoded from 8 bits to fp32."""
        buffer = state["momentum_buffer"]
        if self.state_bits == 32:
            return buffer
        scale = state["momentum_buffer_scale"].unsqueeze(-1)
        decoded = decode_moment(in_blocks(buffer.view(-1)), scale, signed=True)
        return decoded.view(-1)[: buffer.numel()].view(buffer.shape)

    def _step_matrices(self, batch: Batch, chosen: list[int], scale: Tensor | None) -> None:
        """Update those matrices of a batch that are ``chosen``, all of one shape."""
        group, params, states = batch.group, [batch.params[i] for i in chosen], [batch.states[i] for i in chosen]
        device, momentum = params[0].device, group["momentum"]
        skipped = None if self.found_inf is None else self.found_inf.to(device)
        buffers = list(map(self._momentum, states))
        update = torch.stack([p.grad for p in params if p.grad is not None]).to(buffers[0].dtype)  # (K, A, B)
        if scale is not None:
            update *= scale.to(device, update.dtype)
        rows = list(update.unbind())
        if skipped is not None:  # what is skipped changes the momentum by nothing, and is finite
            for row, buffer in zip(rows, buffers, strict=True):
                torch.where(skipped == 0, row, buffer, out=row)
        torch._foreach_lerp_(buffers, rows, 1.0 - momentum)
        if group["nesterov"]:
            torch._foreach_lerp_(rows, buffers, momentum)
        else:
            torch._foreach_copy_(rows, buffers)
        update = orthogonalised(update, tuple(group["ns_coefficients"]), group["ns_steps"], group["eps"])

        # fp64, as the host would compute it; each product with a parameter is rounded to its dtype
        lr = on_device("lr", group["lr"], torch.float64, device)
        if skipped is not None:
            lr = lr * (1.0 - skipped)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0 if skipped is None else [1.0 - skipped] * len(steps))
        if self.state_bits == 8:
            key = steps[0].long() + group["seed"]
            for i, state, buffer in zip(chosen, states, buffers, strict=True):
                _keep(state, buffer, key, i, skipped)
        ratio = LR_RATIOS[group["adjust_lr_fn"] or "original"](*params[0].shape)
        update = update.to(buffers[0].dtype).mul_((lr * -ratio).to(buffers[0].dtype))
        torch._foreach_mul_(params, (1.0 - lr * group["weight_decay"]).to(buffers[0].dtype))
        torch._foreach_add_(params, list(update.unbind()))
        if self.copies:
            torch._foreach_copy_([self.copies[p] for p in params], params)


def _keep(state: dict[str, Tensor], momentum: Tensor, key: Tensor, number: int, skipped: Tensor | None) -> None:
    """Write a momentum of fp32 to its 8-bit state, unless the step is skipped.

    ``key`` and ``number``, of the tensor, say which random numbers round it: see philox.py.
    """
    n = momentum.numel()
    counters = torch.arange(-(-n // 8), device=momentum.device)
    words = philox_4x32(key, counters, torch.full_like(counters, number), torch.full_like(counters, 2)).T  # (n / 8, 4)
    random = torch.stack((words >> 16, words & 0xFFFF), dim=-1).view(-1)[:n].int()
    codes, scale = encode_moment(in_blocks(momentum.view(-1)), in_blocks(random), signed=True)
    for kept, new in (
        (state["momentum_buffer"].view(-1), codes.view(-1)[:n]), (state["momentum_buffer_scale"], scale.squeeze(-1))
    ):  # fmt: skip
        kept.copy_(new if skipped is None else torch.where(skipped == 0, new, kept))


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Check those of a group with ``use_muon`` that AdamW does not have."""
    for name in ("momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"):
        if name not in group:
            raise ValueError(f"{name}: missing in a parameter group")
    checks.number("eps", group["eps"])
    checks.number("momentum", group["momentum"])
    if not 0.0 <= group["momentum"] < 1.0:
        raise ValueError(f"momentum: expected a number in [0, 1), got {group['momentum']}")
    checks.boolean("nesterov", group["nesterov"])
    checks.size("ns_steps", group["ns_steps"])
    if group["ns_steps"] >= 100:
        raise ValueError(f"ns_steps: expected less than 100, got {group['ns_steps']}")
    coefficients = group["ns_coefficients"]
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
        raise ValueError(f"ns_coefficients: expected three numbers, got {coefficients}")
    for value in coefficients:
        checks.number("ns_coefficients", value)
    if group["adjust_lr_fn"] not in (None, *LR_RATIOS):
        raise ValueError(
            f"adjust_lr_fn: expected one of {', '.join(LR_RATIOS)}, or None, got {group['adjust_lr_fn']!r}"
        )
