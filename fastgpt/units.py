"""Formats numbers for people, and parses numbers from command lines. All units are formatted and parsed here."""

import math
import re
from typing import TYPE_CHECKING, Any

from fastgpt.errors import RequestError

if TYPE_CHECKING:
    import torch

GIB = 2**30  # bytes
MIB = 2**20


def __getattr__(name: str) -> Any:
    """``SHORT_DTYPES``, when it is first asked for: data is prepared without PyTorch, which takes seconds to import."""
    if name != "SHORT_DTYPES":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import torch

    globals()[name] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return globals()[name]


def count(n: float, decimals: int | None = None) -> str:
    """``124M``, ``1.2B``, ``15K``. With ``decimals``: millions or billions with that many decimals, ``123.59M``."""
    if decimals is not None:
        return f"{n / 1e9:.{decimals}f}B" if n >= 1e9 else f"{n / 1e6:.{decimals}f}M"
    if n >= 1e9:
        return f"{n / 1e9:.1f}B"
    if n >= 1e6:
        return f"{n / 1e6:.0f}M" if n >= 1e7 else f"{n / 1e6:.1f}M"
    return f"{n / 1e3:.0f}K" if n >= 1e4 else f"{n:,.0f}"


def count_of(n: int, what: str) -> str:
    """``1 line``, ``3 lines``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def gib(n_bytes: float, decimals: int = 1) -> str:
    """``7.7 GiB``."""
    return f"{n_bytes / GIB:.{decimals}f} GiB"


def size(n_bytes: float) -> str:
    """``7.70 GiB``, ``0.5 MiB``: for amounts of any size."""
    return gib(n_bytes, 2) if n_bytes >= GIB else f"{number(n_bytes / MIB, 3)} MiB"


def number(x: float, digits: int = 4) -> str:
    """``1,186``, ``18.39``, ``0.00452``: at least ``digits`` significant digits, without an exponent."""
    # the digits before the point, less one; negative for a fraction
    magnitude = math.floor(math.log10(abs(x))) if x and math.isfinite(x) else 0
    return f"{x:,.{max(0, digits - 1 - magnitude)}f}"


def rate(per_second: float, unit: str) -> str:
    """``58.30 TFLOP/s``, ``159.0 GFLOP/s``, ``504.0 GB/s``: four digits; ``unit`` is ``FLOP/s`` or ``B/s``."""
    prefix, factor = ("T", 1e12) if per_second >= 1e12 else ("G", 1e9)
    return f"{number(per_second / factor)} {prefix}{unit}"


def seconds(x: float) -> str:
    """``10.5 s``, ``123 ms``: three digits."""
    return f"{x:.3g} s" if x >= 1 else f"{x * 1e3:.3g} ms"


def duration(seconds: float) -> str:
    """A length of time in its two largest units: ``42s``, ``3m 05s``, ``7h 12m``, ``4d 03h``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def tflops(flops_per_second: float) -> str:
    """``58.3 TFLOP/s``."""
    return f"{flops_per_second / 1e12:.1f} TFLOP/s"


def dtype_name(dtype: "torch.dtype") -> str:
    """``bfloat16``, as on a command line."""
    return str(dtype).removeprefix("torch.")


def parse_count(flag: str, text: str) -> float:
    """``124M`` as a number.

    Raises:
        RequestError: the text cannot be parsed. The message names the flag.
    """
    try:
        number = text.strip().upper()
        factor = {"K": 1e3, "M": 1e6, "B": 1e9}.get(number[-1:], 1.0)
        count = float(number.rstrip("KMB")) * factor
    except ValueError:
        count = 0.0
    if not 0 < count < math.inf:
        raise RequestError(f"--{flag} takes a count such as 124M, not '{text}'")
    return count


def parse_gigabytes(flag: str, text: str) -> float:
    """``12GB``, ``12`` or ``11.5``: in units of 2**30 bytes, as cards are sold.

    Raises:
        RequestError: the text cannot be parsed. The message names the flag.
    """
    number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB|GiB|G)?", text.strip(), re.IGNORECASE)
    if number is None or not 0 < float(number[1]) < math.inf:
        raise RequestError(f"--{flag} takes an amount such as 12GB, not '{text}'")
    return float(number[1])
