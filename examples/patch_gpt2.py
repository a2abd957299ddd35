"""GPT-2 of transformers trained side by side as it is and on fastgpt's kernels: the same losses, in less time.

    python examples/patch_gpt2.py

Needs transformers (pip install "fastgpt[transformers]"). Downloads nothing: the weights are random, the text is one of
Python's own modules.
"""

import copy
import time
import typing
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt.integrations import patch_gpt2

STEPS, BATCH, LENGTH = 6, 4, 128
CONFIG = GPT2Config(n_layer=4, n_embd=256, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)

torch.manual_seed(0)
text = torch.tensor(list(Path(typing.__file__).read_bytes()))
plain = GPT2LMHeadModel(CONFIG).train()
patched = patch_gpt2(copy.deepcopy(plain))
models = {m: torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (plain, patched)}

for step in range(STEPS):
    starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
    ids, line = text[starts + torch.arange(LENGTH)], []
    for model, optimizer in models.items():
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        line.append(f"loss {loss.item():.4f} in {1000 * (time.perf_counter() - begun):5.0f} ms")
    print(f"step {step}:  plain {line[0]},  patched {line[1]}")
