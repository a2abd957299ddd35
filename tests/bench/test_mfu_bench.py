"""``python -m bench.mfu``: end to end on a tiny model, and what its records say."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import contenders, largest, measured, mfu, profiling, steps
from bench.pages import tail
from bench.records import conditions
from fastgpt.errors import RequestError
from fastgpt.kernels.triton import launch
from fastgpt.train.predict import roofline, trace
from fastgpt.units import number

TINY = [
    "--preset", "quickstart", "--device", "cpu", "--n_layer", "1", "--n_head", "2", "--n_embd", "32",
    "--block_size", "16", "--vocab_size", "65", "--batch_size", "2", "--seconds", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def measurement(tmp_path_factory):
    """The record of a tiny model, in fp32, and its folder."""
    folder = tmp_path_factory.mktemp("mfu") / "a-device"
    flags = [*TINY, "--dtype", "float32", "--contenders", "fastgpt", "eager", "--accumulation", "2"]
    assert mfu.main([*flags, "--profile", "--loss_steps", "30", "--out", str(folder)]) == 0
    (path,) = folder.glob("mfu-*.json")
    (comparison,) = json.loads(path.read_text())["comparisons"]
    return comparison, path


def test_the_record_holds_what_was_measured(measurement):
    record, path = measurement
    assert path.name == f"mfu-quickstart-2x16-float32{conditions('cpu')}.json"
    ours, eager = (record["contenders"][name] for name in ("fastgpt", "eager"))
    for contender in (ours, eager):
        assert contender["readings"] == 3
        assert contender["tokens_per_s"] == pytest.approx(2 * 2 * 16 / (contender["ms"] / 1e3))
        assert contender["share_of_ceiling"] == pytest.approx(contender["rate"] / record["ceilings"]["gemm_flops"])
        assert contender["mfu"] is None  # the table of peaks has no CPUs
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-4)
    whole = json.loads(path.read_text())
    assert whole["commit"]
    assert "python -m bench.mfu --preset quickstart" in whole["command"]


def test_the_page_and_the_picture_are_written(measurement):
    record, path = measurement
    page = path.with_suffix(".md").read_text()
    assert f"| eager | {number(record['contenders']['eager']['ms'])} |" in page
    assert "dense peak" not in page  # a CPU's is not known
    assert "The plan predicts" in page
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_time_budget_names_the_kinds_of_kernels(measurement):
    budget = measurement[0]["contenders"]["fastgpt"]["time_budget_ms"]
    assert {"GEMM", "attention", "norm", "activation", "loss", "optimizer", "idle"} <= budget.keys()
    assert all(ms >= 0 for ms in budget.values())


def test_the_losses_fall_and_agree_with_fp32(measurement):
    curves = measurement[0]["loss_curves"]
    assert curves.keys() == {"fastgpt", "eager", "eager, fp32"}
    assert tail(curves["fastgpt"]) < curves["fastgpt"][0] - 0.05
    assert curves["fastgpt"] == pytest.approx(curves["eager, fp32"], rel=1e-4)


def test_a_record_becomes_a_row_for_the_error_of_the_plan(measurement):
    record, path = measurement
    (row,) = measured.rows(path.parents[1])
    assert row["record"] == f"a-device/{path.name}"
    assert row["ms"] == record["contenders"]["fastgpt"]["ms"]
    (error,) = roofline.errors([row])
    assert error.measured_ms == row["ms"]
    assert error.predicted_ms == pytest.approx(record["predicted"]["ms"])


def test_losses_that_disagree_are_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(contenders.AGREE, "float32", -1.0)
    flags = [*TINY, "--dtype", "float32", "--contenders", "fastgpt", "eager", "--out", str(tmp_path)]
    assert mfu.main(flags) == 1
    assert "disagree" in capsys.readouterr().out


def test_a_contender_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken(*args, **options):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(contenders.CONTENDERS, "eager", broken)
    assert mfu.main([*TINY, "--contenders", "fastgpt", "eager", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*.json")
    (record,) = json.loads(path.read_text())["comparisons"]
    assert record["contenders"]["eager"]["failure"] == "RuntimeError: no such kernel"
    assert record["contenders"]["fastgpt"]["ms"] > 0
    said = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in said
    assert "no baseline was timed to the end, so there is nothing to compare with" in said


def test_a_contender_that_fails_in_its_turn_keeps_its_times_and_the_others_train_on_the_same_tokens():
    seen = {"works": [], "fails": []}

    def update(name):
        def step(batches):
            if name == "fails" and len(seen[name]) == 2:
                raise RuntimeError("no more")
            seen[name].append(batches[0][0])
            return torch.tensor(1.0)

        return step

    contenders = {name: steps.Contender(update(name)) for name in seen} | {"out": steps.Contender(failure="before")}
    steps.take_turns(contenders, mfu.requested(mfu_flags()), 0.0, least=4)
    assert [len(c.ms) for c in contenders.values()] == [4, 2, 0]
    assert [c.failure for c in contenders.values()] == [None, "RuntimeError: no more", "before"]
    assert contenders["fails"].update is None
    assert all(torch.equal(a, b) for a, b in zip(seen["works"], seen["fails"], strict=False))


def test_a_run_without_baselines_is_not_a_failure(tmp_path):
    assert mfu.main([*TINY, "--contenders", "fastgpt", "--out", str(tmp_path)]) == 0


def test_the_table_is_printed_before_the_loss_curves(tmp_path, monkeypatch, capsys):
    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mfu, "loss_curve", cut_off)
    with pytest.raises(KeyboardInterrupt):
        mfu.main([*TINY, "--contenders", "fastgpt", "eager", "--loss_steps", "2", "--out", str(tmp_path)])
    assert "losses differ by at most" in capsys.readouterr().out
    assert list(tmp_path.glob("*.png"))


class Sizes:
    """A stand-in for a contender that fits up to so many sequences; records what was tried."""

    def __init__(self, monkeypatch, fits):
        self.tried, self.resets = [], 0
        monkeypatch.setattr(steps, "prepare", self.prepare)
        monkeypatch.setattr(steps, "take_turns", lambda contenders, *_, **__: contenders["compile"].ms.append(2.0))
        monkeypatch.setattr(steps, "release", self.release)
        self.fits = fits

    def prepare(self, name, request):
        self.tried.append(request.batch_size)
        if request.batch_size <= self.fits:
            return steps.Contender(update=len, peak_bytes=request.batch_size)
        return steps.Contender(failure="OutOfMemoryError: no more")

    def release(self):
        self.resets += 1


@pytest.mark.parametrize("guess", [1, 8, 30, 200])
def test_the_largest_micro_batch_is_found_from_any_guess_and_noted_after_every_try(monkeypatch, guess):
    sizes, notes = Sizes(monkeypatch, fits=40), []
    found = largest.largest("compile", mfu.requested(mfu_flags()), guess, lambda best: notes.append(best["batch_size"]))
    assert 36 <= found["batch_size"] <= 40
    assert notes == [max((n for n in sizes.tried[:i] if n <= 40), default=0) for i in range(1, len(notes) + 1)]
    assert len(sizes.tried) <= 16
    assert found["beyond"] == "OutOfMemoryError: no more"
    assert sizes.resets <= 1  # each would compile anew


def test_if_nothing_fits_the_largest_is_zero(monkeypatch):
    Sizes(monkeypatch, fits=0)
    found = largest.largest("compile", mfu.requested(mfu_flags()), 8, lambda best: None)
    assert (found["batch_size"], found["beyond"]) == (0, "OutOfMemoryError: no more")


def test_the_memory_of_cuda_itself_is_subtracted_from_the_limit(monkeypatch):
    fractions = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(largest, "largest", lambda name, request, guess, note: {"batch_size": 0, "beyond": "no"})
    record = {"largest": {}, "contenders": {"compile": {}}}
    largest.within(12.0, "compile", mfu.requested(mfu_flags()), record, lambda: None)
    assert fractions == [pytest.approx((12 - trace.CUDA_RESERVE / 2**30) / 80), 1.0]


@pytest.mark.parametrize(
    ("dtype", "accumulation", "left"),
    [
        (torch.bfloat16, 1, {"eager", "fastgpt", "compile", "compile, max-autotune", "strongest"}),
        (torch.bfloat16, 2, {"eager", "fastgpt", "compile"}),  # CUDA graphs would overwrite gradients
        (torch.float16, 1, {"fastgpt"}),  # without loss scaling it is no baseline
    ],
)
def test_contenders_that_would_train_incorrectly_are_left_out(dtype, accumulation, left, capsys):
    request = replace(mfu.requested(mfu_flags()), device=torch.device("cuda"), dtype=dtype, accumulation=accumulation)
    asked = ["eager", "fastgpt", "compile", "compile, max-autotune", "strongest"]
    assert set(mfu.taking_part(asked, request)) == left
    assert ("without" in capsys.readouterr().out) == (len(left) < len(asked))


def test_a_failure_of_ours_is_a_failure_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.CONTENDERS, "fastgpt", lambda *args, **options: 1 / 0)
    assert mfu.main([*TINY, "--contenders", "fastgpt", "eager", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--vram", "12GB", "--device", "cpu"], "there is none here"),
        (["--vram", "much"], "such as 12GB"),
        (["--vram", "0GB"], "such as 12GB"),
        (["--preset", "gpt2-124m", "--contenders", "fastgpt, no graphs", "--device", "cpu"], "none of these"),
        (["--n_head", "5", "--device", "cpu"], "n_head"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(flags, said):
    with pytest.raises(RequestError, match=said):
        mfu.main(flags)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_nn_n", "GEMM"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNN", "GEMM"),
        ("triton_tem_fused_mm_12", "GEMM"),
        ("triton_poi_fused_addmm_gelu_2", "activation"),
        ("triton_for_fused_0", "optimizer"),
        ("triton_per_fused_add_native_layer_norm_backward_5", "norm"),
        ("void cunn_SoftMaxForward<4, float>", "loss"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel", "norm"),
        ("void pytorch_flash::flash_bwd_kernel", "attention"),
        ("triton_poi_fused_gelu_3", "activation"),
        ("triton_poi_fused_mul_silu_4", "activation"),
        ("triton_poi_fused_pow_relu_5", "activation"),
        ("triton_per_fused__fused_rms_norm_6", "norm"),
        ("void at::native::vectorized_layer_norm_kernel", "norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("something_else", "other"),
    ],
)
def test_a_kernel_is_known_by_its_name(kernel, kind):
    assert profiling.kind_of(kernel) == kind


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("attention", "attention"), ("layer_norm", "norm"), ("rms_norm", "norm"), ("gelu", "activation"),
        ("relu2", "activation"), ("glu", "activation"), ("cross_entropy", "loss"),
        ("adamw", "optimizer"), ("columns", "norm"), ("embedding", "embedding"),
    ],
)  # fmt: skip
def test_our_kernels_are_known_by_their_names_in_a_profile(module, kind):
    kernels = vars(importlib.import_module(f"fastgpt.kernels.triton.{module}"))
    names = [launch.name_of(kernel.fn) for name, kernel in kernels.items() if name.endswith("_kernel")]
    assert names
    assert {profiling.kind_of(name) for name in names} == {kind}


def test_all_contenders_train_on_the_same_tokens():
    request = mfu.requested(mfu_flags())
    first, again = (next(request.batches()) for _ in range(2))
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
        assert torch.equal(x[:, 1:], y[:, :-1])


def mfu_flags():
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "batch_size")
    return SimpleNamespace(
        preset="quickstart", device="cpu", dtype="float32", accumulation=2, recompute=None, **dict.fromkeys(names)
    )
