"""The warning that a slow path runs: once for each reason."""

import warnings

_warned: set[str] = set()


def warn(reason: str) -> None:
    """Warn that plain PyTorch runs in place of a kernel, once for each ``reason``."""
    if reason in _warned:
        return
    _warned.add(reason)
    message = f"fastgpt runs on plain PyTorch, slower: {reason} (python -m fastgpt.doctor shows details)"
    # warn_explicit, so that the message is not followed by a line of this file
    warnings.warn_explicit(message, UserWarning, "fastgpt.kernels", 1, module=__name__)


# Makes Dynamo call it while tracing. torch.compiler.assume_constant_result does the same, but imports Dynamo.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
