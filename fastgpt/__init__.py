"""Train GPT-2-class models on one GPU or a CPU; ``fastgpt.kernels`` is the library of kernels."""

__version__ = "0.1.0"
