"""``python -m fastgpt.eval``."""

import json
import math

import numpy as np
import pytest

from fastgpt import eval
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import write_shard
from fastgpt.errors import RequestError


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
        (["--data", "words", "--stride", "17"], "--stride must be from 1 to the model's context of 16"),
        (["--data", "words", "--windows", "0"], "--windows must be at least 1"),
        (["--data", "latin"], "cannot be read as UTF-8 text"),
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
