"""fastgpt's kernels inside models that others wrote.

    from fastgpt.integrations import patch_gpt2

    model = patch_gpt2(GPT2LMHeadModel.from_pretrained("gpt2"))

A patch changes what a model computes with, and nothing else: its modules stay the same objects under the same names,
of a subclass of the class they had, so that parameters, ``state_dict``, hooks, optimizers, ``torch.compile``,
``copy.deepcopy`` and ``pickle`` go on as before. What the kernels do not cover, a padding mask say, runs in the
model's own code. Imports nothing of fastgpt but the kernels, and transformers only to patch one of its models.
"""

from fastgpt.integrations.gpt2 import patch_gpt2
from fastgpt.integrations.nanogpt import patch_nanogpt
from fastgpt.integrations.swap import unpatch

__all__ = ["patch_gpt2", "patch_nanogpt", "unpatch"]
