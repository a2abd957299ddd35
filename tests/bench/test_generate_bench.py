"""bench.generate, small."""

import json

import pytest

from bench import generate as bench

pytest.importorskip("transformers")


def test_all_write_the_same_tokens_and_the_record_says_how_fast(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "results_folder", lambda device: tmp_path)
    argv = ["--device=cpu", "--n_layer=1", "--prompt_tokens=3", "--new_tokens=4", "--rounds=2"]
    assert bench.main(argv) == 0
    assert "the tokens are the same" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    (comparison,) = json.loads(path.read_text())["comparisons"]
    assert set(comparison["contenders"]) == {bench.OURS, bench.UNCACHED, bench.THEIRS}
    for contender in comparison["contenders"].values():
        assert contender["tokens_per_s"] == pytest.approx(4e3 / contender["ms"])


def test_a_contender_that_writes_other_tokens_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "results_folder", lambda device: tmp_path)
    good = bench.writers
    monkeypatch.setattr(
        bench, "writers", lambda *args: good(*args) | {bench.UNCACHED: lambda: good(*args)[bench.OURS]() + 1}
    )
    argv = ["--device=cpu", "--n_layer=1", "--prompt_tokens=3", "--new_tokens=4", "--rounds=2"]
    assert bench.main(argv) == 1
    assert f"other tokens: {bench.UNCACHED}" in capsys.readouterr().out
