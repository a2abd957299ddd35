"""fastgpt's kernels inside models that others wrote.

    from fastgpt.integrations import patch_gpt2

    model = patch_gpt2(GPT2LMHeadModel.from_pretrained("gpt2"))

A patch changes the code that computes a module, and nothing else. The modules stay the same objects under the same
names; only their class becomes a subclass of what it was. So parameters, ``state_dict``, hooks, optimizers,
``torch.compile``, ``copy.deepcopy`` and ``pickle`` work as before. What the kernels do not support, such as a padding
mask, runs in the model's own code.

This package imports only the kernels of fastgpt. It imports transformers only to patch a model of transformers.
"""

from fastgpt.integrations.gpt2 import patch_gpt2
from fastgpt.integrations.llama import patch_llama
from fastgpt.integrations.nanogpt import patch_nanogpt
from fastgpt.integrations.swap import unpatch

__all__ = ["patch_gpt2", "patch_llama", "patch_nanogpt", "unpatch"]
