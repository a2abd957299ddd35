"""Nobody runs a slow path without being told, once."""

import warnings

_told: set[str] = set()


def warn(reason: str) -> None:
    """Warn that plain PyTorch runs in place of a kernel, unless that has been said for this ``reason``."""
    if reason in _told:
        return
    _told.add(reason)
    message = f"fastgpt runs on plain PyTorch, slower: {reason} (python -m fastgpt.doctor tells more)"
    # explicit, so that no line of this file is printed below the message
    warnings.warn_explicit(message, UserWarning, "fastgpt.kernels", 1, module=__name__)


# Dynamo then calls it while it traces. torch.compiler.assume_constant_result does the same and imports Dynamo.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]
