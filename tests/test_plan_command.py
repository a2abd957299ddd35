"""``python -m fastgpt.plan``: what a run will take, said before it runs."""

import json
from pathlib import Path

import pytest
import torch

from fastgpt import hardware, limits, plan
from fastgpt.errors import RequestError
from fastgpt.model import GPTConfig
from fastgpt.train.predict import fit, micro_batch, points, roofline
from tests.train.predict.traced_once import traced_once


@pytest.fixture(scope="module", autouse=True)
def one_trace_a_setup():
    with traced_once(plan, micro_batch, roofline):
        yield


def planned(capsys, *flags):
    assert plan.main([*flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def words(capsys, *flags):
    assert plan.main(flags) == 0
    return capsys.readouterr().out


def test_gpt2_124m_on_the_reference_card(capsys):
    p = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")
    assert p["parameters_without_positions"] / 1e6 == pytest.approx(123.6, abs=0.05)
    assert p["parameters"] / 1e6 == pytest.approx(124.4, abs=0.05)
    assert p["fits"]
    assert p["peak"] < 11 * 2**30
    assert p["tokens_per_step"] == 524_288 == p["batch_size"] * p["gradient_accumulation_steps"] * 1024
    assert p["device"]["peak"] / 1e12 == pytest.approx(58.3, abs=0.05)
    assert 0.5 < p["predicted"]["mfu"] < 0.9
    flops = 854.8e6  # a token, with the positions of the table; the embedding is padded
    assert p["predicted"]["mfu"] == pytest.approx(flops * p["predicted"]["tokens_per_second"] / 58.3e12, rel=0.01)


SPEEDRUN = "--preset", "speedrun-124m", "--gpu", "rtx-4070", "--batch_size", "8", "--recompute", "cheap"


def test_the_speedrun_on_the_reference_card(capsys):
    p = planned(capsys, *SPEEDRUN)
    V, C, L = 50304, 768, 12
    assert p["parameters_by_part"] == {
        "token embedding": V * C, "positions": 0, "value embeddings": 6 * V * C, "output layer": V * C,
        "attention": L * 4 * C * C, "MLP": L * 8 * C * C, "norms": (2 * L + 1) * C,
    }  # fmt: skip
    of_muon = L * 12 * C * C
    memory = p["memory_by_part"]
    assert memory["moments, 32 bits"] == pytest.approx(8 * p["parameters"] - 4 * of_muon, rel=1e-3)
    assert memory["weights, fp32"] == memory["gradients, fp32"] == pytest.approx(4 * p["parameters"], rel=1e-3)
    assert p["fits"]
    assert p["predicted"]["others"] == {}  # nanoGPT does not have this model
    run = p["milestones"]["max_iters"]
    assert (run["tokens"], run["updates"]) == (3250 * 2**19, 3250)
    # Products and attention of GPT-2 124M: as fast as that, less what the larger optimizer takes.
    gpt2 = planned(capsys, "--preset", "gpt2-124m", *SPEEDRUN[2:])["predicted"]
    assert 0.9 * gpt2["tokens_per_second"] < p["predicted"]["tokens_per_second"] < gpt2["tokens_per_second"]
    assert p["predicted"]["update_seconds"] > gpt2["update_seconds"] + 0.02  # Newton-Schulz, 1.6 TFLOP, and 4 GB more


def test_a_ramp_takes_fewer_tokens_and_as_many_updates_of_the_optimizer(capsys):
    full, ramp = (planned(capsys, *SPEEDRUN, f"--batch_ramp={n}") for n in (0, 3000))
    assert (full["tokens_of_first_step"], ramp["tokens_of_first_step"]) == (2**19, 2**16)
    of_full, of_ramp = (p["milestones"]["max_iters"] for p in (full, ramp))
    assert of_full["updates"] == of_ramp["updates"] == 3250
    assert of_ramp["tokens"] == 2**19 * (1000 // 8 + 1000 // 4 + 1000 // 2 + 250)
    micro_steps = sum(ramp["predicted"]["micro_step_seconds_by_kind"].values()) * of_ramp["tokens"] / (8 * 1024)
    updates = 3250 * ramp["predicted"]["update_seconds"]
    assert 3600 * of_ramp["hours"] == pytest.approx(micro_steps + updates)
    assert ramp["predicted"]["tokens_per_second"] == full["predicted"]["tokens_per_second"]  # after the ramp
    assert "65,536 at first, all from update 3,000 on" in words(capsys, *SPEEDRUN, "--batch_ramp=3000")


def test_the_parts_are_the_whole(capsys):
    p = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")
    assert sum(p["parameters_by_part"].values()) == p["parameters"]
    assert sum(p["memory_by_part"].values()) == p["peak"]
    for part in ("weights, bf16", "weights, fp32", "gradients, fp32", "moments, 32 bits", "logits"):
        assert p["memory_by_part"][part] > 0


def test_the_same_model_at_another_width_is_another_size(capsys):
    text = words(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070", "--n_embd", "384")
    assert "40.56M parameters" in text


def test_milestones_are_chinchilla_the_run_and_a_budget(capsys):
    p = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070", "--tokens", "5B")
    chinchilla, run, budget = (p["milestones"][name] for name in ("Chinchilla", "max_iters", "budget"))
    assert chinchilla["tokens"] == 20 * p["parameters_without_positions"]
    assert run["tokens"] == 19_073 * 524_288
    assert run["tokens_per_parameter"] == pytest.approx(80.9, abs=0.05)
    assert budget["tokens"] == 5e9
    for milestone in (chinchilla, run, budget):
        assert milestone["hours"] == pytest.approx(milestone["tokens"] / p["predicted"]["tokens_per_second"] / 3600)


def test_less_memory_gets_a_smaller_micro_batch(capsys):
    full = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")
    small = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070", "--vram", "5GB")
    assert small["peak"] <= 5 * 2**30 < full["peak"]
    assert small["tokens_per_step"] == full["tokens_per_step"]
    assert all(choice["peak"] <= 5 * 2**30 for choice in small["choices"])


def test_a_micro_batch_that_was_asked_for_is_taken_and_may_not_fit(capsys):
    p = planned(capsys, "--preset", "gpt2-774m", "--gpu", "rtx-4070", "--batch_size", "64")
    assert (p["batch_size"], p["gradient_accumulation_steps"], p["recompute"]) == (64, 8, "block")
    assert not p["fits"]
    assert "more than there is" in words(capsys, "--preset", "gpt2-774m", "--gpu", "rtx-4070", "--batch_size", "64")


def rows(text):
    """The table of micro-batches: each row's mark, micro-batch, accumulation and recomputation."""
    lines = text[text.index("micro-batches that fit") :].splitlines()[2:]
    split = [line.removeprefix("*").split() for line in lines if line]
    return [(line.startswith("*"), int(row[0]), int(row[1]), row[2]) for line, row in zip(lines, split, strict=True)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset", "shakespeare-char-cpu"],  # 12: neither at most 8 nor a multiple of it
        ["--preset", "shakespeare-char"],
        ["--preset", "gpt2-124m"],
        ["--preset", "shakespeare-char", "--recompute", "block"],
        ["--preset", "gpt2-774m", "--batch_size", "64"],  # does not fit
    ],
    ids=" ".join,
)
def test_the_table_of_micro_batches_has_the_runs_own_once_and_marked(capsys, flags):
    p = planned(capsys, *flags, "--gpu", "rtx-4070")
    own = p["batch_size"], p["gradient_accumulation_steps"], p["recompute"]
    (choice,) = [choice for choice in p["choices"] if choice["planned"]]
    assert choice["peak"] == p["peak"]
    assert choice["tokens_per_second"] == p["predicted"]["tokens_per_second"]
    text = words(capsys, *flags, "--gpu", "rtx-4070")
    table = rows(text)
    assert [row for row in table if row[0]] == [(True, *own)]
    assert len({row[1:] for row in table}) == len(table)
    by_kind = [(["none", "cheap", "block"].index(kind), batch_size) for _, batch_size, _, kind in table]
    assert by_kind == sorted(by_kind)
    assert ("* this run's, which does not fit" in text) == (not p["fits"])


def test_the_error_of_the_model_is_said_beside_the_prediction(capsys, monkeypatch):
    errors = roofline.errors
    text = words(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")
    assert "prediction error where fastgpt was measured" in text
    assert "no GPU has been measured" in text or any(e.device.startswith("NVIDIA") for e in errors())
    monkeypatch.setattr(roofline, "errors", lambda: [])
    assert "prediction error unknown: no step of fastgpt has been measured" in words(
        capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070"
    )
    own = roofline.Error("NVIDIA GeForce RTX 4070", "gpt2-124m", 108.0, 100.0, 1, 1)
    monkeypatch.setattr(roofline, "errors", lambda: [own])
    assert "largest prediction error on this device: +8%" in words(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")


def test_what_others_have_measured_is_said_beside_the_prediction(capsys):
    flags = ["--preset", "gpt2-124m", "--gpu", "rtx-4070"]
    p, text = planned(capsys, *flags)["predicted"], words(capsys, *flags)
    low, high = p["interval"]
    assert low < p["tokens_per_second"] < high
    assert f"{low:,.0f} to {high:,.0f} with the error of nine of ten public programs" in text
    assert p["others"]["nanoGPT"] < p["others"]["nanoGPT, compiled"] < p["tokens_per_second"]
    assert f"{p['others']['nanoGPT, compiled']:,.0f} with torch.compile" in text
    assert "nanochat-d12-4070: 55,710 measured by others" in text
    assert "nanogpt-384w-4070" not in text  # not modelled


def test_the_readme_gives_what_is_predicted_for_the_reference_card(capsys):
    p = planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-4070")["predicted"]

    def thousands(rate):
        low, high = fit.interval(rate)
        return f"{rate / 1e3:.1f} ({low / 1e3:.1f} to {high / 1e3:.1f};"

    readme = " ".join((Path(__file__).parents[1] / "README.md").read_text().split())
    assert f"fastgpt {thousands(p['tokens_per_second'])} {p['mfu']:.0%}".replace("%", " %") in readme
    assert f"nanoGPT with torch.compile {thousands(p['others']['nanoGPT, compiled'])}" in readme
    assert f"nanoGPT as it comes {p['others']['nanoGPT'] / 1e3:.1f}." in readme
    assert fit.summary("judged") == "34 steps judged: mean error 3.6%, largest 17.7%"


def test_a_card_like_which_nobody_has_measured_any_gets_no_interval(capsys):
    text = words(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-3090")
    assert "no public step on such a card is known" in text
    assert "nine of ten public programs" not in text
    assert planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-3090")["predicted"]["interval"] is None
    assert (
        planned(capsys, "--preset", "gpt2-124m", "--gpu", "rtx-3090", "--dtype", "float16")["predicted"]["others"] == {}
    )


def test_the_public_points_are_printed_beside_their_predictions(capsys):
    text = words(capsys, "--points")
    assert all(len(line) <= 110 for line in text.splitlines())
    for c in fit.comparisons():
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [c.point["id"]]]
        assert line.split()[-1] == ("-" if c.error is None else f"{c.error:+.1%}")
    for cause in points.CAUSES:
        assert f"not modelled: {cause}" in text
    assert fit.summary("judged") in text
    on_a_card = words(capsys, "--points", "--gpu", "rtx-4070")
    assert "nanogpt-124m-4070" in on_a_card
    assert "4090" not in on_a_card


def test_a_cpu_is_planned_for_by_its_measured_ceilings(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "gemm_ceiling", lambda device, dtype: 2e11)
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device: 2e10)
    p = planned(capsys, "--preset", "quickstart", "--device", "cpu", "--dtype", "float32")
    assert p["device"]["gemm"] == 2e11
    assert p["predicted"]["mfu"] is None
    assert p["batch_size"] == 16
    assert p["peak"] == sum(p["memory_by_part"].values()) > p["memory_by_part"][plan.LOADED]
    assert p["memory_by_part"][plan.LOADED] > 50 << 20
    assert p["threads"] == torch.get_num_threads()
    assert "no MFU, because the device's peak is unknown" in words(capsys, "--preset", "quickstart", "--device", "cpu")


def test_on_a_cpu_the_limit_is_obeyed_and_told(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "gemm_ceiling", lambda device, dtype: 2e11)
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device: 2e10)
    monkeypatch.setattr(limits, "held", lambda: 300 << 20)  # a process that has run other tests holds more
    flags = ["--preset", "gpt2-30m", "--dataset", "stdlib", "--device", "cpu", "--dtype", "float32"]
    peaks = {}
    for gib in (64, 2):
        bound = limits.Bound(gib << 30, f"a box of {gib} GiB")
        monkeypatch.setattr(limits, "memory", lambda bound=bound: (bound._replace(source="inside"), bound))
        p = planned(capsys, *flags)
        assert p["memory_limit"] == "inside"
        assert p["peak"] <= p["memory"] <= bound.amount
        peaks[gib] = p["choices"][-1]["peak"]
        assert "GiB (inside)" in words(capsys, *flags)
    assert peaks[2] <= 2 << 30 < peaks[64]
    monkeypatch.setattr(limits, "memory", lambda: (limits.Bound(1 << 27, "a box"),) * 2)
    with pytest.raises(RequestError, match=r"one sequence of 1024 tokens does not fit into .* GiB \(a box\)"):
        plan.main(flags)


def test_lines_fit_a_terminal(capsys):
    for line in words(capsys, "--preset", "gpt2-1558m", "--gpu", "h100 80gb hbm3", "--state_bits", "8").splitlines():
        assert len(line) <= 110, line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "rtx-4071"], "4070"),
        (["--preset", "gpt2-1558m", "--gpu", "rtx-4070"], "one sequence of 1024 tokens does not fit into 12.0 GiB"),
        (["--preset", "gpt2-124m", "--gpu", "rtx-4070", "--vram", "some"], "such as 12GB"),
        (["--preset", "gpt2-124m", "--gpu", "rtx-4070", "--tokens", "lots"], "--tokens takes a count"),
        (["--preset", "gpt2-124m", "--gpu", "t4"], r"Tesla T4 has compute capability 7\.5, and the kernels need 8\.0"),
        (["--preset", "gpt2-124m", "--gpu", "v100-sxm2-32gb"], r"7\.0.* plain PyTorch, which is not predicted"),
        (["--preset", "gpt2-124m", "--gpu", "rtx-4070", "--total_batch_size", "500000"], "not a whole number"),
        (["--preset", "gpt2-124m", "--gpu", "rtx-4070", "--expect_params", "350M"], "123.59M parameters|124.37M"),
        (["--presett", "gpt2-124m"], "did you mean --preset"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(flags, said):
    with pytest.raises(RequestError, match=said):
        plan.main(flags)


@pytest.mark.parametrize(("number", "text"), [(2.47e9, "2.47B"), (38.63e6, "38.63M"), (9200, "9.20K"), (7, "7")])
def test_amounts_are_short(number, text):
    assert plan.amount(number) == text


def test_the_parts_of_a_model_are_those_that_it_has():
    from fastgpt.model import GPT

    for bias in (True, False):
        config = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65, bias=bias)
        model = GPT(config)
        assert config.n_params == sum(p.numel() for p in model.parameters())
        norms = sum(p.numel() for name, p in model.named_parameters() if "ln_" in name)
        attention = sum(p.numel() for name, p in model.named_parameters() if ".attn." in name)
        assert config.parameters_by_part["norms"] == norms
        assert config.parameters_by_part["attention"] == attention
