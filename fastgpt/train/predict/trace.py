"""What a training step calls and what memory it holds, traced by running it on tensors without data.

The step that is traced is the one that trains (``TrainStep``), on meta tensors that stand for those of a CPU or a
GPU; so the trace cannot disagree with the code. It takes a tenth of a second for GPT-2 124M; the first one takes
another second, in which PyTorch imports its compiler. Not seen are what CUDA itself keeps and the temporaries inside a
kernel. Two of these grow with both batch and width, an eighth of the embedding's gradient and the sums of attention's
backward in a single pass, and neither comes where the peak is.
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
from fastgpt.model import GPT, GPTConfig
from fastgpt.train.step import TrainStep
from fastgpt.units import SHORT_DTYPES

aten = torch.ops.aten

Recompute = Literal["none", "cheap", "block"]  # what the backward recomputes: nothing, norms and GELU, whole blocks

AT_REST = ("weights", "gradients", "AdamW's moments", "batches")  # parts of memory that last from step to step


@dataclass(frozen=True)
class Setup:
    """What a step depends on.

    Attributes:
        gpt_config: the shape.
        batch_size: sequences in a micro-batch, B.
        device_type: ``"cpu"`` or ``"cuda"``.
        dtype: of the weights that the model computes with.
        state_bits: of each of AdamW's moments.
        recompute: ``none``, ``cheap`` or ``block``.
        deterministic: whether attention's backward takes two passes on a GPU, or one.
    """

    gpt_config: GPTConfig
    batch_size: int
    device_type: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    state_bits: int = 32
    recompute: str = "cheap"
    deterministic: bool = True

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.batch_size * self.gpt_config.block_size


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        operator: its name.
        kind: ``GEMM``, ``attention``, ``norm``, ``GELU``, ``loss``, ``optimizer`` or ``other``.
        flops: of products; causal attention counts what is not masked.
        bytes: read and written, each tensor once for either.
        product: (M, N, K) of a matrix product.
        length: tokens of a sequence, T, of attention.
    """

    operator: str
    kind: str
    flops: float
    bytes: float
    product: tuple[int, int, int] | None = None
    length: int = 0


@dataclass(frozen=True)
class Trace:
    """A step's calls, and its memory at the peak.

    Attributes:
        micro_step: calls of a micro-batch's forward and backward.
        update: calls of the optimizer, once an update.
        memory: bytes by part; their sum is the peak of what tensors hold.
    """

    micro_step: list[Call]
    update: list[Call]
    memory: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes that tensors hold at most."""
        return sum(self.memory.values())

    @property
    def passing(self) -> int:
        """Bytes of the peak that every step allocates and frees: activations, logits, statistics."""
        return sum(size for part, size in self.memory.items() if not part.startswith(AT_REST))


def trace_step(setup: Setup) -> Trace:
    """The trace of a step."""
    with dry_run(setup.device_type), torch.device("meta"):
        model = GPT(setup.gpt_config, setup.recompute, setup.deterministic)
        step = TrainStep(model, dtype=setup.dtype, state_bits=setup.state_bits)
        shape = setup.batch_size, setup.gpt_config.block_size
        # a GPU has three batches: the graph's own, the one at hand, the one ahead
        batches = [torch.zeros(2, *shape, dtype=torch.int64) for _ in range(3 if setup.device_type == "cuda" else 1)]
        recorder = _Recorder(setup)
        store = step.store
        recorder.hold("gradients, fp32", store.grad)
        recorder.hold("weights, fp32", store.master)
        recorder.hold(f"weights, {SHORT_DTYPES[setup.dtype]}", store.working)
        recorder.hold(f"AdamW's moments, {setup.state_bits} bits", *step.moments.values())
        recorder.hold("batches", *batches)
        with recorder:
            step._forward_backward((batches[0][0], batches[0][1]))
            micro_step, recorder.calls = recorder.calls, []
            step._update()
    return Trace(micro_step, recorder.calls, recorder.at_peak)


class _Recorder(TorchDispatchMode):
    """Notes every call that reaches the dispatcher, and every storage from its first sight to its end."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.at_peak: dict[str, int] = {}
        self._held: Counter[str] = Counter()
        self._storages: dict[int, Any] = {}  # weak references
        self._granule = 512 if setup.device_type == "cuda" else 64  # of the allocators
        C, V = setup.gpt_config.n_embd, setup.gpt_config.vocab_size
        self._labels = {V: "logits", 4 * C: "activations: MLP", 3 * C: "activations: q, k, v"}
        self._labels[C] = "activations: residual stream, norms, attention"

    def hold(self, label: str, *tensors: Tensor) -> None:
        """Count the storages of these tensors, unless they are counted already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = -(-storage.nbytes() // self._granule) * self._granule
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
        # PyTorch has no rule for this product's shape
        out = kwargs["out"] if func is aten.addmm.dtype_out else func(*args, **kwargs)
        results = [t for t in tree_iter(out) if isinstance(t, Tensor)]
        self.calls += _calls(func, args, kwargs, results)
        for tensor in results:
            self.hold(self._labels.get(tensor.shape[-1] if tensor.dim() > 1 else 0, "statistics and sums"), tensor)
        return out


# ---- what a call costs ----

_PRODUCTS = {  # operator: index of the left operand
    aten.mm.default: 0,
    aten.mm.out: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.addmm.out: 1,
    aten.addmm_.default: 1,
    aten.addmm.dtype_out: 1,
    torch.ops.fastgpt.matmul_.default: 1,
}


def _calls(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Iterator[Call]:
    name = func._schema.name.partition("::")[2]
    operands = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
    if func in _PRODUCTS:
        a, b = args[_PRODUCTS[func] : _PRODUCTS[func] + 2]
        batch, (M, K), N = a.shape[:-2].numel(), a.shape[-2:], b.shape[-1]
        yield Call(name, "GEMM", 2.0 * batch * M * N * K, _traffic(func, args, kwargs, results), (batch * M, N, K))
    elif name in ("attention_qkv", "attention_qkv_backward"):
        backward, single_pass = name.endswith("backward"), _in_a_single_pass(func, args)
        qkv, n_products = args[int(backward)], (5 if single_pass else 7) if backward else 2
        B, T, C3 = qkv.shape
        # the sums of dq in fp32 are written as zeros, read and written to be added to, and read
        sums = 16.0 * B * T * C3 / 3 if single_pass else 0.0
        # of each product, 2 T T D FLOPs a head, half lies above the diagonal
        flops = n_products * B * T * T * C3 / 3
        yield Call(name, "attention", flops, _traffic(func, args, kwargs, results) + sums, length=T)
    elif name == "embedding":
        yield Call(name, "other", 0.0, 2.0 * _bytes(results[0]))
    elif name in ("index_put_", "index_add_"):
        yield Call(name, "other", 0.0, 3.0 * max(map(_bytes, operands[1:])))
    elif name == "embedding_backward_":
        main_grad, dy, index = operands
        n_rows = min(main_grad.shape[0], index.numel())  # of the matrix, if all tokens are different
        yield Call(name, "other", 0.0, _bytes(dy) + _bytes(index) + 2.0 * _bytes(main_grad[:n_rows]))
    elif not _is_free(func, operands, results):
        yield Call(name, _kind(name), 0.0, _traffic(func, args, kwargs, results))


def _kind(name: str) -> str:
    """The kind of fastgpt's operator of this name, or of PyTorch's; ``other`` if fastgpt has none."""
    operator = OPERATORS.get(name)
    return "other" if operator is None else operator.kind


def _in_a_single_pass(func: Any, args: Any) -> bool:
    """Whether a call is attention's backward with dq added up by atomics; its last argument is there where False."""
    return func is torch.ops.fastgpt.attention_qkv_backward.default and args[-1] is False and on_gpu(args[0])


def _is_free(func: Any, operands: list[Tensor], results: list[Tensor]) -> bool:
    """Whether a call only names memory: a view, or an allocation that writes nothing."""
    writes = func._schema.is_mutable
    views = bool(operands) and all(
        any(r.untyped_storage()._cdata == o.untyped_storage()._cdata for o in operands) for r in results
    )
    return not writes and (views or "empty" in func._schema.name or not results)


def _traffic(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> float:
    """Bytes read and written if everything is touched once: operands, those that are changed twice, and results."""
    total, seen = 0.0, set()
    if func._schema.name.startswith("aten::new_"):  # of its operand it needs the dtype and the device
        return float(sum(map(_bytes, results)))
    for argument, value in zip(func._schema.arguments, _in_order(func, args, kwargs), strict=False):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        only_written = changed and argument.name in ("out", "copies") and func is not aten.addmm.dtype_out
        for tensor in tree_iter(value):
            if isinstance(tensor, Tensor):
                total += _bytes(tensor) * (2 if changed and not only_written else 1)
                seen.add(tensor.untyped_storage()._cdata)
    return total + sum(_bytes(t) for t in results if t.untyped_storage()._cdata not in seen)


def _in_order(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments in the order of the schema."""
    rest = [kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :]]
    return [*args, *rest]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# ---- what is held beside tensors ----

# Bytes that CUDA's context, its libraries and their workspaces keep beside the tensors. Assumed.
CUDA_RESERVE = 700 << 20


# What a process on a CPU takes beside its tensors and beside what it held when free memory was read: a constant, and a
# share of what every step allocates and frees. The constant is PyTorch's compiler, which counting imports (150 MiB),
# pages of libraries touched at their first use (110), threads and the plot. The share is temporaries that the trace
# does not see, such as oneDNN's copies of weights, and gaps in malloc's heap, which is never returned (memory.py).
# Measured on an Intel Xeon with AMX as VmHWM - VmRSS at first - the trace's peak, in 14 runs of 2 to 6 layers of 128
# to 768, vocabularies of 256 and 50,257, fp32 and bf16: 239 MiB where 64 pass, 610 where 820 do, and always less than
# 320 + 0.5 times what passes, by 2 % at least. The constant is a tenth more for what was not measured: where a cgroup
# ends, the kernel kills, and nothing can be halved.
CPU_RESERVE = 352 << 20
CPU_GAPS = 0.5


def reserve(device_type: str, trace: Trace) -> int:
    """Bytes that a step takes beside its tensors, and beside what the process held before."""
    return CUDA_RESERVE if device_type == "cuda" else CPU_RESERVE + int(CPU_GAPS * trace.passing)
