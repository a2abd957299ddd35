"""The trace of a training step: the operators it calls and the memory it holds, counted without computing anything.

The trace comes from a dry run: the step that also trains (``TrainStep``) runs on meta tensors, which have a shape and
a dtype but no data, and which stand for tensors of a CPU or a GPU. So the trace cannot disagree with the code. A trace
of GPT-2 124M takes a tenth of a second; the first one takes another second, because PyTorch imports its compiler.

The trace does not see the memory that CUDA itself keeps (:func:`reserve` adds it) or the temporaries inside a kernel.
Two of these temporaries grow with both batch and width: one of an eighth of the embedding's gradient, and the fp32 sums
of attention's single-pass backward. Neither exists at the peak.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastgpt.kernels.dry_run import dry_run, on_gpu
from fastgpt.kernels.ops import OPERATORS
from fastgpt.model import GPTConfig
from fastgpt.model.gpt import on_meta
from fastgpt.train.config import Optimizer, TrainConfig
from fastgpt.train.step import TrainStep
from fastgpt.units import SHORT_DTYPES

aten = torch.ops.aten

# What the backward recomputes instead of keeping it from the forward: nothing, norms and GELU, or whole blocks.
Recompute = Literal["none", "cheap", "block"]

# Labels of memory that stays allocated from step to step start with one of these.
PERSISTENT = ("weights", "gradients", "moments", "batches")


@dataclass(frozen=True)
class Setup:
    """Everything that a step's calls and memory depend on.

    Attributes:
        gpt_config: the architecture.
        batch_size: sequences in a micro-batch, B.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: dtype of the weights that the model computes with.
        state_bits: bits per element of the optimizer's moments, 32 or 8.
        recompute: ``none``, ``cheap`` or ``block``.
        deterministic: whether attention's backward on a GPU uses two passes (same bits each time) or one.
        optimizer: ``adamw`` or ``muon``.
    """

    gpt_config: GPTConfig
    batch_size: int
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    state_bits: int = 32
    recompute: str = "cheap"
    deterministic: bool = True
    optimizer: Optimizer = "adamw"

    @classmethod
    def of(cls, config: TrainConfig, gpt_config: GPTConfig, device_type: str, dtype: torch.dtype) -> "Setup":
        """The step of a run; where micro-batch and recomputation are left open, any that somebody may replace."""
        return cls(
            gpt_config, config.batch_size or 1, device_type, dtype, config.state_bits,
            deterministic=config.deterministic, optimizer=config.optimizer,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch_size * self.gpt_config.block_size


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: name of the operator, without its namespace.
        kind: ``GEMM``, ``attention``, ``norm``, ``activation``, ``loss``, ``optimizer`` or ``other``.
        flops: FLOPs of matrix products; attention counts only what causality and a window leave.
        bytes: bytes read plus bytes written, if each tensor is read once and written once.
        product: (M, N, K) of a matrix product, ``None`` for other calls.
        length: twice the number of keys that a query of an attention call sees on average, which is the sequence
            length T without a window; 0 for other calls.
    """

    operator: str
    kind: str
    flops: float
    bytes: float
    product: tuple[int, int, int] | None = None
    length: float = 0


@dataclass(frozen=True)
class Trace:
    """The calls of a step, and its memory at the peak.

    Attributes:
        micro_step: calls of the forward and backward of one micro-batch.
        update: calls of the optimizer, once per update.
        memory: bytes by part at the moment when tensors hold the most; their sum is the peak.
    """

    micro_step: list[Call]
    update: list[Call]
    memory: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes that tensors hold at the peak."""
        return sum(self.memory.values())

    @property
    def transient(self) -> int:
        """Bytes of the peak that every step allocates and frees: activations, logits, statistics."""
        return sum(size for part, size in self.memory.items() if not part.startswith(PERSISTENT))


def trace_step(setup: Setup) -> Trace:
    """Return the trace of one update with a single micro-batch."""
    with dry_run(setup.device_type), torch.device("meta"):
        model = on_meta(setup.gpt_config, setup.recompute, setup.deterministic)
        muon = setup.optimizer == "muon"
        step = TrainStep(model, dtype=setup.dtype, state_bits=setup.state_bits, muon=muon)
        shape = setup.batch_size, setup.gpt_config.block_size
        # On a GPU three batches exist at once: the CUDA graph's input, the current one, and the one loaded ahead.
        # Each holds inputs and targets: (2, B, T).
        batches = [torch.zeros(2, *shape, dtype=torch.int64) for _ in range(3 if setup.device_type == "cuda" else 1)]
        recorder = Recorder(setup)
        store = step.store
        recorder.hold("gradients, fp32", store.grad)
        recorder.hold("weights, fp32", store.master)
        recorder.hold(f"weights, {SHORT_DTYPES[setup.dtype]}", store.working)
        recorder.hold(f"moments, {setup.state_bits} bits", *step.moments.values())
        recorder.hold("batches", *batches)
        with recorder:
            step.micro_step((batches[0][0], batches[0][1]))
            micro_step, recorder.calls = recorder.calls, []  # what follows belongs to the update
            step.update()
    return Trace(micro_step, recorder.calls, recorder.at_peak)


class Recorder(TorchDispatchMode):
    """Records every call that reaches the dispatcher, and the lifetime of every storage.

    A storage is counted when a call first returns it, and until it is freed: a weak reference's callback reports that.
    Storages are counted rather than tensors, because several tensors can be views of one storage.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.at_peak: dict[str, int] = {}
        self._held: Counter[str] = Counter()
        self._storages: dict[int, Any] = {}  # weak references by the address of the storage
        # Granularity of PyTorch's allocators: 512 bytes on a GPU (kMinBlockSize), 64 on a CPU (alignment).
        self._granule = 512 if setup.device_type == "cuda" else 64
        C, V = setup.gpt_config.n_embd, setup.gpt_config.vocab_size
        # The last dimension tells what a tensor is. Where C equals another of these, the later entry wins.
        self._labels = {V: "logits", 4 * C: "activations: MLP", 3 * C: "activations: q, k, v"}
        self._labels[C] = "activations: residual stream, norms, attention"

    def hold(self, label: str, *tensors: Tensor) -> None:
        """Count the storages of these tensors under ``label``, unless they are counted already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = -(-storage.nbytes() // self._granule) * self._granule  # rounded up
            self._storages[key] = weakref.ref(storage, self._release(key, label, size))
            self._held[label] += size
        if sum(self._held.values()) > sum(self.at_peak.values()):
            self.at_peak = {label: size for label, size in self._held.items() if size}

    def _release(self, key: int, label: str, size: int) -> Callable[[Any], None]:
        def release(_: Any) -> None:
            self._held[label] -= size
            del self._storages[key]

        return release

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # addmm.dtype_out has no meta kernel. Its result is the tensor that it writes to.
        out = kwargs["out"] if func is aten.addmm.dtype_out else func(*args, **kwargs)
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        self.calls += _calls(func, args, kwargs, results)
        for tensor in results:
            # a vector of C elements is a sum or a statistic, not an activation
            self.hold(self._labels.get(tensor.shape[-1] if tensor.dim() > 1 else 0, "statistics and sums"), tensor)
        return out


# ---- the FLOPs and bytes of a call ----

_PRODUCTS = {  # matrix product -> position of its left operand among the arguments; the right one follows
    aten.mm.default: 0,
    aten.mm.out: 0,
    aten.bmm.default: 0,
    aten.bmm.out: 0,
    aten.baddbmm.out: 1,
    aten.addmm.default: 1,
    aten.addmm.out: 1,
    aten.addmm_.default: 1,
    aten.addmm.dtype_out: 1,
    torch.ops.fastgpt.matmul_.default: 1,
}


def _calls(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Iterator[Call]:
    """Yield the :class:`Call` of a dispatched function, or nothing if it does no work on the device."""
    name = func._schema.name.partition("::")[2]
    kind = _kind(name)
    operands = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if func in _PRODUCTS:
        a, b = args[_PRODUCTS[func] : _PRODUCTS[func] + 2]  # (..., M, K) and (..., K, N)
        batch, (M, K), N = a.shape[:-2].numel(), a.shape[-2:], b.shape[-1]
        # Each of the M N results is a sum of K products: a multiplication and an addition each.
        yield Call(name, "GEMM", 2.0 * batch * M * N * K, _traffic(func, args, kwargs, results), (batch * M, N, K))
    elif name in ("attention_qkv", "attention_qkv_backward"):
        backward, single_pass = name.endswith("backward"), _is_single_pass(func, args, kwargs)
        # The backward's first argument is dout, the forward's first result out.
        qkv, C = args[int(backward)], (args[0] if backward else results[0]).shape[2]
        # Forward: q k' and p v. Backward: q k', dout v', and one each for dq, dk and dv. Two passes, one for dq and one
        # for dk and dv, both need the first two.
        n_products = (5 if single_pass else 7) if backward else 2
        B, T, _ = qkv.shape
        # A single pass accumulates dq in an fp32 buffer of B T C. Its elements are zeroed (4 bytes), read and written
        # by the atomic additions (8) and read for the cast (4).
        sums = 16.0 * B * T * C if single_pass else 0.0
        # A product takes 2 D FLOPs per head for a query and a key, 2 C for all heads. Query t sees min(t + 1, w) keys,
        # all together w T - w w / 2; without a window w is T, and half of T T is left. Documents would leave less.
        w = min(_argument(func, args, kwargs, "window") or T, T)
        twice_the_keys = 2 * w * T - w * w
        flops = float(n_products * B * twice_the_keys * C)
        length = twice_the_keys / T
        yield Call(name, kind, flops, _traffic(func, args, kwargs, results) + sums, length=length)
    elif name == "embedding":
        # The rows that are looked up are read and written: not the whole table.
        yield Call(name, kind, 0.0, 2.0 * _bytes(results[0]))
    elif name in ("index_put_", "index_add_"):
        # The source is read, the rows that it is added to are read and written: three times the largest operand beside
        # the table itself.
        yield Call(name, kind, 0.0, 3.0 * max(map(_bytes, operands[1:])))
    elif name == "embedding_backward_":
        main_grad, dy, index = operands  # (V, C), (N, C), (N)
        n_rows = min(main_grad.shape[0], index.numel())  # rows that are updated if all tokens differ
        yield Call(name, kind, 0.0, _bytes(dy) + _bytes(index) + 2.0 * _bytes(main_grad[:n_rows]))
    elif not _is_free(func, operands, results):
        yield Call(name, kind, 0.0, _traffic(func, args, kwargs, results))


def _kind(name: str) -> str:
    """The kind of fastgpt's operator of this name; ``other`` for PyTorch's own."""
    operator = OPERATORS.get(name)
    return "other" if operator is None else operator.kind


def _is_single_pass(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call is attention's single-pass backward, which adds up dq by atomics (GPUs only)."""
    if func is not torch.ops.fastgpt.attention_qkv_backward.default or not on_gpu(args[0]):
        return False
    return not _argument(func, args, kwargs, "deterministic")


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """The value of an operator's argument. PyTorch leaves trailing arguments out where they equal their default."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.name == name:
            return value
    declared = {argument.name: argument.default_value for argument in func._schema.arguments}
    return kwargs.get(name, declared[name])


def _is_free(func: Any, operands: list[Tensor], results: list[Tensor]) -> bool:
    """Whether a call does no work on the device: it makes a view, or allocates memory and writes nothing."""
    writes = func._schema.is_mutable
    views = bool(operands) and all(
        any(r.untyped_storage()._cdata == o.untyped_storage()._cdata for o in operands) for r in results
    )
    return not writes and (views or "empty" in func._schema.name or not results)


# Names of arguments that are changed and not read: of products, of AdamW, of a gated unit's backward.
_ONLY_WRITTEN = ("out", "copies", "dgate", "dup", "y")


def _traffic(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> float:
    """Return the bytes read and written if every tensor is touched once.

    Operands are read, operands that are changed in place are read and written, and new results are written.
    """
    total, seen = 0.0, set()
    if func._schema.name.startswith("aten::new_"):  # new_zeros and others read only the operand's dtype and device
        return float(sum(map(_bytes, results)))
    for argument, value in zip(func._schema.arguments, _in_order(func, args, kwargs), strict=False):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        # addmm.dtype_out accumulates into its "out"
        only_written = changed and argument.name in _ONLY_WRITTEN and func is not aten.addmm.dtype_out
        for tensor in tree_iter(value):
            if isinstance(tensor, Tensor):
                total += _bytes(tensor) * (2 if changed and not only_written else 1)
                seen.add(tensor.untyped_storage()._cdata)
    # a result that shares its storage with an operand has been counted there
    return total + sum(_bytes(t) for t in results if t.untyped_storage()._cdata not in seen)


def _in_order(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Return positional and keyword arguments in the order of the schema."""
    rest = [kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :]]
    return [*args, *rest]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- memory outside the tensors ----

# Bytes on a GPU outside the tensors: CUDA's context, its libraries and their workspaces. Assumed, not measured.
CUDA_RESERVE = 700 << 20

# Bytes that a process on a CPU takes outside its tensors, beyond what it held when free memory was read:
# CPU_RESERVE + CPU_GAPS * Trace.transient.
#
# The constant covers PyTorch's compiler, which the dry run imports (150 MiB), library pages at their first use (110),
# threads and the plot. The share covers temporaries that the trace does not see, such as oneDNN's copies of weights,
# and gaps in malloc's heap, which is never returned to the system (memory.py).
#
# Measured on an Intel Xeon with AMX, as VmHWM minus the initial VmRSS minus the trace's peak, in 14 runs of 2 to 6
# layers of width 128 to 768, vocabularies of 256 and 50,257, fp32 and bf16: 239 MiB where 64 MiB are transient, and
# 610 where 820 are. All runs stay at least 2 % below 320 MiB + 0.5 * transient. The constant is a tenth larger than
# that for configurations that were not measured: past a cgroup's limit the kernel kills the process, so there is no
# error that the trainer could answer with a smaller micro-batch.
CPU_RESERVE = 352 << 20
CPU_GAPS = 0.5


def reserve(device_type: str, trace: Trace) -> int:
    """Return the bytes that a step takes outside its tensors, beyond what the process held before."""
    return CUDA_RESERVE if device_type == "cuda" else CPU_RESERVE + int(CPU_GAPS * trace.transient)
