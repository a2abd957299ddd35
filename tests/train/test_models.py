"""Opening a model, wherever it comes from."""

import pickle
import shutil
import sys
from types import ModuleType

import pytest
import torch

from fastgpt.data.tokenizer_json import JsonTokenizer
from fastgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig, huggingface
from fastgpt.train import checkpoint
from fastgpt.train.models import PROBE, open_model


@pytest.fixture
def run(trainer, tmp_path):
    """A run of eight updates, with checkpoints at 4 and 8."""
    assert trainer().train() == 0
    return tmp_path / "run"


def save_model(folder, vocab_size, end_of_text=None):
    torch.manual_seed(1)
    model = GPT(GPTConfig(8, vocab_size, 1, 1, 8))
    folder.mkdir()
    huggingface.save(folder, dict(model.named_parameters()), model.config, vocab_size, end_of_text)
    return model


def test_a_run_gives_its_newest_checkpoint_its_best_or_that_of_a_step(run):
    for which, step in (
        ("latest", 8),
        ("4", 4),
        ("8", 8),
        ("best", checkpoint.load_state(checkpoint.newest(run)).best_step),
    ):
        opened = open_model(str(run), which)
        assert opened.origin == f"step {step} of {run}"
        expected = checkpoint.load_parameters(checkpoint.folder(run, step))
        for name, p in opened.model.named_parameters():
            assert torch.equal(p, expected[name])
        assert not opened.model.training
        assert isinstance(opened.tokenizer, CharTokenizer)


@pytest.mark.parametrize(
    ("which", "message"), [("5", "no checkpoint of step 5 .there are 4, 8."), ("x", "latest, best or a step")]
)
def test_a_checkpoint_that_is_not_there_is_refused(run, which, message):
    with pytest.raises(RequestError, match=message):
        open_model(str(run), which)


def test_a_checkpoint_that_the_run_removes_meanwhile_is_not_missed(run, monkeypatch):
    loaded = checkpoint.load_state
    reads = []

    def removing(path):
        reads.append(path.name)
        if len(reads) == 2:  # the first is a look at which one is good
            shutil.rmtree(path)
        return loaded(path)

    monkeypatch.setattr(checkpoint, "load_state", removing)
    assert open_model(str(run)).origin == f"step 4 of {run}"
    assert reads[:2] == ["step-0000008"] * 2


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken_but_not_for_a_step(run, capsys):
    file = checkpoint.folder(run, 8) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert open_model(str(run)).origin.startswith("step 4")
    assert "is damaged" in capsys.readouterr().err
    with pytest.raises(RequestError, match="is damaged"):
        open_model(str(run), "8")


def test_a_folder_of_a_model_is_opened_with_its_tokenizer(tmp_path):
    tokenizer = JsonTokenizer.train(["the cat sat"] * 3, 262)
    model = save_model(tmp_path / "m", 262)
    assert open_model(str(tmp_path / "m")).tokenizer is None
    (tmp_path / "m" / "tokenizer.json").write_text(tokenizer.content)
    opened = open_model(str(tmp_path / "m"))
    assert opened.tokenizer.to_meta() == tokenizer.to_meta()
    assert opened.vocab_size == tokenizer.vocab_size <= opened.model.config.vocab_size
    assert torch.equal(opened.model.transformer.wpe.weight, model.transformer.wpe.weight)


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path):
    tokenizer = JsonTokenizer.train(["the cat sat"] * 3, 262)
    save_model(tmp_path / "m", 250)
    (tmp_path / "m" / "tokenizer.json").write_text(tokenizer.content)
    with pytest.raises(RequestError, match="more than the model's 250"):
        open_model(str(tmp_path / "m"))


def test_gpt2s_vocabulary_is_read_by_tiktoken_unless_the_tokenizer_is_another(tmp_path):
    save_model(tmp_path / "m", 50257)
    assert isinstance(open_model(str(tmp_path / "m")).tokenizer, GPT2Tokenizer)
    import tokenizers

    words = {f"w{i}": i for i in range(50257)}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    (tmp_path / "m" / "tokenizer.json").write_text(other.to_str())
    assert isinstance(open_model(str(tmp_path / "m")).tokenizer, JsonTokenizer)
    assert len(GPT2Tokenizer().encode(PROBE)) > 30


def nanogpt_checkpoint(path, gpt, prefix="_orig_mod.", **changes):
    """As nanoGPT's train.py saves one."""
    config = gpt.config
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    tensors = {prefix + name: p.detach().clone() for name, p in gpt.named_parameters()}
    tensors[f"{prefix}lm_head.weight"] = tensors[f"{prefix}transformer.wte.weight"]
    tensors[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, config.block_size, config.block_size)
    content = {
        "model": tensors, "optimizer": {"state": {}}, "model_args": {name: getattr(config, name) for name in names},
        "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char"},
    }  # fmt: skip
    torch.save(content | changes, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_checkpoint_is_opened_with_its_characters(tmp_path, prefix, bias):
    model = GPT(GPTConfig(8, 3, 2, 2, 8, bias=bias)).eval()
    (tmp_path / "out").mkdir()
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", model, prefix)
    (tmp_path / "shakespeare_char").mkdir()
    meta = {"itos": {0: "a", 1: "b", 2: "c"}, "stoi": {"a": 0, "b": 1, "c": 2}, "vocab_size": 3}
    (tmp_path / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps(meta))
    for path in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        opened = open_model(str(path), data_dir=tmp_path)
        assert opened.origin.endswith("ckpt.pt, step 7")
        assert opened.tokenizer.vocabulary == "abc"
        idx = torch.tensor([[0, 2, 1]])
        assert torch.equal(opened.model(idx), model(idx))
    assert open_model(str(path), data_dir=tmp_path / "elsewhere").tokenizer is None


class Harm:
    def __reduce__(self):
        import os

        return os.mkdir, ("harm",)


def test_nothing_in_nanogpts_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nanogpt_checkpoint("ckpt.pt", GPT(GPTConfig(8, 3, 1, 1, 8)), config=Harm())
    with pytest.raises(RequestError, match="cannot be read as nanoGPT's checkpoint"):
        open_model("ckpt.pt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("changes", [{"model_args": {}}, {"model": {}}, {"model_args": {"n_layer": 9}}])
def test_another_file_is_not_nanogpts_checkpoint(tmp_path, changes):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", GPT(GPTConfig(8, 3, 1, 1, 8)), **changes)
    with pytest.raises(RequestError, match="cannot be read as nanoGPT's checkpoint"):
        open_model(str(tmp_path))
    (tmp_path / "ckpt.pt").write_bytes(b"no zip file")
    with pytest.raises(RequestError, match="cannot be read as nanoGPT's checkpoint"):
        open_model(str(tmp_path))


def test_a_name_comes_from_the_hub(tmp_path, monkeypatch):
    save_model(tmp_path / "m", 11)
    asked = []
    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: asked.append(name) or str(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert open_model("gpt2-medium").origin == "gpt2-medium on the Hugging Face hub"
    assert open_model("somebody/some-gpt2").model.config.vocab_size == 11
    assert asked == ["gpt2-medium", "somebody/some-gpt2"]

    def offline(name, allow_patterns):
        raise OSError("no route to host\nand much more")

    hub.snapshot_download = offline
    with pytest.raises(RequestError, match=r"gpt2 cannot be had from the Hugging Face hub \(no route to host\)"):
        open_model("gpt2")
    with pytest.raises(RequestError, match=r"there is no folder runs/typo, and it cannot be had from the Hugging Face"):
        open_model("runs/typo")


def test_a_folder_is_meant_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "gpt2", 11)
    assert open_model("gpt2").model.config.vocab_size == 11


def test_what_is_no_model_is_refused(tmp_path, run):
    for path, message in (
        (tmp_path, "neither a run nor a model"), (tmp_path / "none", "there is no"), (run / "loss.png", "is a file"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            open_model(str(path))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RequestError, match="holds no checkpoint"):
        open_model(str(run))
