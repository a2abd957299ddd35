"""AdamW whose norm, clip, update and low-precision copy run in the fewest passes over memory.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. Moments of 8 bits after Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization", 2021; the code itself is another (see reference.py).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgpt.kernels import ops
from fastgpt.kernels.reference import MOMENT_BLOCK

# Bytes a parameter, of the parameter itself and the optimizer's state, and with gradients of the same dtype:
#
#   fp32                                          12     16
#   fp32, state_bits=8                             6.03  10.03
#   bf16 copy beside fp32, fp32 gradients         14     18
#   bf16, stochastic_rounding                      6      8
#   bf16, stochastic_rounding, state_bits=8        4.03   6.03


class FusedAdamW(Optimizer):
    """``torch.optim.AdamW`` in one kernel, with gradient clipping inside.

    Same maths and same ``state_dict`` layout as ``torch.optim.AdamW``, so either loads the other's. A parameter
    may be one flat buffer that holds a whole model: the cost is one pass either way.

    Two options save memory, alone or together. Both draw random numbers from a seed of each parameter group,
    which is taken from torch's generator when the group is added and kept in the ``state_dict``; the same seed
    gives the same bits.

    Args:
        params: parameters or parameter groups, fp32 or bf16, contiguous.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient; per parameter group if given there.
        max_grad_norm: gradients of all groups, taken as one vector, are scaled down to at most this L2
            norm; ``None`` for no clipping. The norm before clipping is left in ``grad_norm``.
        copies: maps a parameter to a bf16 tensor of its shape that receives every new value.
        state_bits: 32 keeps the moments in the parameter's dtype, 8 bytes a parameter in fp32. 8 keeps one byte
            for each and one fp32 scale for 256 consecutive elements, 2.03 bytes a parameter; the state then has
            uint8 ``exp_avg`` and ``exp_avg_sq`` in the parameter's shape, and ``exp_avg_scale`` and
            ``exp_avg_sq_scale`` of shape (ceil(numel / 256),).
        stochastic_rounding: bf16 parameters, and their moments if these are bf16, are rounded up or down at
            random so that the mean is right. Steps smaller than half the distance of two bf16 numbers then count,
            which rounding to the nearest loses; so there need be no fp32 master copy, 4 bytes a parameter.

    Raises:
        ValueError: a hyperparameter is out of range, a parameter is not contiguous, or ``stochastic_rounding``
            is asked for parameters that are not bf16.
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
        state_bits: int = 32,
        stochastic_rounding: bool = False,
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
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits: expected 8 or 32, got {state_bits}")
        self.state_bits = state_bits
        self.stochastic_rounding = stochastic_rounding
        self._seeds: dict[int, Tensor] = {}  # the groups' seeds on their devices
        # Each parameter's ``step``, its version then, and its value, so that no step waits to read it from a GPU.
        self._steps: dict[Tensor, tuple[Tensor, int, int]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for param, copy in (copies or {}).items():
            if copy.dtype != torch.bfloat16 or copy.shape != param.shape or not copy.is_contiguous():
                raise ValueError(f"copies: expected contiguous bf16 of shape {tuple(param.shape)}, got {copy.dtype}")
        self.max_grad_norm = max_grad_norm
        self.copies = copies or {}
        self.grad_norm: Tensor | None = None

    @property
    def _compact(self) -> bool:
        """Whether an option that saves memory is on."""
        return self.state_bits == 8 or self.stochastic_rounding

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; ``__init__`` does it for every group that it is given.

        Raises:
            ValueError: a parameter is not contiguous, or not bf16 under ``stochastic_rounding``.
        """
        super().add_param_group(param_group)
        group = self.param_groups.pop()  # back once it has been found right
        for param in group["params"]:
            if not param.is_contiguous():
                raise ValueError(f"params: a parameter of shape {tuple(param.shape)} is not contiguous")
            if self.stochastic_rounding and param.dtype != torch.bfloat16:
                raise ValueError(f"stochastic_rounding: expected bf16 parameters, got {param.dtype}")
        if self._compact:
            group.setdefault("seed", int(torch.randint(2**62, ())))
        self.param_groups.append(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from ``state_dict``.

        Raises:
            ValueError: its moments have another number of bits than this optimizer's.
        """
        for state in state_dict["state"].values():
            bits = 8 if "exp_avg_scale" in state else 32
            if bits != self.state_bits:
                raise ValueError(f"state_dict: has moments of {bits} bits, but state_bits is {self.state_bits}")
        own = [group.get("seed") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, seed in zip(self.param_groups, own, strict=True):
            if seed is not None:
                group.setdefault("seed", seed)  # what comes from a plain AdamW has none
        for p, state in self.state.items():
            state["step"] = state["step"].to(p.device)  # torch.optim.AdamW keeps it on the CPU
            if self.state_bits == 8:  # PyTorch has cast them to the parameter's dtype; bf16 holds every code and scale
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = state[name].to(torch.uint8)
                    state[f"{name}_scale"] = state[f"{name}_scale"].float()

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
        together: dict[int, list[Tensor]] = {}  # by step: one that joined late has another bias correction
        for p in params:
            if not self.state[p]:
                self.state[p] = self._new_state(p)
            together.setdefault(self._next_step(p), []).append(p)
        for alike in together.values():
            self._step_alike(alike, group, scale, zero_grad)

    def _next_step(self, p: Tensor) -> int:
        """Count one more step of ``p``, on its device and here."""
        step = self.state[p]["step"]
        known = self._steps.get(p)
        if known is not None and known[0] is step and known[1] == step._version:
            count = known[2]
        else:  # loaded, or written to from outside
            count = int(step)
        step += 1
        self._steps[p] = step, step._version, count + 1
        return count + 1

    def _new_state(self, p: Tensor) -> dict[str, Tensor]:
        """Zeros; the order of the keys is that of ``torch.optim.AdamW``."""
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        self._steps[p] = step, step._version, 0
        state = {"step": step}
        dtype = torch.uint8 if self.state_bits == 8 else p.dtype
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if self.state_bits == 8:
            for name in ("exp_avg_scale", "exp_avg_sq_scale"):
                state[name] = torch.zeros(-(-p.numel() // MOMENT_BLOCK), device=p.device)
        return state

    def _step_alike(self, params: list[Tensor], group: dict[str, Any], scale: Tensor | None, zero_grad: bool) -> None:
        def states(name: str) -> list[Tensor]:
            return [self.state[p][name] for p in params]

        beta1, beta2 = group["betas"]
        tensors = [params, [p.grad for p in params], states("exp_avg"), states("exp_avg_sq")]
        copies = [self.copies[p] for p in params] if self.copies else []
        step = self.state[params[0]]["step"]
        lr = torch.tensor(group["lr"], dtype=torch.float64, device=step.device)
        hyperparameters = (beta1, beta2, group["eps"], group["weight_decay"], zero_grad)
        if not self._compact:
            ops.resolve("adamw_", params[0])(*tensors, copies, step, lr, scale, *hyperparameters)
            return
        scales = [states("exp_avg_scale"), states("exp_avg_sq_scale")] if self.state_bits == 8 else [[], []]
        ops.resolve("adamw_compact_", params[0])(
            *tensors, *scales, copies, step, lr, scale, self._seed(group["seed"], step.device), *hyperparameters,
            self.stochastic_rounding,
        )  # fmt: skip

    def _seed(self, seed: int, device: torch.device) -> Tensor:
        """A group's seed as a 0-dim tensor on its device, where it stays."""
        if seed not in self._seeds:
            self._seeds[seed] = torch.tensor(seed, device=device)
        return self._seeds[seed]
