"""Documents packed into one sequence: what attention needs to know of them so that none sees another.

A position is described by the first position of its document. The tokens of a document are neighbours, so these starts
never fall along a sequence, and they are all that a causal mask needs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import checks

INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def document_starts(tokens: Tensor, end_of_text: int) -> Tensor:
    """Return the first position of each token's document, for ``documents`` of :func:`attention`.

    A document ends with its end-of-text token: the token after it is the first of the next. The first token of a row
    begins a document, or goes on with one that began in an earlier row.

    Args:
        tokens: ``(B, T)``, integers, any strides.
        end_of_text: the token that ends a document; 50256 for GPT-2.

    Returns:
        ``(B, T)`` int32, on the device of ``tokens``.

    Raises:
        TypeError: ``tokens`` does not hold integers, or ``end_of_text`` is none.
        ValueError: ``tokens`` has not two dimensions.
    """
    _integers("tokens", tokens)
    checks.integer("end_of_text", end_of_text)
    if tokens.dim() != 2:
        raise ValueError(f"tokens: expected (B, T), got {tuple(tokens.shape)}")
    if tokens.numel() == 0:
        return tokens.new_zeros(tokens.shape, dtype=torch.int32)
    after = torch.arange(1, tokens.shape[1] + 1, dtype=torch.int32, device=tokens.device)
    starts = torch.where(tokens == end_of_text, after, torch.zeros_like(after)).cummax(1).values
    return F.pad(starts[:, :-1], (1, 0))


def document_starts_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """Return the first position of each token's document, for ``documents`` of :func:`attention`.

    Args:
        cu_seqlens: ``(n + 1,)``, integers: 0 and the running sum of the lengths of n documents that lie side by side
            in one sequence, as FlashAttention's ``flash_attn_varlen_func`` takes it.
        length: S, the length of the sequence. Positions from ``cu_seqlens[-1]`` on, such as padding, are a document of
            their own. Default ``cu_seqlens[-1]``; to read it waits for the GPU.

    Returns:
        ``(1, S)`` int32, on the device of ``cu_seqlens``.

    Raises:
        TypeError: ``cu_seqlens`` does not hold integers, or ``length`` is none.
        ValueError: ``cu_seqlens`` has not one dimension or is empty, or ``length`` is below 1.
    """
    _integers("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens: expected (n + 1,), got {tuple(cu_seqlens.shape)}")
    if length is None:
        length = int(cu_seqlens[-1])
    checks.size("length", length)
    edges = cu_seqlens.to(torch.int32)
    positions = torch.arange(length, dtype=torch.int32, device=edges.device)
    document = torch.searchsorted(edges.contiguous(), positions, right=True) - 1
    return edges[document.clamp(min=0)].unsqueeze(0)


def document_bounds(starts: Tensor) -> Tensor:
    """Return ``starts``, and of each position the end of its document: ``documents`` of :func:`attention`, ready made.

    :func:`attention` takes the starts as well and calls this itself. A model with many layers can call it once for all.

    Args:
        starts: ``(B, S)`` int32 of :func:`document_starts`. A start that lies behind its position, below 0, or before
            an earlier position's start is moved to the nearest that does not.

    Returns:
        ``(B, 2, S)`` int32, contiguous.

    Raises:
        TypeError: ``starts`` is not int32.
        ValueError: ``starts`` has not two dimensions.
    """
    _integers("starts", starts, (torch.int32,))
    if starts.dim() != 2:
        raise ValueError(f"starts: expected (B, S), got {tuple(starts.shape)}")
    if starts.numel() == 0:
        return starts.new_zeros((starts.shape[0], 2, starts.shape[1]))
    positions = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device).expand(starts.shape)
    starts = torch.minimum(starts.clamp(min=0), positions).cummax(1).values
    # Starts never fall, so the positions with a start of at most j are the first ones: as many as see key j or come
    # before it.
    ends = torch.searchsorted(starts, positions.contiguous(), right=True, out_int32=True)
    return torch.stack([starts, ends], dim=1)


def check_documents(documents: Tensor, B: int, S: int, device: torch.device) -> Tensor:
    """Check ``documents`` of :func:`attention`, and return them as :func:`document_bounds`, (B, 2, S)."""
    _integers("documents", documents, (torch.int32,))
    if documents.device != device:
        raise ValueError(f"documents: device {documents.device} differs from {device}, that of the other tensors")
    if tuple(documents.shape) == (B, 2, S):
        return documents
    if tuple(documents.shape) != (B, S):
        raise ValueError(f"documents: expected shape {(B, S)} or {(B, 2, S)}, got {tuple(documents.shape)}")
    return document_bounds(documents)


def _integers(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = INTEGERS) -> None:
    """Check that ``tensor`` is dense and of one of the dtypes."""
    checks.dense(name, tensor)
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
