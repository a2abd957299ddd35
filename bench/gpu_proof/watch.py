"""Checks every access of every program in Triton's interpreter, before it happens (``memory.py`` has the state).

- bounds: an address is an element of the tensor, or view, that its pointer was made from;
- races: no program writes what another one reads or writes in the same launch. No program reads what it has itself
  written, because another of its threads may have written it. Elements that receive atomic additions are not otherwise
  read or written in that launch;
- unwritten: no memory is read before it is written, and all elements that an operator returns are written;
- hints: the promises of ``tl.multiple_of`` hold;
- overflow: no sum, difference or product overflows int32, by Triton's own check;
- grid: the number of programs is within CUDA's limits.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl  # noqa: F401  the interpreter looks it up in the globals of what it runs: sampled()
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from bench.gpu_proof.cases import OPS, Case, Ops
from bench.gpu_proof.memory import Fault, View, Watch
from fastgpt.kernels.triton import launch

SAMPLE = 2  # programs that run at each end of a large launch
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along x, y and z; CUDA C++ programming guide, compute capabilities

# With many SMs there are many programs, so that those that loop over rows take few steps each.
MANY_SMS = replace(launch.INTERPRETER, n_sm=2**14)


# ---- functions of the interpreter, with checks before them ----


def _accesses(watch: Watch) -> dict[str, Callable[..., Any]]:
    """Loads, stores and atomic additions, which are carried out after the check."""
    true_load, true_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    true_atomic = InterpreterBuilder.create_atomic_rmw
    additions = interpreter._ir.ATOMIC_OP.ADD, interpreter._ir.ATOMIC_OP.FADD

    def touch(pointers: TensorHandle, mask: TensorHandle, verb: str) -> None:
        view = pointers.attr.get("view")
        if view is None:
            raise Fault("bounds: a pointer that was not made from a known tensor")
        watch.touch(view, pointers.data, np.broadcast_to(mask.data, pointers.data.shape), verb)

    def load(self, pointers, mask, *rest):
        touch(pointers, mask, "reads")
        return true_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        touch(pointers, mask, "writes")
        return true_store(self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        if operation not in additions:
            raise Fault(f"race: atomic {operation} is not supported here, only additions are")
        touch(pointers, mask, "adds to")
        return true_atomic(self, operation, pointers, value, mask, *rest)

    def exchange(self, *args):
        raise Fault("race: atomic compare-and-swap is not supported here, only additions are")

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "create_atomic_cas": exchange,
    }


def _pointers(watch: Watch) -> dict[str, Callable[..., Any]]:
    """Operations that make a pointer from another, which keep the view that it belongs to."""
    true_int_to_ptr = InterpreterBuilder.create_int_to_ptr

    def handing_on(true: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def derived(self, *args):
            result = true(self, *args)
            for arg in args:
                if isinstance(arg, TensorHandle) and "view" in arg.attr:
                    result.attr["view"] = arg.attr["view"]
            return result

        return derived

    def int_to_ptr(self, address, dtype):
        result = true_int_to_ptr(self, address, dtype)
        if int(address.data.item()) not in watch.tabled:
            raise Fault("bounds: an address from a table is not the start of a tensor")
        result.attr["view"] = watch.tabled[int(address.data.item())]
        return result

    makers = [
        f"create_{name}" for name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans")
    ]
    return {name: handing_on(getattr(InterpreterBuilder, name)) for name in makers} | {"create_int_to_ptr": int_to_ptr}


def _arguments() -> Callable[[Any], Any]:
    """``interpreter._implicit_cvt``, which makes a kernel's pointer from a tensor; it remembers the tensor."""
    true_convert = interpreter._implicit_cvt

    def convert(arg):
        result = true_convert(arg)
        if isinstance(arg, Tensor):
            result.handle.attr["view"] = View(arg)
        return result

    return convert


def _hints() -> Callable[..., None]:
    """``TensorHandle.set_attr``, which the interpreter calls for ``tl.multiple_of``."""
    true_set = TensorHandle.set_attr

    def set_attr(self, key, value):
        if key == "tt.divisibility" and (self.data.astype(np.uint64) % np.uint64(np.ravel(value)[0])).any():
            raise Fault(f"hint: {self.data.ravel()[0]} is not a multiple of {value}")
        true_set(self, key, value)

    return set_attr


def _check_assertion(self: Any, condition: TensorHandle, message: str) -> None:
    """``create_assert``, which the interpreter's check of int32 calls."""
    if not condition.data.all():
        raise Fault(f"overflow: {message}")


def _set_grid_idx(watch: Watch) -> Callable[..., None]:
    """``set_grid_idx``, with which the interpreter moves to another program."""
    true_index = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        true_index(self, x, y, z)
        watch.program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    return set_grid_idx


def _launches(watch: Watch) -> Callable[..., None]:
    """``GridExecutor.__call__``: a launch, of a sample of the programs if the shapes are large."""
    true_call = GridExecutor.__call__

    def call(self, *args, **kwargs):
        watch.launches += 1
        watch.kernel, kernel, grid = self.fn.__name__, self.fn, (*self.grid, 1, 1)[:3]
        if any(programs > most for programs, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise Fault(f"grid: {self.grid} of {watch.kernel}; CUDA takes {MOST_PROGRAMS}")
        n_programs = grid[0] * grid[1] * grid[2]

        @functools.wraps(kernel)
        def sampled(**arguments):
            if not SAMPLE <= watch.program < n_programs - SAMPLE:
                kernel(**arguments)

        sampled.__signature__ = inspect.signature(kernel)
        if watch.large:
            self.fn = sampled
        return true_call(self, *args, **kwargs)

    return call


class _Fresh(TorchFunctionMode):
    """Records memory that is allocated without values, and what PyTorch then writes to it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("empty", "empty_like", "new_empty", "empty_strided") and result.numel():
            self.watch.memory(result, fresh=True)
        elif name in ("copy_", "zero_", "fill_") and result.numel():
            self.watch.wrote(result)
        return result


@contextmanager
def watched(large: bool = False) -> Iterator[Watch]:
    """Check all accesses inside the block; a :class:`Fault` ends the launch.

    Args:
        large: tensors are too large to be touched, so only a sample of the programs runs, and only addresses, hints,
            int32 and the grid are checked.
    """
    watch = Watch(large)
    with ExitStack() as stack:
        for name, function in (_accesses(watch) | _pointers(watch)).items():
            stack.enter_context(patch.object(InterpreterBuilder, name, function))
        stack.enter_context(patch.object(InterpreterBuilder, "create_assert", _check_assertion))
        stack.enter_context(patch.object(InterpreterBuilder, "set_grid_idx", _set_grid_idx(watch)))
        stack.enter_context(patch.object(GridExecutor, "__call__", _launches(watch)))
        stack.enter_context(patch.object(TensorHandle, "set_attr", _hints()))
        stack.enter_context(patch.object(interpreter, "_implicit_cvt", _arguments()))
        with_checks = interpreter.InterpreterOptions(debug=True)  # of int32
        stack.enter_context(patch.object(interpreter.interpreter_builder, "options", with_checks))
        if large:
            stack.enter_context(patch.object(launch, "INTERPRETER", MANY_SMS))
        else:
            stack.enter_context(_Fresh(watch))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # NumPy warns of infinities
        yield watch


class _Checked(dict[str, Callable[..., Any]]):
    """Operators with checks of their arguments and results."""

    def __init__(self, ops: Ops, watch: Watch) -> None:
        super().__init__({name: functools.partial(self._call, op) for name, op in ops.items()})
        self.watch = watch

    def _call(self, op: Callable[..., Any], *args: Any) -> Any:
        # the kernels of AdamW find the tensors of these lists through tables of addresses
        lists = [arg for arg in args if isinstance(arg, list)]
        tabled = [tensor for tensors in lists for tensor in tensors if isinstance(tensor, Tensor)]
        self.watch.tabled = {tensor.data_ptr(): View(tensor) for tensor in tabled}
        results = op(*args)
        self.watch.check_results(results)
        return results


def fault_of(case: Case, ops: Ops = OPS, large: bool = False) -> tuple[str, Watch]:
    """The fault in the kernels that a case runs, and where; empty if there is none."""
    torch.manual_seed(0)
    with watched(large) as watch:
        try:
            case(_Checked(ops, watch))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__  # the interpreter wraps exceptions of a kernel
            if cause is None:
                raise
            return str(cause), watch
    return "", watch
