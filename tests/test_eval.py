"""``python -m fastgpt.eval``."""

import json
import math

import numpy as np
import pytest

from fastgpt import eval, output
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import write_shard
from fastgpt.data.tokenizer_json import JsonTokenizer
from fastgpt.data.tokenizers import ByteTokenizer, GPT2Tokenizer
from fastgpt.errors import RequestError
from fastgpt.train.models import OpenedModel


@pytest.fixture(scope="module")
def datasets(data_dir, tmp_path_factory):
    """The dataset ``words`` in characters, and the same text in bytes as ``bytes``."""
    text = data_dir / "words.txt"
    prepare("text", [text], tokenizer="byte", name="bytes", data_dir=data_dir)
    return data_dir


@pytest.fixture
def runs(trainer, datasets, tmp_path):
    """Two runs on the same text, in characters and in bytes."""
    for name, dataset in (("a", "words"), ("b", "bytes")):
        assert trainer(dataset=dataset, out_dir=tmp_path / name).train() == 0
    return [str(tmp_path / name) for name in "ab"]


def report(capsys, *args):
    capsys.readouterr()
    eval.main([*args, "--device", "cpu", "--json"])
    return json.loads(capsys.readouterr().out)


def test_models_with_different_tokenizers_are_compared_by_bits_a_byte(runs, datasets, capsys):
    found = report(capsys, *runs, "--data", "words", "--data_dir", str(datasets))
    a, b = (model["loss"] for model in found["models"])
    assert [model["tokenizer"] for model in found["models"]] == ["char", "byte"]
    assert a["tokens"] == b["tokens"]  # ASCII text
    for loss in (a, b):
        assert loss["bits_per_byte"] == pytest.approx(loss["nats"] / math.log(2))
        assert loss["perplexity"] == pytest.approx(math.exp(loss["nats"]))
    eval.main([*runs, "--data", "words", "--data_dir", str(datasets), "--device", "cpu"])
    said = capsys.readouterr().out
    assert "the validation split of words" in said
    assert f"{a['nats']:.4f} ± {a['error']:.4f}" in said
    assert f"{b['bits_per_byte']:.4f} ± {b['bits_per_byte_error']:.4f}" in said
    assert "bits a byte compare all models" in said


def test_one_tokenizer_needs_no_warning(runs, datasets, capsys):
    eval.main([runs[0], runs[0], "--data", "words", "--data_dir", str(datasets), "--device", "cpu"])
    assert "which differ here" not in capsys.readouterr().out


def test_on_a_narrow_terminal_no_number_is_cut(runs, datasets, capsys, monkeypatch):
    data = ["--data", "words", "--data_dir", str(datasets), "--device", "cpu"]
    loss = report(capsys, runs[0], *data[:4])["models"][0]["loss"]
    monkeypatch.setattr(output, "WIDE", 40)
    eval.main([runs[0], *data])
    said = capsys.readouterr().out
    assert f"{loss['nats']:.4f} ± {loss['error']:.4f}" in said
    assert "…" not in said


def test_a_text_file_a_token_budget_and_windows(runs, datasets, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("\ufeff" + "sea oil\n" * 20)
    found = report(capsys, runs[0], "--data", str(tmp_path / "t.txt"))
    assert found["models"][0]["loss"]["tokens"] == 8 * 20 - 1
    data = ["--data", "words", "--data_dir", str(datasets)]
    assert report(capsys, runs[0], *data, "--max_tokens", "50")["models"][0]["loss"]["tokens"] == 49
    assert report(capsys, runs[0], *data, "--windows", "3")["models"][0]["loss"]["tokens"] == 3 * 16
    assert report(capsys, runs[0], *data, "--split", "train", "--windows", "2")["data"] == "the training split of words"
    small = report(capsys, runs[0], *data, "--max_tokens", "60", "--stride", "1")["models"][0]["loss"]
    assert small["tokens"] == 59


def test_tokens_without_a_tokenizer_are_read_with_the_models(runs, datasets, tmp_path, capsys):
    tokens = np.random.default_rng(0).integers(10, size=100).astype(np.uint16)
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, tokens)
    (model,) = report(capsys, runs[0], "--data", str(tmp_path / "train.bin"))["models"]
    assert model["loss"]["tokens"] == 99
    assert model["loss"]["bits_per_byte"] is None


def test_tokens_of_another_tokenizer_are_named(runs, datasets, tmp_path, capsys):
    for name in ("train.bin", "val.bin"):
        write_shard(tmp_path / name, np.array([1, 60_000, 2] * 10, dtype=np.uint16))
    data = ["--data", str(tmp_path / "train.bin"), "--device", "cpu"]
    with pytest.raises(RequestError, match=r"has the token 60000, and .* knows .* only: they are of another tokenizer"):
        eval.main([runs[1], *data])
    write_shard(tmp_path / "val.bin", np.arange(10, dtype=np.uint16))
    eval.main([runs[1], *data])
    assert "its tokenizer is unknown, so its tokens are taken for each model's own" in capsys.readouterr().out


def test_a_mark_between_documents_is_each_models_own(tmp_path):
    """A model without one reads none, and one with another number reads that, not the letters of its name."""
    (tmp_path / "t.txt").write_text("one two<|endoftext|>three")
    text = eval.open_text(str(tmp_path / "t.txt"), tmp_path, "val")
    learnt = JsonTokenizer.train(["one two three"], 300)
    for tokenizer in (ByteTokenizer(), GPT2Tokenizer(), learnt):
        mark = [] if tokenizer.eot is None else [tokenizer.eot]
        expected = [*tokenizer.encode("one two"), *mark, *tokenizer.encode("three")]
        assert text.tokens_for(OpenedModel("m", "a model", None, tokenizer)).tolist() == expected
    assert text.n_bytes == 12

    (tmp_path / "a.txt").write_text("eins zwei")
    (tmp_path / "b.txt").write_text("drei vier")
    prepare(
        "text",
        [tmp_path / "a.txt"],
        val_files=[tmp_path / "a.txt", tmp_path / "b.txt"],
        tokenizer="gpt2",
        name="marked",
        data_dir=tmp_path,
    )
    text = eval.open_text("marked", tmp_path, "val")
    assert text.documents == ["eins zwei", "drei vier"]
    found = text.tokens_for(OpenedModel("m", "a model", None, learnt)).tolist()
    assert found == [*learnt.encode("eins zwei"), learnt.eot, *learnt.encode("drei vier")]


def test_each_row_of_json_lines_is_a_document(tmp_path):
    rows = [{"text": "one", "body": "eins"}, {"text": "two<|endoftext|>three", "body": "zwei"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert eval.open_text(str(tmp_path / "t.jsonl"), tmp_path, "val").documents == ["one", "two", "three"]
    assert eval.open_text(str(tmp_path / "t.jsonl"), tmp_path, "val", text_field="body").documents == ["eins", "zwei"]
    with pytest.raises(RequestError, match=r"no text named title"):
        eval.open_text(str(tmp_path / "t.jsonl"), tmp_path, "val", text_field="title")


def test_tasks_are_scored(runs, tmp_path, capsys):
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "eta oin eta"}) + "\n")
    line = {"activity_label": "e", "ctx_a": "eta", "ctx_b": "oin", "endings": ["eta", "oin"], "label": 0}
    (tmp_path / "h.jsonl").write_text(json.dumps(line) + "\n")
    tasks = ["--lambada", str(tmp_path / "l.jsonl"), "--hellaswag", str(tmp_path / "h.jsonl")]
    (model,) = report(capsys, runs[1], *tasks)["models"]
    assert model["lambada"]["accuracy"]["examples"] == model["hellaswag"]["acc_norm"]["examples"] == 1
    eval.main([runs[1], *tasks, "--device", "cpu"])
    said = capsys.readouterr().out
    assert "lambada perplexity" in said
    assert "hellaswag acc_norm" in said


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to evaluate on"),
        (["--data", "none"], "no dataset 'none'"),
        (["--data", "none.txt"], "none.txt cannot be read: No such file or directory"),
        (["--data", "words", "--stride", "17"], "--stride must be from 1 to the model's context of 16"),
        (["--data", "words", "--windows", "0"], "--windows must be at least 1"),
        (["--data", "latin"], "is UTF-16 text: save it as UTF-8"),
        (["--data", "other"], "cannot read .*other: the character"),
        (["--data", "other", "--max_tokens", "5"], "counts a dataset's tokens"),
    ],
)
def test_a_wrong_request_is_refused(runs, datasets, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "other").write_text("ЖЖЖ")
    with pytest.raises(RequestError, match=message):
        eval.main([runs[0], "--data_dir", str(datasets), "--device", "cpu", *args])
