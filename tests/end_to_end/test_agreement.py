"""The whole of fastgpt's training step against plain PyTorch's, update by update."""

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import contenders, cpu
from fastgpt.kernels import FusedAdamW, dispatch, use_backend
from fastgpt.model import GPT, GPTConfig
from fastgpt.model.reference import ReferenceGPT
from fastgpt.train.parameters import ParameterStore
from fastgpt.train.schedule import learning_rate

STEPS, MICRO_BATCHES = 50, 2
WEIGHT_DECAY, MAX_NORM, BETAS = 0.1, 0.5, (0.9, 0.95)
SCHEDULE = {"peak": 1e-2, "floor": 1e-3, "warmup_iters": 5, "decay_iters": 45}

SHAPES = [
    GPTConfig(block_size=24, vocab_size=65, n_layer=2, n_head=2, n_embd=32),
    GPTConfig(block_size=17, vocab_size=131, n_layer=3, n_head=3, n_embd=39, bias=False),
]


def batches(config):
    """Sequences that count up from a random start, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS * MICRO_BATCHES):
        start = torch.randint(config.vocab_size, (3, 1), generator=generator)
        tokens = (start + torch.arange(config.block_size + 1)) % config.vocab_size
        yield tokens[:, :-1], tokens[:, 1:]


def rates():
    return [learning_rate(step, **SCHEDULE) for step in range(STEPS)]


def losses_of_pytorch(model, data):
    """AdamW, decay on matrices alone, clipping and accumulation as PyTorch spells them."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    losses, norms = [], []
    for rate in rates():
        total = 0.0
        for _ in range(MICRO_BATCHES):
            loss = model(*next(data)) / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def losses_of_fastgpt(model, data):
    """The same on the flat store and the fused optimizer."""
    store = ParameterStore(model)
    optimizer = FusedAdamW(store.groups(WEIGHT_DECAY), betas=BETAS, max_grad_norm=MAX_NORM)
    losses, norms = [], []
    for rate in rates():
        total = 0.0
        for _ in range(MICRO_BATCHES):
            loss = model(*next(data))
            loss.backward()
            total += loss.item() / MICRO_BATCHES
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step(grad_scale=1 / MICRO_BATCHES, zero_grad=True)
        norms.append(optimizer.grad_norm.item())
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("config", SHAPES, ids=["bias", "no bias, odd sizes"])
def test_fifty_updates_have_the_losses_of_plain_pytorch(config, backend):
    if backend == "cpp" and dispatch.backend_of("cpu", torch.float32)[0] != "cpp":
        pytest.skip("the C++ kernels are not built")
    torch.manual_seed(0)
    model, reference = GPT(config), ReferenceGPT(config)
    reference.load_state_dict(model.state_dict())
    expected, expected_norms = losses_of_pytorch(reference, batches(config))
    with use_backend(backend):
        losses, norms = losses_of_fastgpt(model, batches(config))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-2)
    assert losses[-1] < losses[0] / 2  # the two agree on learning, not on standing still
    assert max(norms) > 2 * MAX_NORM  # clipping acted
    state = reference.state_dict()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:  # a key's bias has no gradient but rounding, and AdamW blows that up
            error = (parameter.detach() - state[name]).norm() / state[name].norm()
            assert error < 1e-3, f"{name}: {error:.1e}"


# ---- text, at the shape of bench.cpu's smallest model ----

TEXT_STEPS, ORACLE_STEPS = 200, 25


class Oracle(ReferenceGPT):
    """The reference in float64, from the same initial weights."""

    def __init__(self, config):
        super().__init__(config)
        self.double()

    def forward(self, idx, targets):
        logits = F.linear(self.transformer(idx), self.transformer.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def losses_on_text(make_update, n_steps):
    """Losses of so many updates on Python source, its bytes numbered by how frequent they are, the rarest alike."""
    config, batch_size, _ = cpu.MODELS["char"]
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).int()
    ranks = text.bincount().argsort(descending=True).argsort()
    tokens = ranks.clamp(max=config.vocab_size - 1)[text]
    torch.manual_seed(0)
    update, losses = make_update(config, torch.device("cpu")), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        starts = torch.randint(len(tokens) - config.block_size, (batch_size, 1), generator=generator)
        crops = tokens[starts + torch.arange(config.block_size + 1)]
        losses.append(update([(crops[:, :-1], crops[:, 1:].contiguous())]).double())
    return torch.stack(losses)


def test_two_hundred_updates_on_text_have_the_losses_of_plain_pytorch_within_rounding(monkeypatch):
    ours = losses_on_text(contenders.fastgpt_update, TEXT_STEPS)
    reference = losses_on_text(contenders.plain_update, TEXT_STEPS)
    monkeypatch.setattr(contenders, "ReferenceGPT", Oracle)
    truth = losses_on_text(contenders.plain_update, ORACLE_STEPS)  # float64 takes as long as three of fastgpt's updates

    def error(losses):
        return (losses[:ORACLE_STEPS] - truth).abs().max().item()

    rounding = torch.finfo(torch.float32).eps * truth.max().item()  # of a loss itself, were all else exact
    allowed = 3 * error(reference) + rounding
    assert error(ours) <= allowed
    # roundings go either way, so errors grow as the square root of the updates; the two may be off to either side
    assert (ours - reference).abs().max() <= (allowed + error(reference)) * math.sqrt(TEXT_STEPS / ORACLE_STEPS)
    assert ours[-10:].mean() < math.log(65) - 1  # from ln 65, that of guessing
