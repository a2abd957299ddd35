"""AdamW whose norm, clip, update and low-precision copy run in the fewest passes over memory.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgpt.kernels import ops


class FusedAdamW(Optimizer):
    """``torch.optim.AdamW`` in one kernel, with gradient clipping inside.

    Same maths and same ``state_dict`` layout as ``torch.optim.AdamW``, so either loads the other's. A parameter
    may be one flat buffer that holds a whole model: the cost is one pass either way.

    Args:
        params: parameters or parameter groups, fp32 or bf16, contiguous.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient; per parameter group if given there.
        max_grad_norm: gradients of all groups, taken as one vector, are scaled down to at most this L2
            norm; ``None`` for no clipping. The norm before clipping is left in ``grad_norm``.
        copies: maps a parameter to a bf16 tensor of its shape that receives every new value.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter is not contiguous.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
        *,
        copies: dict[Tensor, Tensor] | None = None,
    ) -> None:
        if not lr >= 0.0:
            raise ValueError(f"lr: expected at least 0, got {lr}")
        if not (0.0 <= betas[0] < 1.0 and 0.0 <= betas[1] < 1.0):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        if not eps >= 0.0:
            raise ValueError(f"eps: expected at least 0, got {eps}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay: expected at least 0, got {weight_decay}")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm: expected more than 0, or None, got {max_grad_norm}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for param in group["params"]:
                if not param.is_contiguous():
                    raise ValueError(f"params: a parameter of shape {tuple(param.shape)} is not contiguous")
        for param, copy in (copies or {}).items():
            if copy.dtype != torch.bfloat16 or copy.shape != param.shape or not copy.is_contiguous():
                raise ValueError(f"copies: expected contiguous bf16 of shape {tuple(param.shape)}, got {copy.dtype}")
        self.max_grad_norm = max_grad_norm
        self.copies = copies or {}
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float = 1.0,
        zero_grad: bool = False,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and is called first, as in every optimizer.
            grad_scale: gradients are multiplied by it before anything else, for example by
                1 / gradient_accumulation_steps.
            zero_grad: also sets the gradients to zero, in the same pass.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_contiguous():
                    p.grad = p.grad.contiguous()
        scale = self._scale(grad_scale)
        for group in self.param_groups:
            self._step_group(group, scale, zero_grad)
        return loss

    def _scale(self, grad_scale: float) -> Tensor | None:
        """What every gradient is multiplied by, as a 0-dim tensor on its device; clipping included."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return None
        if self.max_grad_norm is None:
            self.grad_norm = None
            return None if grad_scale == 1.0 else torch.tensor(grad_scale, device=grads[0].device)
        self.grad_norm = ops.resolve("grad_norm", grads[0])(grads) * grad_scale
        # 1e-6 as in torch.nn.utils.clip_grad_norm_
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0) * grad_scale

    def _step_group(self, group: dict[str, Any], scale: Tensor | None, zero_grad: bool) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        together: dict[float, list[Tensor]] = {}  # by step: one that joined late has another bias correction
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.contiguous_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.contiguous_format),
                }
            self.state[p]["step"] += 1
            together.setdefault(float(self.state[p]["step"]), []).append(p)
        for alike in together.values():
            self._step_alike(alike, group, scale, zero_grad)

    def _step_alike(self, params: list[Tensor], group: dict[str, Any], scale: Tensor | None, zero_grad: bool) -> None:
        beta1, beta2 = group["betas"]
        ops.resolve("adamw_", params[0])(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [self.copies[p] for p in params] if self.copies else [],
            self.state[params[0]]["step"],
            torch.tensor(group["lr"], dtype=torch.float64, device=params[0].device),
            scale,
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            zero_grad,
        )
