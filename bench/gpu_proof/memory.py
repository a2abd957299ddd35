"""The state of memory while kernels run in Triton's interpreter: which program accessed and wrote which elements.

``watch.py`` reports every access to :class:`Watch`, which raises a :class:`Fault` if it is illegal.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from fastgpt.units import dtype_name

NOBODY, MANY = -1, -2  # in place of the number of a program
LARGEST_MAP = 2**26  # the largest span of a view, in elements, for which a map of its elements is kept
TRITON = str(Path(triton.__file__).parent)
WATCHERS = (__file__, str(Path(__file__).with_name("watch.py")))

Pair = tuple[str, str, int, int]  # file, kernel, line of a load, line of a store


def place() -> tuple[str, int]:
    """File and line of the running kernel: the innermost frame outside Triton and ``WATCHERS``."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(TRITON) and file not in WATCHERS:
            return file, frame.f_lineno
        frame = frame.f_back
    return "", 0


class Fault(Exception):
    """A kernel did something illegal. The message says where."""

    def __init__(self, message: str) -> None:
        file, line = place()
        super().__init__(f"{message} [{Path(file).name}:{line}]")


# ---- the state of memory ----


class View:
    """The elements that a pointer made from a tensor may reach."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size, self.start = tensor, tensor.element_size(), tensor.data_ptr()
        self.name = f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        self.count = 1 + sum((n - 1) * stride for n, stride in steps) if tensor.numel() else 0
        self.inside: np.ndarray | None = None  # which elements of the span belong to the view; None: all
        if 0 < self.count <= LARGEST_MAP and tensor.numel() != self.count:
            inside = torch.zeros(self.count, dtype=torch.bool)
            inside.as_strided(tensor.shape, tensor.stride()).fill_(True)
            self.inside = inside.numpy()

    def check(self, addresses: np.ndarray, verb: str) -> np.ndarray:
        """The elements at these addresses, counted from the first element of the view."""
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
    """A tensor's storage: which programs accessed its elements in this launch, and which bytes were ever written."""

    def __init__(self, tensor: Tensor, fresh: bool) -> None:
        self.storage = tensor.untyped_storage()  # kept, so that the memory is not used again
        self.start, self.bytes = self.storage.data_ptr(), self.storage.nbytes()
        self.written = np.zeros(self.bytes, dtype=bool) if fresh else None  # None: the tensor came with values
        self.launch = -1

    def begin(self, launch: int, size: int) -> None:
        """Forget the accesses of earlier launches; ``size`` is that of an element, in bytes."""
        if self.launch != launch:
            self.launch, self.size, n = launch, size, self.bytes // size
            self.reader, self.writer, self.adder = (np.full(n, NOBODY, np.int32) for _ in range(3))
            # place and shape of a load -> for each element, its position in the tile that read it, or -1
            self.read_at: dict[tuple[tuple[str, int], tuple[int, ...]], np.ndarray] = {}
        elif self.size != size:
            raise Fault(f"one launch uses the same memory as elements of {self.size} and of {size} bytes")

    def mark_written(self, at: np.ndarray, size: int) -> None:
        if self.written is not None:
            self.written[(at[:, None] * size + np.arange(size)).ravel()] = True

    def is_written(self, at: np.ndarray) -> bool:
        return self.written is None or bool(self.written[at * self.size].all())


class Watch:
    """The observations inside a :func:`watched` block.

    Attributes:
        overwritten: loads of memory that a later store of the same program overwrites, and whether each element was
            read and written at the same position of tiles of the same shape.
    """

    def __init__(self, large: bool) -> None:
        self.large = large  # only a sample of the programs runs, and races are not checked
        self.tabled: dict[int, View] = {}  # tensors that kernels find through tables of addresses
        self.memories: dict[int, Memory] = {}
        self.launches = self.accesses = self.program = 0
        self.kernel = ""
        self.overwritten: dict[Pair, bool] = {}

    def memory(self, tensor: Tensor, fresh: bool = False) -> Memory:
        """The state of a tensor's memory; ``fresh``: it has just been allocated, without values."""
        start = tensor.untyped_storage().data_ptr()
        if fresh or start not in self.memories:
            self.memories[start] = Memory(tensor, fresh)
        return self.memories[start]

    def wrote(self, tensor: Tensor) -> None:
        """Note that PyTorch, not a kernel, has written all elements of a tensor."""
        size = tensor.element_size()
        elements = torch.arange(tensor.untyped_storage().nbytes() // size)
        at = elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        self.memory(tensor).mark_written(at.flatten().numpy(), size)

    def touch(self, view: View, addresses: np.ndarray, live: np.ndarray, verb: str) -> None:
        """Check that a program reads, writes or adds to the ``live`` ones of a tile of addresses."""
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
            raise Fault(f"unwritten: program {self.program} reads unwritten memory, in {view.name}")
        self._sign(memory.reader, at)

    def _write(self, view: View, memory: Memory, at: np.ndarray) -> None:
        self._refuse("writes", "writes", memory.writer[at], view, own=False)
        self._refuse("writes", "reads", memory.reader[at], view, own=False)
        self._refuse("writes", "adds to", memory.adder[at], view, own=True)
        if np.unique(at).size != at.size:
            raise Fault(f"race: one store writes an element twice, in {view.name}")
        self._sign(memory.writer, at)
        memory.mark_written(at, view.size)

    def _add(self, view: View, memory: Memory, at: np.ndarray) -> None:
        self._refuse("adds to", "writes", memory.writer[at], view, own=True)
        self._refuse("adds to", "reads", memory.reader[at], view, own=True)
        if not memory.is_written(at):
            raise Fault(f"unwritten: program {self.program} adds to unwritten memory, in {view.name}")
        self._sign(memory.adder, at)

    def _refuse(self, verb: str, earlier: str, programs: np.ndarray, view: View, own: bool) -> None:
        """Report a race if other programs accessed these elements; with ``own``, also if this program did."""
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
                assert read_file == file, "a kernel with a load and a store in two files: a pair names only one file"
                alike = shape == read_shape and bool((seen == positions)[seen >= 0].all())
                pair = file, self.kernel, read_line, line
                self.overwritten[pair] = self.overwritten.get(pair, True) and alike

    def check_results(self, results: Any) -> None:
        """Check that the kernels of an operator wrote all elements that it returns."""
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
