"""AdamW with gradient clipping, update and low-precision copy in two passes over memory.

Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019. Moments of 8 bits after Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization", 2021; the codes differ (see moments_8bit.py).
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastgpt.kernels import checks, dispatch, sharded
from fastgpt.kernels.moments_8bit import MOMENT_BLOCK

# Bytes for each parameter: the parameter and the optimizer's state; and these with gradients of the same dtype.
#
#   fp32                                          12     16
#   fp32, state_bits=8                             6.03  10.03
#   bf16 copy beside fp32, fp32 gradients         14     18
#   bf16, stochastic_rounding                      6      8
#   bf16, stochastic_rounding, state_bits=8        4.03   6.03

# Options of torch.optim.AdamW that change the maths, and the only value of each that is supported.
FIXED_OPTIONS = {"amsgrad": False, "maximize": False, "differentiable": False, "decoupled_weight_decay": True}

CAPTURED_TOO_EARLY = "step: before each capture in a CUDA graph, run a step outside a graph on the same parameters"


class Batch(NamedTuple):
    """Parameters of one group that one call of a kernel updates.

    Attributes:
        group: the parameter group.
        steps: the number of steps that they have taken, since the bias correction depends on it. Where steps may be
            skipped the host does not know it; equal numbers then stand for the same steps.
        place: their device, and the backend that takes their dtype.
        params: the parameters; each has a gradient.
        states: the state of each parameter.
        distributed: whether they may be DTensors, of which a kernel takes the shards that lie here.
    """

    group: dict[str, Any]
    steps: int
    place: tuple[torch.device, str]
    distributed: bool
    params: list[Tensor]
    states: list[dict[str, Tensor]]


class FusedAdamW(Optimizer):
    """``torch.optim.AdamW`` in one kernel, including gradient clipping.

    The maths and the ``state_dict`` layout are those of ``torch.optim.AdamW``, so either loads the other's, and code
    for one works with the other: parameter groups, learning rate schedulers, ``torch.amp.GradScaler`` (it skips a step
    with gradients that are not finite; clipping sees unscaled gradients), closures, hooks, ``deepcopy`` and ``pickle``
    (they keep every option, and training continues to the same bits). ``amsgrad``, ``maximize`` and ``differentiable``
    are not supported: they are an error as an argument, in a parameter group and in a ``state_dict``. So is the
    ``state_dict`` of a plain Adam (``decoupled_weight_decay=False``). ``foreach``, ``fused`` and ``capturable`` choose
    among PyTorch's kernels; they are accepted, kept in groups, and have no effect.

    A parameter may be one flat buffer that holds a whole model: the cost is one pass either way. ``state_bits`` and
    ``stochastic_rounding`` save memory, alone or together. Both draw random numbers from a seed of each parameter
    group. It is taken from torch's generator when the group is added, and kept in the ``state_dict``; the same seed
    gives the same bits.

    Parameters may be DTensors, as ``torch.distributed.fsdp.fully_shard`` makes them: each process updates its shards,
    and the gradient norm is that of all shards, which takes an all-reduce of one number for each dimension of the mesh
    that shards. The moments are DTensors placed as their parameter, for ``torch.distributed.checkpoint``; ``step`` is
    an ordinary tensor. ``state_bits=8`` does not support DTensors.

    A step may be captured in a CUDA graph after a step outside a graph; each further capture needs another such step.
    Numbers become constants of the graph. Tensors, which ``lr`` and ``grad_scale`` can be, are read at every replay.

    Args:
        params: parameters or parameter groups, contiguous. Dtypes that the kernels of a device do not take, such as
            float64 and, on a CPU, fp16, run on plain PyTorch.
        lr: learning rate, a number or a tensor of one element; a scheduler writes to such a tensor in place.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient; a parameter group may have its own.
        max_grad_norm: the gradients of all groups, taken as one vector, are scaled down to at most this L2 norm;
            ``None`` for no clipping. The norm before clipping is stored in ``grad_norm``.
        copies: maps every parameter to a bf16 tensor of its shape that receives each new value.
        state_bits: 32 keeps the moments in the parameter's dtype, which takes 8 bytes a parameter in fp32. The moments
            of fp16 parameters are fp32, because squares of typical gradients underflow in fp16. 8 keeps one byte for
            each moment and one fp32 scale for 256 consecutive elements, 2.03 bytes a parameter. The state then has
            uint8 ``exp_avg`` and ``exp_avg_sq`` in the parameter's shape, and ``exp_avg_scale`` and
            ``exp_avg_sq_scale`` of shape (ceil(numel / 256),).
        skip_nonfinite: a step whose gradient norm is infinite or NaN changes no parameter, no state and no copy, and
            does not count as a step; it still sets the gradients to zero if asked to. Nothing waits for the device:
            ``found_inf`` says whether the last step was skipped.
        stochastic_rounding: bf16 parameters, and their moments if these are bf16, are rounded up or down at random so
            that the mean is correct. Rounding to the nearest would lose steps smaller than half the distance of two
            bf16 numbers. This makes an fp32 master copy, 4 bytes a parameter, unnecessary.
        amsgrad: not supported; ``True`` is an error.
        maximize: not supported; ``True`` is an error.
        foreach: no effect.
        capturable: no effect; a step can always be captured.
        differentiable: not supported; ``True`` is an error.
        fused: no effect.

    Attributes:
        grad_norm: 0-dim fp32, of the last step, before clipping; ``None`` without ``max_grad_norm`` and
            ``skip_nonfinite``.
        found_inf: 0-dim fp32, 1 if the last step was skipped, also because of ``skip_above``, and 0 otherwise; ``None``
            without ``skip_nonfinite``.

    Raises:
        TypeError: an argument has a wrong type, or a parameter a dtype other than the above.
        ValueError: a hyperparameter is out of range, here or in a group; an option is not supported; there is no
            parameter; a parameter is not contiguous, has its negative bit set (``torch.resolve_neg`` clears it), is
            given twice, or is not bf16 under ``stochastic_rounding``; a DTensor is a partial sum, or ``state_bits``
            is 8; ``copies`` lacks a parameter, or has a tensor for something that is not a parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
        *,
        copies: Mapping[Tensor, Tensor] | None = None,
        state_bits: int = 32,
        stochastic_rounding: bool = False,
        skip_nonfinite: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_hyperparameters({**defaults, "amsgrad": amsgrad, "maximize": maximize, "differentiable": differentiable})
        if max_grad_norm is not None and max_grad_norm != math.inf:  # infinity measures the norm and never clips
            checks.number("max_grad_norm", max_grad_norm)
            if max_grad_norm <= 0.0:
                raise ValueError(f"max_grad_norm: expected a number above 0, or None, got {max_grad_norm}")
        if state_bits not in (8, 32):
            raise ValueError(f"state_bits: expected 8 or 32, got {state_bits}")
        if not isinstance(copies, Mapping | None):
            raise TypeError(f"copies: expected a dict from parameters to tensors, got {type(copies).__name__}")
        checks.boolean("stochastic_rounding", stochastic_rounding)
        checks.boolean("skip_nonfinite", skip_nonfinite)
        self.max_grad_norm = max_grad_norm
        self.copies = dict(copies or {})
        self.state_bits = state_bits
        self.stochastic_rounding = stochastic_rounding
        self.skip_nonfinite = skip_nonfinite
        self.grad_norm: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._n_calls = 0  # of step
        # Each parameter's state["step"], its version, and its value then, so that no step has to read it from a GPU.
        self._steps: dict[Tensor, tuple[Tensor, int, int]] = {}
        self._captured = False  # a CUDA graph has captured a step; its replays change state["step"] and not _steps
        super().__init__(params, defaults)
        strangers = self.copies.keys() - {p for group in self.param_groups for p in group["params"]}
        if strangers:
            raise ValueError(f"copies: has a key that is not a parameter, of shape {tuple(strangers.pop().shape)}")

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "max_grad_norm", "copies", "state_bits", "stochastic_rounding", "skip_nonfinite", "grad_norm", "found_inf",
        )  # fmt: skip
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._steps, self._n_calls = {}, 0
        for name in ("_captured", "skip_nonfinite"):  # pickled by a version without them
            self.__dict__.setdefault(name, False)
        self.__dict__.setdefault("found_inf", None)

    @property
    def _needs_adamw_8bit(self) -> bool:
        """Whether a step needs the operator ``adamw_8bit_``, for 8-bit moments or stochastic rounding."""
        return self.state_bits == 8 or self.stochastic_rounding

    def _moment_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the moments of a parameter of ``dtype``."""
        if self.state_bits == 8:
            return torch.uint8
        return torch.float32 if dtype == torch.float16 else dtype

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; ``__init__`` calls this for each of its groups.

        Raises:
            TypeError: as in ``__init__``.
            ValueError: as in ``__init__``; ``copies``, if given, must contain the new parameters already.
        """
        # without its decorator, which disables Dynamo and imports it to do so: a second, and 140 MiB
        inspect.unwrap(Optimizer.add_param_group)(self, param_group)
        group = self.param_groups.pop()  # appended again below, once it is checked
        self._check_group(group)
        for param in group["params"]:
            self._check_parameter(param, group)
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError("params: a parameter is given twice")
        if self._needs_adamw_8bit and "seed" not in group:
            group["seed"] = sharded.common_seed(group["params"])
        self.param_groups.append(group)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Check the hyperparameters of a group that is added or loaded."""
        _check_hyperparameters(group)

    def _moment_names(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """What the state of a parameter of ``group`` has besides the number of steps."""
        return "exp_avg", "exp_avg_sq"

    def _check_parameter(self, param: Any, group: Mapping[str, Any]) -> None:
        shape = tuple(param.shape)
        checks.floating(params=param)
        if not sharded.local(param).is_contiguous():
            raise ValueError(f"params: a parameter of shape {shape} is not contiguous")
        if sharded.local(param).is_neg():
            raise ValueError(f"params: a parameter of shape {shape} has its negative bit set; clone it")
        if sharded.is_dtensor(param) and any(placement.is_partial() for placement in param.placements):
            raise ValueError(f"params: a DTensor of shape {shape} is a partial sum; redistribute it first")
        if sharded.is_dtensor(param) and self.state_bits == 8:
            raise ValueError("state_bits: 8 is not supported for a DTensor: blocks of 256 elements would cross shards")
        if self.stochastic_rounding and param.dtype != torch.bfloat16:
            raise ValueError(f"stochastic_rounding: expected bf16 parameters, got {param.dtype}")
        if not self.copies:
            return
        copy = self.copies.get(param)
        if copy is None:
            raise ValueError(f"copies: expected a tensor for every parameter, has none for one of shape {shape}")
        if not isinstance(copy, Tensor):
            raise TypeError(f"copies: expected a Tensor, got {type(copy).__name__}")
        if copy.dtype != torch.bfloat16 or copy.shape != shape or not copy.is_contiguous():
            raise ValueError(f"copies: expected contiguous bf16 of shape {shape}, got {copy.dtype}")
        if copy.device != param.device:
            raise ValueError(f"copies: device {copy.device} differs from the parameter's {param.device}")
        if not sharded.placed_alike(copy, param):
            raise ValueError(f"copies: expected a tensor placed as its parameter of shape {shape} is")

    def use_state(self, param: Tensor, moments: dict[str, Tensor]) -> None:
        """Use existing tensors as the moments of a parameter that has taken no step.

        Args:
            param: a parameter of this optimizer.
            moments: zeros, with the names, shapes and dtypes of the state that the optimizer would allocate.

        Raises:
            ValueError: a name, shape or dtype differs.
        """
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        group = next(group for group in self.param_groups if any(p is param for p in group["params"]))
        for name, expected in self._new_state(torch.empty_like(param, device="meta"), group).items():
            given = step if name == "step" else moments.get(name)
            if given is None or given.shape != expected.shape or given.dtype != expected.dtype:
                raise ValueError(f"moments: expected {name} of shape {tuple(expected.shape)}, {expected.dtype}")
        self.state[param] = {"step": step, **moments}
        self._steps[param] = step, step._version, 0

    # ---- loading ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict`` of ``FusedAdamW`` or of ``torch.optim.AdamW``.

        Raises:
            TypeError: a hyperparameter has a wrong type.
            ValueError: its moments have another number of bits than this optimizer's, or other shapes than the
                parameters; or it has an option that is not supported. The optimizer is then unchanged.
        """
        seeds = [group.get("seed") for group in self.param_groups]
        loaded: dict[str, Any] = {}
        # The pre-hook runs after the caller's pre-hooks, which may return another state_dict; the post-hook runs before
        # the caller's post-hooks.
        check = self.register_load_state_dict_pre_hook(lambda _, final: loaded.update(self._checked(final)))
        restore = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded, seeds), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()
            restore.remove()

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        groups, own = state_dict["param_groups"], self.param_groups
        for group in groups:
            self._check_group(group)
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
            return state_dict  # PyTorch raises the error
        for p, state, group in _states_by_parameter(own, state_dict):
            bits = 8 if any(name.endswith("_scale") for name in state) else 32
            if bits != self.state_bits:
                raise ValueError(f"state_dict: has moments of {bits} bits, but state_bits is {self.state_bits}")
            for name, expected in self._new_state(torch.empty_like(p, device="meta"), group).items():
                if name not in state:
                    raise ValueError(f"state_dict: a parameter of shape {tuple(p.shape)} has no {name}")
                if name != "step" and state[name].shape != expected.shape:
                    raise ValueError(
                        f"state_dict: expected {name} of shape {tuple(expected.shape)}, got {tuple(state[name].shape)}"
                    )
                if name != "step" and not sharded.placed_alike(state[name], p):
                    raise ValueError(
                        f"state_dict: expected {name} of shape {tuple(expected.shape)} placed as its parameter is; "
                        "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
                    )
        return state_dict

    def _restore(self, state_dict: dict[str, Any], seeds: list[int | None]) -> None:
        """Undo PyTorch's cast of every loaded tensor to the dtype of its parameter."""
        for group, seed in zip(self.param_groups, seeds, strict=True):
            if seed is not None:
                group.setdefault("seed", seed)  # a state_dict of torch.optim.AdamW has none
        for p, state, group in _states_by_parameter(self.param_groups, state_dict):
            own = self.state[p]
            own["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device).reshape(())
            for name in self._moment_names(group):
                own[name] = state[name].to(p.device, self._moment_dtype(p.dtype)).contiguous()
                if self.state_bits == 8:
                    own[f"{name}_scale"] = state[f"{name}_scale"].to(p.device, torch.float32).contiguous()

    # ---- the step ----

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        zero_grad: bool = False,
        skip_above: float | Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and is called first, as in every optimizer.
            grad_scale: gradients are multiplied by it before anything else, for example by
                1 / gradient_accumulation_steps; a number or a tensor of one element.
            zero_grad: also set the gradients to zero, in the same pass. Do not use it with ``GradScaler``: a step that
                it skips would leave the gradients infinite.
            skip_above: with ``skip_nonfinite``, also skip the step if the gradient norm, before clipping, is above
                this; a number or a tensor of one element.

        Returns:
            The result of ``closure``.

        Raises:
            ValueError: an option that is not supported has been set in a group, or ``skip_above`` is given without
                ``skip_nonfinite``.
            TypeError: the kernels of a parameter do not take the dtype of its gradient, ``grad_scale`` or
                ``skip_above`` is not a number, or ``zero_grad`` not a bool.
            RuntimeError: a gradient is sparse; a gradient or state does not fit its parameter, for example because the
                model was cast or moved after its first step; or a CUDA graph captures a step too early.
        """
        checks.boolean("zero_grad", zero_grad)
        if skip_above is not None and not self.skip_nonfinite:
            raise ValueError("skip_above: needs skip_nonfinite=True")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturing = _capturing()
        self._captured = self._captured or capturing
        self._n_calls += 1
        self.found_inf = None
        batches = [batch for group in self.param_groups for batch in self._batches(group, capturing)]
        scale = self._scale(batches, grad_scale, skip_above)
        for batch in batches:
            self._step_batch(batch, scale, zero_grad)
            # The operators do not count up the version by which autograd knows that a saved tensor has changed.
            torch.autograd.graph.increment_version(
                [*batch.params, *(self.copies[p] for p in batch.params if self.copies)]
            )
            if not capturing:  # a captured step has not run yet
                steps = hash((batch.steps, self._n_calls)) if self.skip_nonfinite else batch.steps + 1
                for p, state in zip(batch.params, batch.states, strict=True):
                    step = state["step"]
                    self._steps[p] = step, step._version, steps
        return loss

    def _batches(self, group: dict[str, Any], capturing: bool) -> list[Batch]:
        """The parameters of a group that have a gradient, checked, divided into what one call of a kernel takes."""
        _check_fixed_options(group)  # which other code may have set since
        batches: dict[tuple[int, torch.device, str, bool], Batch] = {}
        first_moment = self._moment_names(group)[0]
        kind: tuple[torch.device, torch.dtype] | None = None
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            device, dtype = p.device, p.dtype
            if kind != (device, dtype):
                kind = device, dtype
                backend, moment_dtype = dispatch.backend_of(device, dtype)[0], self._moment_dtype(dtype)
            distributed = sharded.is_dtensor(p)
            state = self.state[p]
            if not state:
                if capturing:
                    raise RuntimeError(CAPTURED_TOO_EARLY)
                state |= self._new_state(p, group)
                self._steps[p] = state["step"], state["step"]._version, 0
            moment = state[first_moment]
            if not (
                moment.dtype == moment_dtype and grad.dtype == dtype and moment.device == grad.device == device
                and moment.shape == grad.shape == p.shape and p.is_contiguous()
                and grad.is_contiguous() and not grad.is_neg()
                and (not distributed or sharded.shards_fit(p, grad, moment))
            ):  # fmt: skip
                self._admit(p, moment, backend)
            count = self._count(p, state["step"], capturing)
            key = count, device, backend, distributed
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(group, count, (device, backend), distributed, [], [])
            batch.params.append(p)
            batch.states.append(state)
        return list(batches.values())

    def _admit(self, p: Tensor, moment: Tensor, backend: str) -> None:
        """Make the gradient of ``p`` contiguous, as the kernels read it; raise if they cannot take it."""
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"grad: expected a dense tensor, got {grad.layout}; FusedAdamW does not support sparse gradients"
            )
        if grad.dtype not in dispatch.COMPILED_DTYPES.get(backend, checks.FLOATING):
            raise TypeError(f"grad: backend '{backend}' does not take {grad.dtype} for a parameter of {p.dtype}")
        for name, tensor in (("grad", grad), ("exp_avg", moment)):
            if tensor.shape != p.shape or tensor.device != p.device:
                raise RuntimeError(
                    f"{name}: shape {tuple(tensor.shape)} on {tensor.device} does not fit its parameter, "
                    f"{tuple(p.shape)} on {p.device}"
                )
            if not sharded.placed_alike(tensor, p):
                raise RuntimeError(f"{name}: not placed as its parameter of shape {tuple(p.shape)} is; redistribute it")
        if moment.dtype != self._moment_dtype(p.dtype):
            raise RuntimeError(f"exp_avg: {moment.dtype} does not fit its parameter, whose dtype is now {p.dtype}")
        if not sharded.local(p).is_contiguous():
            raise RuntimeError(f"params: a parameter of shape {tuple(p.shape)} is no longer contiguous")
        if not sharded.local(grad).is_contiguous() or grad.is_neg():
            p.grad = grad.resolve_neg().clone(memory_format=torch.contiguous_format)

    def forget_graphs(self) -> None:
        """Call this when no CUDA graph with a step of this optimizer will be replayed any more.

        Until then each step outside a graph reads the number of steps from the GPU, and waits for it.
        """
        self._captured = False
        self._steps.clear()

    def _count(self, p: Tensor, step: Tensor, capturing: bool) -> int:
        """The number of steps that ``p`` has taken, read from the GPU only if it is not known on the host."""
        known = self._steps.get(p)
        if known is not None and known[0] is step and known[1] == step._version and (capturing or not self._captured):
            return known[2]
        if capturing:
            raise RuntimeError(CAPTURED_TOO_EARLY)
        return int(step)  # loaded, changed by other code, or changed by a graph's replays

    def _new_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state before the first step, zeros; the keys have the order of ``torch.optim.AdamW``."""
        state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
        dtype, names = self._moment_dtype(p.dtype), self._moment_names(group)
        for name in names:
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if self.state_bits == 8:
            for name in names:
                state[f"{name}_scale"] = torch.zeros(
                    -(-p.numel() // MOMENT_BLOCK), dtype=torch.float32, device=p.device
                )
        return state

    def _scale(
        self, batches: list[Batch], grad_scale: float | Tensor, skip_above: float | Tensor | None
    ) -> Tensor | None:
        """The factor of every gradient, including clipping, as a 0-dim fp32 tensor; ``None`` for 1."""
        if not isinstance(grad_scale, Tensor):
            checks.number("grad_scale", grad_scale)
        if not isinstance(skip_above, Tensor | None):
            checks.number("skip_above", skip_above)
        measured = self.max_grad_norm is not None or self.skip_nonfinite
        if not batches or (not measured and not isinstance(grad_scale, Tensor) and grad_scale == 1.0):
            return None
        scale = on_device("grad_scale", grad_scale, torch.float32, batches[0].place[0])
        if not measured:
            return scale
        self.grad_norm = _norm(batches) * scale
        if self.skip_nonfinite:
            stepping = self.grad_norm.isfinite()
            if skip_above is not None:
                stepping &= self.grad_norm <= on_device("skip_above", skip_above, torch.float32, scale.device)
            self.found_inf = stepping.logical_not().float()
        if self.max_grad_norm is None:
            return scale
        # 1e-6 as in torch.nn.utils.clip_grad_norm_
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0) * scale

    def _step_batch(self, batch: Batch, scale: Tensor | None, zero_grad: bool) -> None:
        """Update the parameters of a batch."""
        group, _, (device, _), distributed, params, states = batch

        def moments(name: str) -> list[Tensor]:
            return [state[name] for state in states]

        beta1, beta2 = group["betas"]
        tensors: list[list[Any]] = [params, [p.grad for p in params], moments("exp_avg"), moments("exp_avg_sq")]
        copies = [self.copies[p] for p in params] if self.copies else []
        if distributed:
            tensors, copies = [list(map(sharded.local, part)) for part in tensors], list(map(sharded.local, copies))
        lr = on_device("lr", group["lr"], torch.float64, device)
        found_inf = None if self.found_inf is None else self.found_inf.to(device)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1 if found_inf is None else [1 - found_inf] * len(steps))
        if scale is not None:
            scale = scale.to(device)
        step = steps[0]
        hyperparameters = (beta1, beta2, group["eps"], group["weight_decay"], zero_grad)
        if not self._needs_adamw_8bit:
            dispatch.resolve("adamw_", tensors[0][0])(
                *tensors, copies, step, lr, scale, *hyperparameters, found_inf
            )  # fmt: skip
            return
        scales = [moments("exp_avg_scale"), moments("exp_avg_sq_scale")] if self.state_bits == 8 else [[], []]
        seed = torch.full((), group["seed"], dtype=torch.int64, device=device)
        dispatch.resolve("adamw_8bit_", tensors[0][0])(
            *tensors, *scales, copies, step, lr, scale, seed, *hyperparameters, self.stochastic_rounding, found_inf
        )


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, so that kernels are recorded and not run."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _norm(batches: list[Batch]) -> Tensor:
    """The L2 norm of all gradients taken as one vector, on the device of the first.

    Gradients that are sharded over processes count with all their shards, and replicated ones once. Every process gets
    the same norm.
    """
    parts: dict[tuple[torch.device, str, Any], list[Tensor]] = {}
    for batch in batches:
        if not batch.distributed:
            parts.setdefault((*batch.place, None), []).extend(batch.params)
            continue
        for p in batch.params:
            parts.setdefault((*batch.place, sharded.sharding(p)), []).append(p)
    norms = []
    for (_, backend, sharding), params in parts.items():
        grads = [sharded.local(grad) for p in params if (grad := p.grad) is not None]
        if backend == "reference":  # vector_norm(dtype=float32) does not accept float64
            grads = [grad.float() if grad.dtype == torch.float64 else grad for grad in grads]
        norm = dispatch.resolve("grad_norm", grads[0])(grads)
        norms.append(norm if sharding is None else sharded.over_shards(norm, *sharding))
    return norms[0] if len(norms) == 1 else torch.stack([norm.to(norms[0].device) for norm in norms]).norm()


def on_device(name: str, value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a tensor of one element as a 0-dim tensor on ``device``.

    A number is written by a kernel that has it as an argument, without a copy from the host. A tensor is copied only if
    it is on another device or of another dtype.
    """
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=device)
    if value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}")
    if value.device != device and _capturing():
        raise RuntimeError(f"{name}: a CUDA graph on {device} cannot read a tensor on {value.device}")
    return value.to(device, dtype).reshape(())


def _states_by_parameter(
    groups: list[dict[str, Any]], state_dict: dict[str, Any]
) -> list[tuple[Tensor, Any, dict[str, Any]]]:
    """The parameters of ``groups`` that have a state in ``state_dict``, each with its state and its group."""
    return [
        (p, state_dict["state"][index], group)
        for group, saved in zip(groups, state_dict["param_groups"], strict=True)
        for p, index in zip(group["params"], saved["params"], strict=True)
        if state_dict["state"].get(index)
    ]


def _check_fixed_options(group: Mapping[str, Any]) -> None:
    for name, only in FIXED_OPTIONS.items():
        if bool(group.get(name, only)) != only:
            raise ValueError(f"{name}: FusedAdamW supports only {only}, got {group[name]}")


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of a parameter group, given or loaded."""
    _check_fixed_options(group)
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in group:
            raise ValueError(f"{name}: missing in a parameter group")
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: expected a number or a tensor of one element, got shape {tuple(lr.shape)}")
        lr = lr.item()
    for name, value in (("lr", lr), ("eps", group["eps"]), ("weight_decay", group["weight_decay"])):
        checks.number(name, value)
        if value < 0.0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
    for beta in betas:
        checks.number("betas", beta)
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
