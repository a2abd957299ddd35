"""A small GPT-2 of transformers, its input, and what it is compared with."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastgpt.integrations import patch_gpt2

V, T = 131, 24


def made(attn_implementation="sdpa", **kwargs):
    config = {"n_layer": 2, "n_head": 3, "n_embd": 48, "vocab_size": V, "n_positions": 64}
    config |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel._from_config(GPT2Config(**config | kwargs), attn_implementation=attn_implementation)
    return model.train()


def tokens(B=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(V, (B, 1), generator=generator) + torch.arange(T)) % V


def labelled(ids, every=5):
    labels = ids.clone()
    labels[0, ::every] = -100
    return labels


def twins(roughened, **kwargs):
    """A model and a patched copy of it."""
    model = roughened(made(**kwargs))
    return model, patch_gpt2(copy.deepcopy(model))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


def same_gradients(ours, model):
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-5, name
