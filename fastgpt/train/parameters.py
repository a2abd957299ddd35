"""The flat store: all parameters in one buffer, all gradients in another.

Zeroing, the gradient norm, AdamW and a checkpoint are then each one pass over one buffer. Gradients accumulate in
place in fp32. The optimizer writes the low-precision weights that the model computes with. Matrices come first and
vectors after them, so that weight decay covers one slice.

    master   fp32      | wte | qkv | proj | … | biases, norms |     what AdamW updates and checkpoints keep
    working  bf16      | the same layout                      |     what the model's parameters are views of
    grad     fp32      | the same layout                      |     what parameter.main_grad is a view of
    moments  fp32 or 8 bits with a scale for each block of 256 elements
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from fastgpt.kernels.moments_8bit import MOMENT_BLOCK

# Elements. Each parameter starts at a multiple of this, so that no block of moments that share a scale belongs to two
# parameters, and every parameter starts on a cache line. The gaps between parameters stay zero.
ALIGNMENT = MOMENT_BLOCK


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in every flat buffer."""

    name: str
    offset: int
    shape: torch.Size

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat buffer."""
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)

    def blocks(self, flat: Tensor) -> Tensor:
        """This parameter's part of a buffer with one element for each block of ``ALIGNMENT``."""
        first = self.offset // ALIGNMENT
        return flat[first : first + -(-self.shape.numel() // ALIGNMENT)]


class ParameterStore:
    """Moves a model's parameters and gradients into flat buffers, in place.

    Each parameter becomes a view of ``working`` and gets ``main_grad``, a view of ``grad``, which fastgpt's kernels add
    to. With fp32 weights ``working`` is ``master``, and ``.grad`` is ``main_grad``. Otherwise a gradient that autograd
    delivers in the weights' dtype is added to ``main_grad`` as it arrives.

    Args:
        model: its parameters are replaced; buffers are left alone.
        dtype: what the model computes with: fp32, bf16 or fp16.
        device: of the flat buffers, and so of the model's parameters from now on; ``None`` keeps theirs.

    Attributes:
        master: (n,) fp32, the parameters that the optimizer updates and checkpoints keep.
        working: (n,) in ``dtype``, the parameters that the model reads.
        grad: (n,) fp32, the gradients.
        n_decayed: number of elements at the front that belong to matrices and get weight decay.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        named = sorted(model.named_parameters(), key=lambda item: item[1].dim() < 2)  # stable
        self.slots, size = _lay_out(named)
        self.n_decayed = next(
            (slot.offset for slot, (_, p) in zip(self.slots, named, strict=True) if p.dim() < 2), size
        )
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
        """FusedAdamW's state as flat buffers of zeros. With 8 bits there are scales too, one for each block."""
        kinds = ("exp_avg", "exp_avg_sq")
        if state_bits == 32:
            return {kind: torch.zeros_like(self.master) for kind in kinds}
        codes = {kind: torch.zeros_like(self.master, dtype=torch.uint8) for kind in kinds}
        n_blocks, device = self.master.numel() // ALIGNMENT, self.master.device
        return codes | {f"{kind}_scale": torch.zeros(n_blocks, device=device) for kind in kinds}

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The decayed and the undecayed part of a flat buffer, as views. An empty part is left out."""
        n_decayed = self.n_decayed if self._has_all_elements(flat) else self.n_decayed // ALIGNMENT
        return [part for part in flat.tensor_split([n_decayed]) if part.numel()]

    def _has_all_elements(self, flat: Tensor) -> bool:
        """Whether a flat buffer has one element for each element of ``master``, and not one for each block."""
        return flat.numel() == self.master.numel()

    def groups(self, weight_decay: float) -> list[dict]:
        """Parameter groups for an optimizer: the parts of ``master``, each with its part of ``grad``."""
        parts = self.parts(self.master)
        for part, grad in zip(parts, self.parts(self.grad), strict=True):
            part.grad = grad
        decays = [weight_decay if self.n_decayed else 0.0, 0.0]
        return [{"params": [part], "weight_decay": decay} for part, decay in zip(parts, decays, strict=False)]

    def copies(self, groups: list[dict]) -> dict[Tensor, Tensor]:
        """The part of ``working`` that the optimizer writes for each flat tensor of ``groups``; none if not bf16."""
        if self.working.dtype != torch.bfloat16:
            return {}
        return {g["params"][0]: part for g, part in zip(groups, self.parts(self.working), strict=True)}

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The views of a flat buffer by parameter name."""
        if self._has_all_elements(flat):
            return {slot.name: slot.view(flat) for slot in self.slots}
        return {slot.name: slot.blocks(flat) for slot in self.slots}

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


def _lay_out(named: list[tuple[str, nn.Parameter]]) -> tuple[list[Slot], int]:
    slots, offset = [], 0
    for name, parameter in named:
        slots.append(Slot(name, offset, parameter.shape))
        offset += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return slots, offset


@torch.no_grad()
def _fold_into_main_grad(parameter: Tensor) -> None:
    if parameter.grad is None:  # a kernel has added it to main_grad already; autograd calls the hook all the same
        return
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
