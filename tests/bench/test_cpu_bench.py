"""``python -m bench.cpu``: contenders agree and its records say what was measured."""

import json

import pytest
import torch

from bench import contenders, cpu, index
from bench.records import conditions
from fastgpt.errors import RequestError
from fastgpt.model.config import GPTConfig
from fastgpt.units import number

TINY = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=50)


@pytest.fixture
def tiny(monkeypatch):
    """One small model, and contenders that need no compiler."""
    monkeypatch.setattr(cpu, "MODELS", {"tiny": (TINY, 2, 3)})
    monkeypatch.setattr(cpu, "USUAL", ("tiny",))
    monkeypatch.setattr(cpu, "CONTENDERS", {name: cpu.CONTENDERS[name] for name in ("fastgpt", "eager")})


@pytest.mark.parametrize("dtype", list(cpu.DTYPES))
def test_the_records_hold_what_was_measured(tiny, tmp_path, capsys, dtype):
    assert cpu.main(["--dtype", dtype, "--threads", "1", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (json_file,) = tmp_path.glob("step*.json")
    record = json.loads(json_file.read_text())
    (model,) = record["comparisons"]
    ours, eager = (model["contenders"][name] for name in ("fastgpt", "eager"))
    assert len(ours["losses"]) == ours["readings"] == 3
    assert ours["losses"] == pytest.approx(eager["losses"], rel=contenders.AGREE[dtype])
    assert len(set(ours["losses"])) == 3
    assert ("bfloat16" in json_file.name) == (dtype == "bfloat16")
    alone = [model["contenders"][name] for name in (cpu.PRODUCTS, cpu.TORCH_PRODUCTS)]
    assert 0 < alone[0]["ms"] < ours["ms"]
    assert alone[1]["ms"] > 0
    assert not any(c["whole"] for c in alone)
    assert ours["peak_bytes"] > 50 * 2**20  # of a process, libraries included
    assert ours["tokens_per_s"] == pytest.approx(2 * 16 / (ours["ms"] / 1e3))
    page = json_file.with_suffix(".md").read_text()
    assert f"| tiny | eager | {number(eager['ms'])} |" in page
    assert json_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert number(ours["ms"]) in capsys.readouterr().out


def test_a_record_is_named_after_the_threads_and_every_unusual_flag(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "USUAL", ())
    flags = ["--models", "tiny", "--dtype", "bfloat16", "--threads", "1", "--seconds", "0", "--out", str(tmp_path)]
    torch.set_num_threads(2)
    assert cpu.main(flags) == 0
    assert (tmp_path / f"step-tiny-bfloat16{conditions('cpu')}.json").exists()
    assert conditions("cpu").startswith("-1-thread")


def test_the_run_ends_with_its_rows_of_the_table(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu, "results_folder", lambda device: tmp_path / "a-cpu")
    assert cpu.main(["--threads", "1", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    (row,) = index.cpu_rows(tmp_path)
    assert "\n".join(index.table([row])) in out
    assert "bench/results/a-cpu, bench/results/*.md and README.md to a pull request" in out


def test_a_loss_that_is_not_finite_agrees_with_none():
    assert contenders.difference([2.0, 4.0], [2.0, 3.2]) == pytest.approx(0.25)
    assert contenders.difference([2.0, 4.0], [2.0, float("nan")]) == float("inf")
    assert contenders.difference([], [2.0]) == float("inf")
    late = [2.0] * contenders.COMPARED + [float("nan")]
    assert contenders.difference(late, late) == float("inf")


def test_losses_that_rounding_has_driven_apart_by_then_are_not_compared():
    same = [2.0] * contenders.COMPARED
    assert contenders.difference([*same, 2.5], [*same, 2.0]) == 0.0
    assert contenders.difference([*same[1:], 2.5], same) == pytest.approx(0.25)


def test_losses_are_compared_with_plain_pytorchs_or_else_with_ours():
    losses = {"fastgpt": [2.0], "eager": [4.0], "compile": [5.0], "fastgpt, 8-bit moments": [9.0]}
    assert contenders.differences(losses) == {"fastgpt": 0.5, "eager": 0.0, "compile": 0.25}
    del losses["eager"]
    assert contenders.differences(losses) == {"fastgpt": 0.0, "compile": 1.5}
    assert contenders.differences({}) == {}


def test_losses_that_disagree_are_a_failure(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.AGREE, "float32", -1.0)
    assert cpu.main(["--threads", "1", "--seconds", "0", "--out", str(tmp_path)]) == 1


def test_the_flops_of_the_products_are_those_of_the_model_without_attention():
    flops = cpu.product_flops(TINY, batch_size=2)
    matrices = 12 * 32 * 32 + 50 * 32
    assert flops == 6 * 2 * 16 * matrices


def test_a_number_of_threads_below_one_is_refused():
    with pytest.raises(RequestError, match="--threads"):
        cpu.main(["--threads", "0"])
