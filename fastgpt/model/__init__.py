"""GPT-2's architecture on fastgpt's kernels, and the same in plain PyTorch."""

from fastgpt.model.config import GPTConfig
from fastgpt.model.gpt import GPT

__all__ = ["GPT", "GPTConfig"]
