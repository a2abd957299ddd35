"""The flat store: all parameters in one buffer, all gradients in another.

Zeroing, the gradient norm, AdamW and a checkpoint are then each one pass over one buffer. Gradients accumulate in
place in fp32. The optimizer writes the low-precision weights that the model computes with. Matrices come first and
vectors after them, so that weight decay covers one slice.

    master   fp32      | wte | qkv | proj | … | biases, norms |     what the optimizer updates and checkpoints keep
    working  bf16      | the same layout                      |     what the model's parameters are views of
    grad     fp32      | the same layout                      |     what parameter.main_grad is a view of
    moments  fp32 or 8 bits with a scale for each block of 256 elements

With Muon the matrices of the blocks come last, | wte | biases, norms | qkv | proj | … |, because AdamW updates the
rest. Each has moments of its own kind, and only for its own parameters.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.kernels.moments_8bit import MOMENT_BLOCK

# Elements. Each parameter starts at a multiple of this, so that no block of moments that share a scale belongs to two
# parameters, and every parameter starts on a cache line. The gaps between parameters stay zero.
ALIGNMENT = MOMENT_BLOCK


# What Muon updates: the matrices of the blocks. Embeddings and the output layer are AdamW's.
BLOCKS = "transformer.h."


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in every flat buffer.

    Attributes:
        name: of the parameter.
        offset: of its first element.
        shape: of it.
        stacked: the rows of each matrix that is stacked in it, such as q, k and v; of Muon's matrices alone.
    """

    name: str
    offset: int
    shape: torch.Size
    stacked: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Where the next slot begins."""
        return self.offset + -(-self.shape.numel() // ALIGNMENT) * ALIGNMENT

    def view(self, flat: Tensor, first: int = 0) -> Tensor:
        """This parameter's part of a flat buffer that begins at element ``first``."""
        return flat[self.offset - first :][: self.shape.numel()].view(self.shape)

    def blocks(self, flat: Tensor, first: int = 0) -> Tensor:
        """This parameter's part of a buffer with one element for each block of ``ALIGNMENT``."""
        return flat[(self.offset - first) // ALIGNMENT :][: -(-self.shape.numel() // ALIGNMENT)]


@dataclass(frozen=True)
class Section:
    """Elements of the flat buffers that one parameter group of the optimizer covers.

    Attributes:
        begin: the first element.
        end: the one behind the last.
        decayed: whether it gets weight decay.
        muon: whether Muon updates it, and not AdamW.
    """

    begin: int
    end: int
    decayed: bool
    muon: bool


class ParameterStore:
    """Moves a model's parameters and gradients into flat buffers, in place.

    Each parameter becomes a view of ``working`` and gets ``main_grad``, a view of ``grad``, which fastgpt's kernels add
    to. With fp32 weights ``working`` is ``master``, and ``.grad`` is ``main_grad``. Otherwise a gradient that autograd
    delivers in the weights' dtype is added to ``main_grad`` as it arrives.

    Args:
        model: its parameters are replaced; buffers are left alone.
        dtype: what the model computes with: fp32, bf16 or fp16.
        device: of the flat buffers, and so of the model's parameters from now on; ``None`` keeps theirs.
        muon: whether Muon updates the matrices of the blocks.

    Attributes:
        master: (n,) fp32, the parameters that the optimizer updates and checkpoints keep.
        working: (n,) in ``dtype``, the parameters that the model reads.
        grad: (n,) fp32, the gradients.
        slots: the parameters' places, in their order.
        sections: of the buffers, in their order; none is empty.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        muon: bool = False,
    ) -> None:
        def order(item: tuple[str, nn.Parameter]) -> tuple[bool, bool]:
            name, parameter = item
            return muon and _is_of_muon(name, parameter), parameter.dim() < 2

        named = sorted(model.named_parameters(), key=order)  # stable
        self.slots, size = _lay_out(named)
        self.sections = []
        of_all = zip(map(order, named), self.slots, strict=True)
        for (of_muon, undecayed), slots in itertools.groupby(of_all, key=lambda pair: pair[0]):
            run = [slot for _, slot in slots]
            self.sections.append(Section(run[0].offset, run[-1].end, not undecayed, of_muon))
        device = named[0][1].device if device is None else device
        self.master = torch.zeros(size, device=device)
        self.grad = torch.zeros(size, device=device)
        for slot, (_, parameter) in zip(self.slots, named, strict=True):
            slot.view(self.master).copy_(parameter.detach())
        self.working = self.master if dtype == torch.float32 else self.master.to(dtype)
        for slot, (_, parameter) in zip(self.slots, named, strict=True):
            parameter.data = slot.view(self.working)
            parameter.main_grad = slot.view(self.grad)  # type: ignore[attr-defined]
            if dtype == torch.float32:
                parameter.grad = slot.view(self.grad)
            else:
                parameter.register_post_accumulate_grad_hook(_fold_into_main_grad)

    def moments(self, state_bits: int) -> dict[str, Tensor]:
        """The optimizer's state as flat buffers of zeros, by kind. With 8 bits there are scales, one for each block."""
        n_of_adamw, n_of_muon = (
            sum(s.end - s.begin for s in self.sections if s.muon == muon) for muon in (False, True)
        )
        numbers = dict.fromkeys(("exp_avg", "exp_avg_sq"), n_of_adamw) if n_of_adamw else {}
        if n_of_muon:
            numbers["momentum_buffer"] = n_of_muon
        if state_bits == 32:
            return {kind: self.master.new_zeros(n) for kind, n in numbers.items()}
        codes = {kind: self.master.new_zeros(n, dtype=torch.uint8) for kind, n in numbers.items()}
        return codes | {f"{kind}_scale": self.master.new_zeros(n // ALIGNMENT) for kind, n in numbers.items()}

    def state_of(self, param: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """A parameter's part of each of ``moments`` that it has; ``param`` is one of :meth:`groups`."""
        begin, n = param.storage_offset(), param.numel()
        state = {}
        for kind, flat in moments.items():
            first, end = self._span(kind)
            if not first <= begin < end:
                continue
            if kind.endswith("_scale"):
                state[kind] = flat[(begin - first) // ALIGNMENT :][: -(-n // ALIGNMENT)]
            else:
                state[kind] = flat[begin - first :][:n].view(param.shape)
        return state

    def _span(self, kind: str) -> tuple[int, int]:
        """The elements of ``master`` that a flat buffer of this kind is about: the first, and the one behind the last.

        The buffers of moments are about those that their optimizer updates, all others about all.
        """
        of = {"exp_avg": False, "exp_avg_sq": False, "momentum_buffer": True}.get(kind.removesuffix("_scale"))
        covered = [s for s in self.sections if of is None or s.muon == of]
        return covered[0].begin, covered[-1].end

    def groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for an optimizer: parts of ``master``, each with its part of ``grad``.

        AdamW gets each of its sections as one flat tensor, and Muon gets its matrices.
        """
        groups = []
        for section in self.sections:
            params = list(self._matrices()) if section.muon else [self.master[section.begin : section.end]]
            for param in params:
                param.grad = _same_part(param, self.grad)
            group = {"params": params, "weight_decay": weight_decay if section.decayed else 0.0}
            groups.append({**group, "use_muon": section.muon} if self._has_muon else group)
        return groups

    @property
    def _has_muon(self) -> bool:
        return any(section.muon for section in self.sections)

    def _matrices(self) -> Iterator[Tensor]:
        """Muon's matrices, views of ``master``; those that are stacked in one parameter, such as q, k and v, apart."""
        for slot in self.slots:
            if slot.stacked:
                yield from slot.view(self.master).split(slot.stacked)

    def copies(self, groups: list[dict]) -> dict[Tensor, Tensor]:
        """The part of ``working`` that the optimizer writes for each parameter of ``groups``; none if not bf16."""
        if self.working.dtype != torch.bfloat16:
            return {}
        return {param: _same_part(param, self.working) for group in groups for param in group["params"]}

    def named(self, flat: Tensor, kind: str = "master") -> dict[str, Tensor]:
        """The views of a flat buffer by parameter name.

        Args:
            flat: ``master``, one of its length, or one of :meth:`moments`.
            kind: of the moments; ``master`` for all others.
        """
        first, end = self._span(kind)
        slots = [slot for slot in self.slots if first <= slot.offset < end]
        if kind.endswith("_scale"):
            return {slot.name: slot.blocks(flat, first) for slot in slots}
        return {slot.name: slot.view(flat, first) for slot in slots}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Replace the parameters by ``tensors``, by name.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        views = self.named(self.master)
        if views.keys() != tensors.keys():
            raise ValueError(f"parameters differ: {', '.join(sorted(views.keys() ^ tensors.keys())[:3])} …")
        for name, view in views.items():
            if view.shape != tensors[name].shape:
                raise ValueError(f"{name}: expected {tuple(view.shape)}, got {tuple(tensors[name].shape)}")
            view.copy_(tensors[name])
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy ``master`` into ``working``."""
        if self.working is not self.master:
            self.working.copy_(self.master)


def _is_of_muon(name: str, parameter: Tensor) -> bool:
    return parameter.dim() >= 2 and name.startswith(BLOCKS)


def _lay_out(named: list[tuple[str, nn.Parameter]]) -> tuple[list[Slot], int]:
    slots, offset = [], 0
    for name, parameter in named:
        stacked = _stacked(parameter) if _is_of_muon(name, parameter) else ()
        slots.append(Slot(name, offset, parameter.shape, stacked))
        offset = slots[-1].end
    return slots, offset


def _stacked(parameter: Tensor) -> tuple[int, ...]:
    """The rows of each matrix in a parameter: ``parameter.stacked`` if each of them can begin at a block of moments."""
    rows: tuple[int, ...] = getattr(parameter, "stacked", (len(parameter),))
    return rows if all(n * parameter.shape[1] % ALIGNMENT == 0 for n in rows) else (len(parameter),)


def _same_part(view: Tensor, flat: Tensor) -> Tensor:
    """What lies in ``flat`` where ``view`` lies in a flat buffer of the same length."""
    return flat.as_strided(view.shape, view.stride(), view.storage_offset())


@torch.no_grad()
def _fold_into_main_grad(parameter: Tensor) -> None:
    if parameter.grad is None:  # a kernel has added it to main_grad already; autograd calls the hook all the same
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
