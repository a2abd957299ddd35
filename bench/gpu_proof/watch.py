"""Triton's interpreter, watched: every access of every program is checked before it happens.

- bounds: an address is an element of the very tensor, or view, that its pointer was made from;
- races: no program writes what another reads or writes in the same launch, and none reads what it has itself written,
  since another of its threads may have. What some add to by atomics, nobody reads or writes in that launch;
- unwritten: memory that nobody has written is not read, and what an operator returns is written whole;
- hints: what ``tl.multiple_of`` promises is so;
- overflow: no sum, difference or product leaves int32, by Triton's own check;
- grid: CUDA takes as many programs.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it among the globals of what it runs: sampled()
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from bench.gpu_proof.cases import OPS, Case, Ops
from fastgpt.kernels.triton import launch

NOBODY, MANY = -1, -2  # instead of a program
SAMPLE = 2  # programs at either end of a large launch that run
MOST_PROGRAMS = (2**31 - 1, 65535, 65535)  # along x, y and z; CUDA C++ programming guide, compute capabilities
LARGEST_MAP = 2**26  # elements between the first and the last of a view for which it is noted which are its own
TRITON = str(Path(triton.__file__).parent)

# With many SMs there are many programs, so that those that walk down rows take few steps each.
MANY_SMS = replace(launch._INTERPRETER, n_sm=2**14)

Pair = tuple[str, str, int, int]  # file, kernel, line of a load, line of a store


def place() -> tuple[str, int]:
    """File and line of the kernel that is running: the innermost frame that is neither Triton's nor of this file."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(TRITON) and file != __file__:
            return file, frame.f_lineno
        frame = frame.f_back
    return "", 0


class Fault(Exception):
    """A kernel has done what it must not; says where."""

    def __init__(self, message: str) -> None:
        file, line = place()
        super().__init__(f"{message} [{Path(file).name}:{line}]")


# ---- what is known of memory ----


class View:
    """The elements that a pointer made from a tensor may reach."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size, self.start = tensor, tensor.element_size(), tensor.data_ptr()
        self.name = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        self.count = 1 + sum((n - 1) * stride for n, stride in steps) if tensor.numel() else 0
        self.inside: np.ndarray | None = None  # which elements of that stretch are the view's; None: all
        if 0 < self.count <= LARGEST_MAP and tensor.numel() != self.count:
            inside = torch.zeros(self.count, dtype=torch.bool)
            inside.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.inside = inside.numpy()

    def check(self, addresses: np.ndarray, verb: str) -> np.ndarray:
        """The elements that addresses stand for, counted from the first of the view."""
        offsets = addresses.astype(np.int64) - self.start
        elements = offsets // self.size
        bad = (offsets % self.size != 0) | (elements < 0) | (elements >= self.count)
        if self.inside is not None:
            bad |= ~self.inside[np.clip(elements, 0, self.count - 1)]
        if bad.any():
            first = int(elements[bad][0])
            raise Fault(f"bounds: {verb} {bad.sum()} elements outside {self.name}, first {first} of {self.count}")
        return elements


class Memory:
    """A tensor's storage: which programs have touched its elements in this launch, and what has ever been written."""

    def __init__(self, tensor: Tensor, fresh: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept, so that nothing else comes to lie there
        self.start, self.bytes = self.storage.data_ptr(), self.storage.nbytes()
        self.written = np.zeros(self.bytes, dtype=bool) if fresh else None  # None: it came with values
        self.launch = -1

    def begin(self, launch: int, size: int) -> None:
        """Forget what earlier launches did; ``size`` is that of an element."""
        if self.launch != launch:
            self.launch, self.size, n = launch, size, self.bytes // size
            self.reader, self.writer, self.adder = (np.full(n, NOBODY, np.int32) for _ in range(3))
            # by place and shape of a load: at which position of its tile an element was read, or -1
            self.read_at: dict[tuple[tuple[str, int], tuple[int, ...]], np.ndarray] = {}
        elif self.size != size:
            raise Fault(f"one launch uses the same memory as elements of {self.size} and of {size} bytes")

    def mark_written(self, at: np.ndarray) -> None:
        if self.written is not None:
            self.written[(at[:, None] * self.size + np.arange(self.size)).ravel()] = True

    def is_written(self, at: np.ndarray) -> bool:
        return self.written is None or bool(self.written[at * self.size].all())


class Watch:
    """All that is noted inside a :func:`watched` block.

    Attributes:
        overwritten: loads of memory that a later store of the same program overwrites, and whether each element was
            read and written at the same position of tiles of the same shape.
    """

    def __init__(self, large: bool) -> None:
        self.large = large  # only a sample of the programs runs, and no races are looked for
        self.tabled: dict[int, View] = {}  # tensors that kernels find through tables of addresses
        self.memories: dict[int, Memory] = {}
        self.launches = self.accesses = self.program = 0
        self.kernel = ""
        self.overwritten: dict[Pair, bool] = {}

    def memory(self, tensor: Tensor, fresh: bool = False) -> Memory:
        """What is known of a tensor's memory; ``fresh``: it has just been handed out without values."""
        start = tensor.untyped_storage().data_ptr()
        if fresh or start not in self.memories:
            self.memories[start] = Memory(tensor, fresh)
        return self.memories[start]

    def touch(self, view: View, addresses: np.ndarray, live: np.ndarray, verb: str) -> None:
        """A program reads, writes or adds to the live ones of a tile of addresses."""
        shape, positions, addresses = addresses.shape, np.flatnonzero(live), addresses[live]
        self.accesses += addresses.size
        elements = view.check(addresses, verb)
        if self.large or not elements.size:
            return
        memory = self.memory(view.tensor)
        memory.begin(self.launches, view.size)
        at = elements + (view.start - memory.start) // view.size
        if verb == "reads":
            self._read(view, memory, at)
            tile = memory.read_at.setdefault((place(), shape), np.full(memory.reader.size, -1, np.int32))
            tile[at] = positions
        elif verb == "writes":
            self._write(view, memory, at)
            self._note_overwritten(memory, at, positions, shape)
        else:
            self._add(view, memory, at)

    def _read(self, view: View, memory: Memory, at: np.ndarray) -> None:
        self._refuse("reads", "writes", memory.writer[at], view, own=True)
        self._refuse("reads", "adds to", memory.adder[at], view, own=True)
        if not memory.is_written(at):
            raise Fault(f"unwritten: program {self.program} reads what nobody has written, in {view.name}")
        self._sign(memory.reader, at)

    def _write(self, view: View, memory: Memory, at: np.ndarray) -> None:
        self._refuse("writes", "writes", memory.writer[at], view, own=False)
        self._refuse("writes", "reads", memory.reader[at], view, own=False)
        self._refuse("writes", "adds to", memory.adder[at], view, own=True)
        if np.unique(at).size != at.size:
            raise Fault(f"race: one store writes an element twice, in {view.name}")
        self._sign(memory.writer, at)
        memory.mark_written(at)

    def _add(self, view: View, memory: Memory, at: np.ndarray) -> None:
        self._refuse("adds to", "writes", memory.writer[at], view, own=True)
        self._refuse("adds to", "reads", memory.reader[at], view, own=True)
        if not memory.is_written(at):
            raise Fault(f"unwritten: program {self.program} adds to what nobody has written, in {view.name}")
        self._sign(memory.adder, at)

    def _refuse(self, verb: str, earlier: str, programs: np.ndarray, view: View, own: bool) -> None:
        """A race, if others have touched these elements; with ``own``, also if this program has."""
        bad = programs[(programs != NOBODY) & (own | (programs != self.program))]
        if bad.size:
            whom = {MANY: "more than one", self.program: "it itself"}.get(int(bad[0]), f"program {bad[0]}")
            raise Fault(f"race: program {self.program} {verb} what {whom} {earlier}, in {view.name}")

    def _sign(self, programs: np.ndarray, at: np.ndarray) -> None:
        before = programs[at]
        programs[at] = np.where((before == NOBODY) | (before == self.program), self.program, MANY)

    def _note_overwritten(self, memory: Memory, at: np.ndarray, positions: np.ndarray, shape: tuple[int, ...]) -> None:
        file, line = place()
        for ((read_file, read_line), read_shape), read_at in memory.read_at.items():
            seen = read_at[at]
            if (seen >= 0).any():
                assert read_file == file, (
                    "a load and a store of one kernel in two files: a pair would have to name both"
                )
                alike = shape == read_shape and bool((seen == positions)[seen >= 0].all())
                pair = file, self.kernel, read_line, line
                self.overwritten[pair] = self.overwritten.get(pair, True) and alike

    def check_results(self, results: Any) -> None:
        """What an operator hands out must have been written by its kernels."""
        for tensor in results if isinstance(results, (tuple, list)) else [results]:
            memory = self.memories.get(tensor.untyped_storage().data_ptr()) if isinstance(tensor, Tensor) else None
            if memory is None or memory.written is None or not tensor.numel():
                continue
            size = tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            written = torch.from_numpy(memory.written).as_strided(
                (*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size
            )
            if not written.all():
                raise Fault(f"unwritten: {(~written).any(-1).sum()} of {tensor.numel()} elements of a result")


# ---- the interpreter's functions, and what stands before them while it is watched ----


def _accesses(watch: Watch) -> dict[str, Callable[..., Any]]:
    """Loads, stores and atomic additions, which go ahead once they are checked."""
    true_load, true_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    true_atomic = InterpreterBuilder.create_atomic_rmw
    additions = interpreter._ir.ATOMIC_OP.ADD, interpreter._ir.ATOMIC_OP.FADD

    def touch(pointers: TensorHandle, mask: TensorHandle, verb: str) -> None:
        view = pointers.attr.get("view")
        if view is None:
            raise Fault("bounds: a pointer of which it is not known what tensor it belongs to")
        watch.touch(view, pointers.data, np.broadcast_to(mask.data, pointers.data.shape), verb)

    def load(self, pointers, mask, *rest):
        touch(pointers, mask, "reads")
        return true_load(self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        touch(pointers, mask, "writes")
        return true_store(self, pointers, value, mask, *rest)

    def atomic(self, operation, pointers, value, mask, *rest):
        if operation not in additions:
            raise Fault(f"race: of atomics, only additions are known here, not {operation}")
        touch(pointers, mask, "adds to")
        return true_atomic(self, operation, pointers, value, mask, *rest)

    def exchange(self, *args):
        raise Fault("race: of atomics, only additions are known here, not compare-and-swap")

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": atomic,
        "create_atomic_cas": exchange,
    }


def _pointers(watch: Watch) -> dict[str, Callable[..., Any]]:
    """Whatever makes a pointer from another hands on the view that it belongs to."""
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
            raise Fault("bounds: an address from a table is no tensor's start")
        result.attr["view"] = watch.tabled[int(address.data.item())]
        return result

    makers = [
        f"create_{name}" for name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans")
    ]
    return {name: handing_on(getattr(InterpreterBuilder, name)) for name in makers} | {"create_int_to_ptr": int_to_ptr}


def _arguments() -> Callable[[Any], Any]:
    """``interpreter._implicit_cvt``: the pointer that a kernel gets for a tensor belongs to that tensor."""
    true_convert = interpreter._implicit_cvt

    def convert(arg):
        result = true_convert(arg)
        if isinstance(arg, Tensor):
            result.handle.attr["view"] = View(arg)
        return result

    return convert


def _hints() -> Callable[..., None]:
    """``TensorHandle.set_attr``, which is how the interpreter is told of ``tl.multiple_of``."""
    true_set = TensorHandle.set_attr

    def set_attr(self, key, value):
        if key == "tt.divisibility" and (self.data.astype(np.uint64) % np.uint64(np.ravel(value)[0])).any():
            raise Fault(f"hint: {self.data.ravel()[0]} is no multiple of {value}")
        true_set(self, key, value)

    return set_attr


def _check_assertion(self: Any, condition: TensorHandle, message: str) -> None:
    """``create_assert``, which the interpreter's check of int32 ends in."""
    if not condition.data.all():
        raise Fault(f"overflow: {message}")


def _set_grid_idx(watch: Watch) -> Callable[..., None]:
    """The interpreter's step to another program."""
    true_index = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        true_index(self, x, y, z)
        watch.program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z

    return set_grid_idx


def _launches(watch: Watch) -> Callable[..., None]:
    """``GridExecutor.__call__``: a launch, of a sample if it is a large one."""
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
    """Notes memory that is handed out without values."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("empty", "empty_like", "new_empty", "empty_strided") and result.numel():
            self.watch.memory(result, fresh=True)
        return result


@contextmanager
def watched(large: bool = False) -> Iterator[Watch]:
    """Inside the block accesses are checked; a :class:`Fault` ends the launch that it is found in.

    Args:
        large: tensors are too large to be touched, so only a sample of the programs runs and only addresses, hints,
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
            stack.enter_context(patch.object(launch, "_INTERPRETER", MANY_SMS))
        else:
            stack.enter_context(_Fresh(watch))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # NumPy's, of infinities
        yield watch


class _Checked(dict[str, Callable[..., Any]]):
    """Operators of which arguments and results are looked at."""

    def __init__(self, ops: Ops, watch: Watch) -> None:
        super().__init__({name: functools.partial(self._call, op) for name, op in ops.items()})
        self.watch = watch

    def _call(self, op: Callable[..., Any], *args: Any) -> Any:
        lists = [arg for arg in args if isinstance(arg, list)]  # AdamW's, which its kernels find through tables
        tabled = [tensor for tensors in lists for tensor in tensors if isinstance(tensor, Tensor)]
        self.watch.tabled = {tensor.data_ptr(): View(tensor) for tensor in tabled}
        results = op(*args)
        self.watch.check_results(results)
        return results


def fault_of(case: Case, ops: Ops = OPS, large: bool = False) -> tuple[str, Watch]:
    """What is wrong with the kernels that a case runs, and where; an empty string if nothing is."""
    torch.manual_seed(0)
    with watched(large) as watch:
        try:
            case(_Checked(ops, watch))
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__  # the interpreter wraps what is raised inside a kernel
            if cause is None:
                raise
            return str(cause), watch
    return "", watch
