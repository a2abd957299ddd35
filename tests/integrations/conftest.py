"""What both models' tests share: the error rule for a whole model, and the losses of a short training run."""

import copy
import math

import pytest
import torch

# As for the kernels (tests/kernels/conftest.py): how many times plain PyTorch's error ours may be. Through a whole
# model the errors of many operations meet by chance, hence the norm of a tensor's error and not its largest.
FACTOR = {"loss": 2.0, "logits": 2.0, "gradient": 3.0}
FLOOR = 2.0  # units of the dtype's eps, times the norm of the truth


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def roughened():
    """Moves a fresh model's parameters off their initial values, so that biases and attention matter."""

    def roughen(model):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                embedding = "wte" in name or "wpe" in name
                scale = 0.3 if parameter.dim() < 2 or embedding else 1.0 / math.sqrt(min(parameter.shape))
                offset = 1.0 if parameter.dim() < 2 and name.endswith("weight") else 0.0
                parameter.normal_(offset, scale)
        return model

    return roughen


@pytest.fixture
def as_accurate():
    """Checks that a patched model errs no more than the original, both held against the original in float64."""

    def gather(model, run):
        """Loss, logits and gradients, by name."""
        model.zero_grad()
        logits, loss = run(model.eval())
        results = {"loss": loss, "logits": logits}
        _, loss = run(model.train())
        loss.backward()
        results["training loss"] = loss
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        return {name: t.detach().double() for name, t in (results | gradients).items()}

    def check(model, patch, run, dtype):
        model = model.to(dtype)
        peer, oracle = copy.deepcopy(model), copy.deepcopy(model).double()
        ours = gather(patch(model), run)
        peers, truth = gather(peer, run), gather(oracle, run)
        for name, true in truth.items():
            factor = FACTOR[name.split()[-1] if name.endswith("loss") else name.split()[0]]
            error, peer_error = (ours[name] - true).norm(), (peers[name] - true).norm()
            allowed = factor * peer_error + FLOOR * torch.finfo(dtype).eps * true.norm()
            if "c_attn.bias" in name:  # a key's bias has no gradient but rounding
                allowed += torch.finfo(dtype).eps * true.abs().max() * true.numel() ** 0.5
            assert error <= allowed, (
                f"{name}: error {error:.2e}, plain PyTorch's {peer_error:.2e}, allowed {allowed:.2e}"
            )

    return check


@pytest.fixture
def losses():
    """The losses of a few AdamW steps."""

    def train(model, loss_of, batches):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        seen = []
        for batch in batches:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    return train
