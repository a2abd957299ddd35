"""Models to and from folders that transformers reads and writes."""

import copy
import json
import os
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig, huggingface
from fastgpt.model.generate import generate

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
        ({"model_type": "opt"}, "model_type is 'opt', and fastgpt reads gpt2, llama"),
        ({"model_type": ["gpt2"]}, "model_type is"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"n_inner": 10}, "n_inner is 10"),
        ({"n_layer": "2"}, "n_layer is '2', not a number"),
        ({"n_layer": None}, "n_layer is None, not a number"),
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


# Beyond GPT-2: what transformers calls the architecture, and the options of ours.
LLAMA = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "bias": False}
QWEN3 = LLAMA | {"qk_norm": True}
ARCEE = LLAMA | {"mlp": "relu2"}
DECODERS = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Llama, grouped queries, untied": ("LlamaForCausalLM", LLAMA | {"n_kv_head": 2, "tied": False}),
    "Llama, biases": ("LlamaForCausalLM", LLAMA | {"n_kv_head": 1, "bias": True}),
    "Qwen3": ("Qwen3ForCausalLM", QWEN3 | {"n_kv_head": 2}),
    "Qwen3, window, untied": ("Qwen3ForCausalLM", QWEN3 | {"window": 7, "tied": False}),
    "Arcee": ("ArceeForCausalLM", ARCEE | {"n_kv_head": 2, "tied": False}),
    "Arcee, biases": ("ArceeForCausalLM", ARCEE | {"bias": True}),
    "Starcoder2": ("Starcoder2ForCausalLM", {"positions": "rotary", "n_kv_head": 2}),
    "Starcoder2, no biases, untied": ("Starcoder2ForCausalLM", {"positions": "rotary", "bias": False, "tied": False}),
}


def roughened(model):
    """With weights large enough that each part shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith(("q_norm.weight", "k_norm.weight")):  # ours has none
                p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def last_and_loss(model, idx):
    """The logits of the last position, and the loss, which is one of all."""
    with torch.no_grad():
        loss = model(idx, labels=idx).loss if hasattr(model, "config_class") else model(idx[:, :-1], idx[:, 1:])
    return last_logits(model, idx), loss


def drawn_by_transformers(model, prompt):
    """Twelve most likely tokens."""
    options = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}  # neither is guessed from the prompt
    return model.generate(prompt, max_new_tokens=12, do_sample=False, **options)[0, prompt.shape[1] :].tolist()


def assert_as_accurate(ours, theirs, idx, vocab_size):
    """Our fp32 errs at most twice as much as theirs from their fp64, beside T eps: their angles are fp32."""
    found, peers = last_and_loss(ours, idx), last_and_loss(theirs, idx)
    truths = last_and_loss(copy.deepcopy(theirs).double(), idx)
    for one, peer, true in zip(found, peers, truths, strict=True):
        one = one[:, :vocab_size] if one.dim() else one
        floor = idx.shape[1] * torch.finfo(torch.float32).eps * true.abs().max()
        assert (one - true).abs().max() <= 2 * (peer - true).abs().max() + floor


@pytest.mark.parametrize("name", DECODERS)
def test_what_later_gpts_have_goes_out_with_its_logits_and_comes_back(tmp_path, idx, name):
    architecture, options = DECODERS[name]
    ours = roughened(GPT(GPTConfig(24, 40, 5, 4, 32, **options)))
    huggingface.save(tmp_path, dict(ours.named_parameters()), ours.config, 37, end_of_text=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == architecture
    if ours.config.tied:  # otherwise padding takes part in the loss
        ours.transformer.wte.weight.data = ours.transformer.wte.weight.data[:37].clone()
    else:
        ours.lm_head.weight.data = ours.lm_head.weight.data[:37].clone()
    assert_as_accurate(ours, theirs, idx, 37)
    assert drawn_by_transformers(theirs, idx[:1, :8]) == [
        int(t) for t in generate(ours, idx[:1, :8], 12, temperature=0.0)
    ]

    again = huggingface.load(tmp_path).eval()
    assert again.config == replace(
        ours.config, vocab_size=37, bias=ours.config.bias or architecture.startswith("Starcoder2")
    )
    for a, b in zip(last_and_loss(again, idx), last_and_loss(ours, idx), strict=True):
        if architecture.startswith("Qwen3"):  # whose weights of queries and keys have been scaled
            assert_as_accurate(again, theirs, idx, 37)
        elif ours.config.bias == again.config.bias:
            assert torch.equal(a, b)


def saved_by_transformers(folder, name, **changes):
    architecture = DECODERS[name][0]
    config = {
        "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 24, "head_dim": 8, "rms_norm_eps": 1e-5,
        "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    own = getattr(transformers, architecture)
    model = roughened(own(own.config_class(**config | changes)))
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("Qwen3", {}),
        ("Arcee", {}),
        ("Starcoder2", {}),
    ],
)
def test_what_transformers_has_written_in_several_files_comes_in(tmp_path, idx, name, changes):
    theirs = saved_by_transformers(tmp_path, name, **changes)
    assert (tmp_path / huggingface.INDEX).is_file()
    ours = huggingface.load(tmp_path).eval()
    assert ours.config.n_kv_head == (0 if changes else 2)
    assert_as_accurate(ours, theirs, idx, 37)


def test_a_llama_as_older_versions_wrote_it_comes_in(tmp_path, idx):
    theirs = saved_by_transformers(tmp_path, "Llama")
    content = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias"):
        del content[name]
    (tmp_path / "config.json").write_text(json.dumps(content | {"rope_theta": 10000.0, "rope_scaling": None}))
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name.removeprefix("model."): t for name, t in tensors.items()}, file)
    save_file({"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "buffers.safetensors")
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    index["weight_map"]["layers.0.self_attn.rotary_emb.inv_freq"] = "buffers.safetensors"
    (tmp_path / huggingface.INDEX).write_text(json.dumps(index))
    assert_as_accurate(huggingface.load(tmp_path).eval(), theirs, idx, 37)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    saved_by_transformers(folder, "Llama")
    return folder


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": YARN}, "rope_type is 'yarn', and fastgpt's Llama has 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": 2}, "rope_scaling is 2"),
        ({"rope_parameters": {"full_attention": YARN}}, "fastgpt turns all layers alike"),
        ({"rope_parameters": None, "rope_theta": 500000.0}, "rope_theta is 500000.0, and fastgpt's Llama has 10000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "mlp_bias is False, and fastgpt's Llama has True"),
        ({"attention_bias": 1}, "attention_bias is 1, not true or false"),
        ({"head_dim": 16}, "head_dim is 16, and fastgpt's Llama has 8"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and fastgpt's Llama has 'silu'"),
        ({"intermediate_size": 100}, "intermediate_size is 100, and fastgpt's Llama has 128"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and fastgpt's Llama has 1e-05"),
        ({"num_key_value_heads": 3}, "n_kv_head=3 does not divide n_head=4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 32\)"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"num_hidden_layers": 3}, r"lacks the weights layers\.2\.input_layernorm"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* is no parameter of Llama"),
        ({"attention_bias": True, "mlp_bias": True}, r"lacks the weights .*\.bias"),
        ({"model_type": "arcee", "hidden_act": "relu2"}, r"gate_proj\.weight is no parameter of Arcee"),
        ({"model_type": "qwen3"}, r"lacks the weights layers\.0\.self_attn\.k_norm\.weight"),
        ({"model_type": "qwen3", "sliding_window": 7}, "use_sliding_window is False"),
    ],
)  # fmt: skip
def test_a_llama_that_our_model_does_not_compute_is_refused(llama_folder, tmp_path, changes, message):
    for file in llama_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    content = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(RequestError, match=message) as refused:
        huggingface.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_missing_entry_means_what_it_means_to_transformers(llama_folder, tmp_path):
    for name, default in (("rms_norm_eps", 1e-6), ("intermediate_size", 11008)):
        content = json.loads((llama_folder / "config.json").read_text())
        del content[name]
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert getattr(transformers.LlamaConfig(), name) == default
        with pytest.raises(RequestError, match=f"{name} is {default}"):
            huggingface.read_config(tmp_path)


def test_a_qwen3_whose_queries_have_a_weight_of_their_norm_is_refused(tmp_path):
    model = saved_by_transformers(tmp_path, "Qwen3")
    model.model.layers[1].self_attn.k_norm.weight.data[3] = 1.5
    model.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match=r"layers\.1\.self_attn\.k_norm\.weight is not all ones"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LLAMA | {"softcap": 15.0}, "Llama has no softcap=15.0"),
        (LLAMA | {"value_embeddings": True}, "Llama has no value_embeddings=True"),
        (LLAMA | {"window": 7}, "has no window=7"),
        (QWEN3 | {"bias": True}, "Llama has no qk_norm=True; Qwen3 has no bias=True"),
        ({"norm": "rms"}, "GPT-2 has no norm=rms"),
        ({"tied": False}, "GPT-2 has no tied=False"),
        (
            ARCEE | {"qk_norm": True, "softcap": 3.0},
            "Qwen3 has no mlp=relu2, softcap=3.0; Arcee has no qk_norm=True, softcap=3.0",
        ),
    ],
)
def test_options_that_no_architecture_has_are_refused_by_name(tmp_path, options, message):
    model = GPT(GPTConfig(24, 40, 2, 4, 32, **options))
    with pytest.raises(RequestError, match=message) as refused:
        huggingface.save(tmp_path, dict(model.named_parameters()), model.config, 37, None)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
