"""GPT-2 to and from folders that transformers reads and writes."""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig, huggingface

transformers = pytest.importorskip("transformers")

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 37, "n_positions": 24}


@pytest.fixture(scope="module")
def theirs():
    """A random GPT-2 of transformers, none of whose parameters is zero or one."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, bos_token_id=36, eos_token_id=36))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def idx():
    return torch.randint(36, (3, 24), generator=torch.Generator().manual_seed(2))


def last_logits(model, idx):
    """Logits of the last position, (B, V)."""
    with torch.no_grad():
        output = model(idx)
    return output if isinstance(output, torch.Tensor) else output.logits[:, -1]


def rewrite(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


def test_a_gpt2_of_transformers_comes_in_with_its_logits_and_its_loss(theirs, folder, idx):
    ours = huggingface.load(folder).eval()
    torch.testing.assert_close(last_logits(ours, idx), last_logits(theirs, idx), rtol=1e-4, atol=1e-4)
    loss = ours(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, rtol=1e-5, atol=1e-5)
    assert ours.config == GPTConfig(24, 37, 2, 2, 16, bias=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [37, 33])
def test_a_model_goes_out_with_its_logits_and_comes_back(tmp_path, idx, bias, vocab_size):
    torch.manual_seed(3)
    ours = GPT(GPTConfig(24, 37, 2, 2, 16, bias=bias)).eval()
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    idx = idx % vocab_size
    huggingface.save(tmp_path, dict(ours.named_parameters()), ours.config, vocab_size, end_of_text=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.vocab_size == vocab_size
    assert theirs.generation_config.eos_token_id == 5
    expected = last_logits(ours, idx)[:, :vocab_size]
    torch.testing.assert_close(last_logits(theirs, idx), expected, rtol=1e-4, atol=1e-4)
    again = huggingface.load(tmp_path).eval()
    assert again.config.bias
    torch.testing.assert_close(last_logits(again, idx), expected, rtol=1e-5, atol=1e-5)


def test_what_goes_out_can_be_read_by_whom_the_umask_lets(tmp_path):
    model = GPT(GPTConfig(8, 11, 1, 1, 8))
    mask = os.umask(0o027)
    try:
        huggingface.save(tmp_path, dict(model.named_parameters()), model.config, 11, None)
    finally:
        os.umask(mask)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("model.safetensors", "config.json", "generation_config.json"), "0o640"
    )


def test_names_without_prefix_masks_a_head_and_low_precision_come_in_too(theirs, folder, idx):
    """As in the folder of gpt2 on the hub."""
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): t.half() for name, t in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    torch.testing.assert_close(
        last_logits(huggingface.load(folder).eval(), idx), last_logits(theirs, idx), rtol=2e-2, atol=2e-2
    )


def test_weights_in_several_files_come_in(theirs, folder, idx):
    theirs.save_pretrained(folder, max_shard_size="5KB")
    (folder / "model.safetensors").unlink()
    assert (folder / huggingface.INDEX).is_file()
    torch.testing.assert_close(
        last_logits(huggingface.load(folder).eval(), idx), last_logits(theirs, idx), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 10}, "n_inner is 10"),
        ({"n_layer": "2"}, "n_layer is '2', not a number"),
        ({"n_head": 3}, "not divisible by n_head=3"),
        ({"n_layer": 3}, "lacks the weights h.2"),
        ({"n_layer": 1}, "is no parameter of GPT-2"),
        ({"n_positions": 25}, "has shape"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(RequestError, match=message):
        huggingface.load(folder)


def test_damaged_and_missing_files_are_named(folder):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(RequestError, match=r"model\.safetensors cannot be read"):
        huggingface.load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(RequestError, match=r"has no model\.safetensors \(pytorch_model\.bin is pickled"):
        huggingface.load(folder)
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": {"wte.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(RequestError, match="does not map weights to files of the folder"):
        huggingface.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"config\.json is damaged"):
        huggingface.load(folder)
