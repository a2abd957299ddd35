"""What a run is and where it runs, for those who read about it later."""

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastgpt import __version__, hardware
from fastgpt.train.predict.roofline import Prediction
from fastgpt.train.settle import Settled
from fastgpt.units import dtype_name

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def of(settled: Settled) -> dict[str, Any]:
    """Command, versions and device of a run that starts or is resumed now, ready for JSON."""
    prediction, config = settled.prediction, settled.config
    return {
        "time": now(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "fastgpt": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "device": hardware.device_name(settled.device),
        "threads": torch.get_num_threads() if settled.device.type == "cpu" else None,
        "dtype": dtype_name(settled.dtype),
        "peak_flops": hardware.peak_flops(settled.device, settled.dtype),
        "parameters": settled.gpt_config.n_params,
        "flops_per_token": settled.gpt_config.flops_per_token,
        "dataset": {"path": str(settled.dataset.path), "id": settled.dataset.identity},
        "predicted_tokens_per_s": (
            prediction.tokens_per_second(config.gradient_accumulation_steps) if prediction else None
        ),
        "predicted_bytes": prediction.held if prediction else None,
        "predicted_ms": _by_kind(prediction, config.gradient_accumulation_steps) if prediction else None,
    }


def _by_kind(prediction: Prediction, accumulation: int) -> dict[str, float]:
    """Milliseconds of an update by kind of call."""
    found = {kind: accumulation * seconds * 1e3 for kind, seconds in prediction.micro_step.items()}
    found["optimizer"] = found.get("optimizer", 0.0) + prediction.update * 1e3
    return found


def now() -> str:
    """The time, in UTC and ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has had on a device: tensors on a GPU, everything on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a source checkout; ``None`` for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
