import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from fastgpt import hardware, json_files, units
from fastgpt.data.dataset import open_dataset
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import read_shard, write_shard
from fastgpt.errors import RequestError
from fastgpt.kernels import use_backend
from fastgpt.limits import Bound
from fastgpt.train import checkpoint, resume, spikes
from fastgpt.train.diagnose import DATA
from fastgpt.train.log import RunLog, read_metrics
from fastgpt.train.presets import PRESETS
from fastgpt.train.settle import settle
from fastgpt.train.step import LEAST_LOSS_SCALE, RecordingOutOfMemory
from fastgpt.train.trainer import Trainer
from tests.conftest import TINY


def losses(run):
    return {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl")["train"]}


def evaluations(run):
    return {record["step"]: record["val_loss"] for record in read_metrics(run / "metrics.jsonl")["eval"]}


def weights(run):
    return checkpoint.load_parameters(checkpoint.newest(run))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop_after(trainer, steps, number):
    """Have ``trainer`` receive a signal during its update number ``steps``."""
    update = trainer.update

    def interrupted():
        if trainer.step + 1 == steps:
            signal.raise_signal(number)
        return update()

    trainer.update = interrupted


# The entries of a model in checkpoints that know only GPT-2.
BEFORE_OPTIONS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")


# ---- what a run leaves behind ----


def test_a_run_leaves_its_configuration_metrics_checkpoint_and_plot(trainer, tmp_path):
    run = tmp_path / "run"
    assert trainer().train() == 0
    left = {"config.json", "metrics.jsonl", "checkpoints", "loss.png", "report.html"}
    assert {path.name for path in run.iterdir()} == left
    config = json.loads((run / "config.json").read_text())
    assert config["train"]["n_embd"] == config["model"]["n_embd"] == 16
    assert config["tokenizer"]["name"] == "char"
    assert list(losses(run)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(evaluations(run)) == [0, 4, 8]
    assert checkpoint.newest(run).name == "step-0000008"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_cannot_be_drawn_is_said_and_fails_no_run(trainer, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise ImportError("libjpeg: failed to map segment")

    monkeypatch.setattr("fastgpt.train.trainer.plot_losses", missing)
    assert trainer().train() == 0
    assert "no plot or no report: libjpeg: failed to map segment" in capsys.readouterr().out


def test_nothing_is_written_outside_the_run(trainer, data_dir, tmp_path, monkeypatch):
    before = files_of(data_dir)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    trainer().train()
    assert files_of(data_dir) == before
    assert list(elsewhere.iterdir()) == []


def test_metrics_add_up(trainer, tmp_path):
    trainer(gradient_accumulation_steps=3, log_interval=2, max_iters=5).train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")["train"]
    assert [record["step"] for record in records] == [2, 4, 5]  # the last step is always logged
    for record in records:
        assert record["tokens"] == record["step"] * 3 * 4 * 16
        assert record["tokens_per_s"] == pytest.approx(3 * 4 * 16 / (record["ms"] / 1e3))
        assert record["grad_norm"] > 0
        assert record["mfu"] is None  # no peak is known of a CPU
    # Warm-up over two updates to 1e-2: the third update is the first at the peak.
    assert records[0]["lr"] == pytest.approx(1e-2 * 2 / 3)


def test_the_batch_grows_over_the_ramp_and_every_number_knows_it(trainer, tmp_path, capsys):
    one = trainer(gradient_accumulation_steps=8, batch_ramp=3, max_iters=5, log_interval=2, dtype="float32")
    assert one.train() == 0
    micro_batch = 4 * 16
    sizes = [micro_batch * n for n in (1, 2, 4, 8, 8)]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")["train"]
    assert [record["tokens"] for record in records] == [sum(sizes[:step]) for step in (2, 4, 5)]
    for record, size in zip(records, (sum(sizes[:2]) / 2, sum(sizes[2:4]) / 2, sizes[4]), strict=True):
        assert record["tokens_per_s"] == pytest.approx(size / (record["ms"] / 1e3))
    assert one.tokens == sum(sizes) == one.batches.state_dict()["tokens_drawn"]
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).tokens == sum(sizes)
    said = capsys.readouterr().out
    assert "512 tokens a step (8 x 4 x 16), from 64 at the start to all of them at step 3, for 5 steps, 0.0M" in said
    assert one.settled.facts().total_tokens == sum(sizes)


def test_an_update_of_the_ramp_is_one_of_its_own_size(trainer, tmp_path):
    """Four updates of the ramp's sizes, each made by a run without a ramp that continues the one before."""
    flags = {"dtype": "float32", "decay_lr": False}
    trainer(out_dir=tmp_path / "ramp", gradient_accumulation_steps=8, batch_ramp=3, max_iters=4, **flags).train()
    for step, accumulation in enumerate((1, 2, 4, 8), start=1):
        start = {"init_from": "resume"} if step > 1 else {}
        flags |= {"gradient_accumulation_steps": accumulation, "max_iters": step}
        trainer(out_dir=tmp_path / "steps", **flags, **start).train()
    ramp, steps = (checkpoint.newest(tmp_path / name) for name in ("ramp", "steps"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ramp / name).read_bytes() == (steps / name).read_bytes(), name
    assert checkpoint.load_state(ramp).loader == checkpoint.load_state(steps).loader


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_resumed_within_the_ramp_ends_where_an_uninterrupted_one_does(trainer, tmp_path, stop):
    flags = {"gradient_accumulation_steps": 8, "batch_ramp": 5, "max_iters": 6, "optimizer": "muon", "dropout": 0.1}
    trainer(out_dir=tmp_path / "whole", **flags).train()
    trainer(out_dir=tmp_path / "parts", **{**flags, "max_iters": stop}).train()
    trainer(out_dir=tmp_path / "parts", init_from="resume", **flags).train()
    whole, parts = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    a, b = checkpoint.load_state(whole), checkpoint.load_state(parts)
    assert (a.step, a.tokens, a.loader) == (b.step, b.tokens, b.loader)


def test_where_memory_runs_out_within_the_ramp_every_update_keeps_its_tokens(trainer, tmp_path):
    flags = {"batch_size": "auto", "total_batch_size": 32 * 16, "batch_ramp": 3, "max_iters": 5, "dtype": "float32"}
    usual, small = trainer(**flags, out_dir=tmp_path / "usual"), trainer(**flags)
    for one in (usual, small):  # which a CPU would not choose
        one.config = one.config.with_batch_size(4)
        one.loaders["train"].batch_size = one.loaders["val"].batch_size = 4
    out_of_memory_above(small, 2, OUT_OF_MEMORY[0])
    assert usual.train() == small.train() == 0
    assert small.config.batch_size == 2
    assert small.tokens == usual.tokens == 16 * (4 + 8 + 16 + 32 + 32)
    expected, found = losses(tmp_path / "usual"), losses(tmp_path / "run")
    assert [found[step] for step in found] == pytest.approx([expected[step] for step in expected], rel=1e-4)


def test_the_loss_falls(trainer, tmp_path):
    trainer(max_iters=60, lr_decay_iters=60, eval_interval=30).train()
    run = tmp_path / "run"
    assert evaluations(run)[60] < evaluations(run)[0] - 0.4
    assert losses(run)[60] < losses(run)[1] - 0.4


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trainer, tmp_path):
    flags = {"max_iters": 3, "dropout": 0.1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer(out_dir=tmp_path / name, seed=seed, **flags).train()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not set(losses(tmp_path / "a").values()) & set(losses(tmp_path / "c").values())


def test_a_bfloat16_run_on_the_cpu_learns_as_a_float32_one_does(trainer, tmp_path):
    for dtype in ("float32", "bfloat16"):
        trainer(out_dir=tmp_path / dtype, dtype=dtype, max_iters=30, lr_decay_iters=30, eval_interval=30).train()
    full, half = (evaluations(tmp_path / dtype) for dtype in ("float32", "bfloat16"))
    assert half[30] < half[0] - 0.3
    assert half[30] == pytest.approx(full[30], rel=0.05)
    assert {tensor.dtype for tensor in weights(tmp_path / "bfloat16").values()} == {torch.float32}


# As a GPU, PyTorch on a CPU, our kernels there, and Python say it; and as CUDA, Triton and cuBLAS do.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no more"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("can't allocate memory for a tensor"),
    MemoryError(),
]


def out_of_memory_above(trainer, most, error=OUT_OF_MEMORY[0]):
    """Have the trainer's device hold micro-batches of at most so many sequences."""
    forward = trainer.train_step.forward

    def limited(x, y):
        if torch.is_grad_enabled() and len(x) > most:
            raise error
        return forward(x, y)

    trainer.train_step.forward = limited


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_where_memory_runs_out_micro_batches_shrink_and_an_update_keeps_its_tokens(trainer, tmp_path, capsys, error):
    flags = {"batch_size": "auto", "total_batch_size": 8 * 16, "dtype": "float32"}
    usual, small = trainer(**flags, out_dir=tmp_path / "usual"), trainer(**flags)
    for one in (usual, small):  # which a CPU would not choose
        one.config = one.config.with_batch_size(8)
        one.loaders["train"].batch_size = one.loaders["val"].batch_size = 8
        one.train_step.start_over(1)
    out_of_memory_above(small, 2, error)
    assert usual.train() == small.train() == 0
    assert small.config.batch_size == 2
    assert small.config.gradient_accumulation_steps == 4
    said = capsys.readouterr().out
    assert "out of memory: continuing with micro-batches of 4, 2 in an update of 128 tokens as before" in said
    assert "out of memory: continuing with micro-batches of 2, 4 in an update of 128 tokens as before" in said
    expected, found = losses(tmp_path / "usual"), losses(tmp_path / "run")
    assert [found[step] for step in found] == pytest.approx([expected[step] for step in expected], rel=1e-4)


def test_a_micro_batch_that_was_asked_for_is_kept_and_running_out_of_memory_ends_the_run_in_a_line(trainer):
    one = trainer()
    out_of_memory_above(one, 2)
    with pytest.raises(RequestError, match="out of memory with micro-batches of 4: a smaller --batch_size"):
        one.train()


def test_another_error_is_no_lack_of_memory(trainer):
    one = trainer(batch_size="auto", total_batch_size=6 * 16)
    out_of_memory_above(one, 0, RuntimeError("the shapes differ"))
    with pytest.raises(RuntimeError, match="the shapes differ"):
        one.train()


def test_an_evaluation_that_memory_does_not_hold_is_taken_in_smaller_parts(trainer, tmp_path, capsys):
    one = trainer(batch_size="auto", total_batch_size=4 * 16)
    one.config = one.config.with_batch_size(4)
    one.loaders["train"].batch_size = one.loaders["val"].batch_size = 4
    forward = one.train_step.forward

    def limited(x, y):
        if len(x) > 2:
            raise OUT_OF_MEMORY[1]
        return forward(x, y)

    one.train_step.forward = limited
    assert one.train() == 0
    assert one.config.batch_size == 2
    assert list(evaluations(tmp_path / "run")) == [0, 4, 8]


def test_an_evaluation_sees_the_same_tokens_whatever_the_micro_batch(trainer, tmp_path):
    """Or the losses before and after a halving, or of a run resumed on another device, could not be compared."""
    flags = {"total_batch_size": 4 * 16, "max_iters": 4}
    one = trainer(batch_size=4, **flags)
    seen = []
    one.model.register_forward_pre_hook(lambda model, args: seen.append(args) if not model.training else None)

    def evaluate(trainer):
        seen.clear()
        losses = trainer.evaluate("val")
        return losses, [torch.cat(part) for part in zip(*seen, strict=True)]

    losses, tokens = evaluate(one)
    one.train()
    trained = evaluate(one)[0]
    one.shrink_micro_batch(1)
    smaller_losses, smaller_tokens = evaluate(one)
    assert smaller_losses == pytest.approx(trained, rel=1e-3)  # of bf16
    assert len(smaller_losses) == len(losses) == 2

    resumed = trainer(batch_size=2, init_from="resume", **flags)
    resumed.model.register_forward_pre_hook(lambda model, args: seen.append(args) if not model.training else None)
    resumed_losses, resumed_tokens = evaluate(resumed)
    assert resumed_losses == pytest.approx(trained, rel=1e-3)
    for others in (smaller_tokens, resumed_tokens):
        assert all(torch.equal(ours, other) for ours, other in zip(tokens, others, strict=True))


@pytest.mark.parametrize("idle", [True, False])
def test_drawing_a_batch_while_a_gpu_is_at_work_is_not_told_as_waiting_for_data(trainer, monkeypatch, idle):
    one = trainer()
    told = []
    monkeypatch.setattr(one.monitor, "time_spent", lambda kind, seconds: told.append(kind))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: idle))
    monkeypatch.setattr(one, "device", torch.device("cuda"))
    one.update()
    assert told == [DATA] * idle


def test_where_a_graph_cannot_be_recorded_for_lack_of_memory_a_run_goes_on_without(
    trainer, tmp_path, monkeypatch, capsys
):
    """Recording takes somewhat more than the step before it, and the micro-batch that was asked for did fit that."""

    def full(function, pool):
        raise RecordingOutOfMemory("no more")

    monkeypatch.setattr("fastgpt.train.step.record_graph", full)
    usual, one = trainer(out_dir=tmp_path / "usual"), trainer()
    one.train_step.cuda_graphs = True
    assert usual.train() == one.train() == 0
    assert "out of memory while CUDA graphs were recorded: continuing without them" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "usual")


def test_an_evaluation_may_have_the_memory_of_the_recorded_graphs(trainer, monkeypatch, capsys):
    monkeypatch.setattr(
        "fastgpt.train.step.record_graph",
        lambda function, pool: SimpleNamespace(replay=function, pool=lambda: None),
    )
    one = trainer(eval_interval=2, batch_size="auto", total_batch_size=4 * 16)
    forward, evaluations = one.train_step.forward, []

    def limited(*args, **kwargs):
        if not torch.is_grad_enabled() and one.step == 2:
            evaluations.append(one.train_step.has_graphs)
            if one.train_step.has_graphs:
                raise OUT_OF_MEMORY[0]
        return forward(*args, **kwargs)

    one.train_step.forward = limited
    one.train_step.cuda_graphs = True
    batch_size = one.config.batch_size
    assert one.train() == 0
    assert one.config.batch_size == batch_size
    assert evaluations[:2] == [True, False]
    assert "out of memory" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux obeys ulimit -v")
@pytest.mark.parametrize("flag", ["--batch_size=auto", "--batch_size=64"])
def test_under_ulimit_v_memory_that_runs_out_is_an_error_that_the_run_survives_or_explains(data_dir, tmp_path, flag):
    """The limit is set once the micro-batch has been chosen: 64 sequences, of which each layer keeps 160 MiB."""
    code = """
import resource, sys
from pathlib import Path
from fastgpt.cli import run
from fastgpt.train import __main__ as command
from fastgpt.train.predict import micro_batch
from fastgpt.train.trainer import Trainer

def train(self, train=Trainer.train):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
    return train(self)

micro_batch.choose, Trainer.train = lambda found: max(found, key=lambda choice: choice.batch_size), train
run(command.main, sys.argv[1:])
"""
    length = ["--max_iters=1", "--warmup_iters=0", "--lr_decay_iters=1", "--eval_iters=1", "--device=cpu"]
    model = ["--n_layer=8", "--n_head=4", "--n_embd=256", "--block_size=256", "--dtype=float32"]
    total = [f"--total_batch_size={64 * 256}"] if flag.endswith("auto") else []
    done = subprocess.run(
        [sys.executable, "-c", code, "--dataset=words", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/run",
         *model, *length, flag, *total],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if flag.endswith("auto"):
        assert done.returncode == 0, done.stderr
        assert "out of memory: continuing with micro-batches of " in done.stdout
    else:
        assert done.returncode == 2, done.stderr
        assert "error: out of memory with micro-batches of 64: a smaller --batch_size" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_that_memory_does_not_hold_is_refused_in_a_line(monkeypatch, data_dir, tmp_path):
    from fastgpt.train import __main__ as command

    def full(config):
        raise OUT_OF_MEMORY[1]

    monkeypatch.setattr(command, "Trainer", full)
    with pytest.raises(RequestError, match=r"out of memory while the model was created \(.* GiB, .*\): a smaller"):
        command.main(["--dataset=words", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/run", "--device=cpu"])


def test_a_model_that_the_memory_cannot_hold_is_refused_before_it_is_made(trainer, monkeypatch):
    def with_memory(n_bytes, **flags):
        monkeypatch.setattr(hardware, "memory", lambda device: (Bound(n_bytes, "a box"),) * 2)
        trainer(**flags)

    parameters = trainer().settled.gpt_config.n_params
    with_memory(16 * parameters)
    with_memory(11 * parameters, state_bits=8)
    for n_bytes, state_bits in ((16 * parameters - 1, 32), (10 * parameters, 8)):
        with pytest.raises(
            RequestError, match=r"for weights, gradients and moments, .* MiB of this machine \(a box\)"
        ) as refused:
            with_memory(n_bytes, state_bits=state_bits)
        assert ("--state_bits 8" in str(refused.value)) == (state_bits == 32)  # no advice that is taken already


def test_a_model_that_fits_with_muons_single_moment_is_not_refused(trainer, monkeypatch):
    def with_memory(n_bytes, **flags):
        monkeypatch.setattr(hardware, "memory", lambda device: (Bound(n_bytes, "a box"),) * 2)
        trainer(**flags)

    model = trainer().settled.gpt_config
    enough = 16 * model.n_params - 4 * model.n_params_of_blocks
    with_memory(enough, optimizer="muon")
    with pytest.raises(RequestError, match=r"for weights, gradients and moments.*--state_bits 8$"):
        with_memory(enough - 1, optimizer="muon")
    with_memory(enough - 1, optimizer="muon", state_bits=8)


def test_an_automatic_micro_batch_makes_the_update_exact(trainer, tmp_path):
    one = trainer(batch_size="auto", total_batch_size=6 * 16)
    assert one.train() == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert config["batch_size"] * config["gradient_accumulation_steps"] * 16 == 6 * 16
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")["train"][-1]["tokens"] == 8 * 6 * 16


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_recomputing_more_or_less_gives_the_same_run_to_the_bit(trainer, tmp_path, recompute):
    for name, kind in (("usual", "auto"), ("other", recompute)):
        trainer(out_dir=tmp_path / name, recompute=kind, dropout=0.1).train()
    assert losses(tmp_path / "usual") == losses(tmp_path / "other")


def test_attentions_single_pass_is_asked_for_by_a_flag_and_changes_nothing_on_a_cpu(trainer, tmp_path):
    usual, other = trainer(out_dir=tmp_path / "usual"), trainer(out_dir=tmp_path / "other", deterministic=False)
    for one, expected in ((usual, True), (other, False)):
        assert {block.attn.deterministic for block in one.model.transformer.h} == {expected}
        assert one.train() == 0
    assert losses(tmp_path / "usual") == losses(tmp_path / "other")


@pytest.mark.filterwarnings("ignore:fastgpt runs on plain PyTorch")
def test_an_fp16_run_learns_and_keeps_its_loss_scale_when_resumed(trainer, tmp_path):
    one = trainer(dtype="float16", max_iters=4, lr_decay_iters=8)
    one.train_step.set_loss_scale(2.0**12, 7)
    assert one.train() == 0
    resumed = trainer(dtype="float16", init_from="resume")
    assert (resumed.train_step.loss_scale, resumed.train_step.updates_since_overflow) == (2.0**12, 11)
    assert resumed.train() == 0
    found = losses(tmp_path / "run")
    assert found[8] < found[1]


def test_a_gpu_tells_of_an_update_when_the_next_one_is_under_way(trainer, monkeypatch):
    """All but those after which it has to stop anyway: every fourth, for an evaluation."""
    one = trainer(device="cpu")
    update, told, order = one.update, RunLog.train, []

    def noted():
        order.append(f"update {one.step + 1}")
        return update()

    monkeypatch.setattr(one, "update", noted)
    monkeypatch.setattr(RunLog, "train", lambda self, **v: (order.append(f"line {v['step']}"), told(self, **v))[1])
    monkeypatch.setattr(one, "log_late", True)
    assert one.train() == 0
    quarter = "update {0} update {1} line {0} update {2} line {1} update {3} line {2} line {3}"
    assert " ".join(order) == " ".join([quarter.format(1, 2, 3, 4), quarter.format(5, 6, 7, 8)])


@pytest.mark.parametrize("poisoned", [False, True])
def test_the_last_update_before_a_stop_is_logged_and_a_diverged_one_not_saved(trainer, monkeypatch, tmp_path, poisoned):
    """On a GPU too, where updates are logged late."""
    one = trainer()
    monkeypatch.setattr(one, "log_late", True)
    stop_after(one, 3, signal.SIGTERM)
    update = one.update

    def poison():
        if poisoned and one.step + 1 == 3:
            with torch.no_grad():
                one.train_step.store.master.fill_(float("nan"))
            one.train_step.store.refresh()
        return update()

    one.update = poison
    assert one.train() == (1 if poisoned else 128 + signal.SIGTERM)
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert checkpoint.steps(tmp_path / "run") == ([] if poisoned else [3])


def test_without_clipping_the_gradient_norm_is_logged_too(trainer, tmp_path):
    norms = []
    for grad_clip in (0, 1e9):
        trainer(grad_clip=grad_clip, max_iters=1, overwrite=True).train()
        norms.append(read_metrics(tmp_path / "run" / "metrics.jsonl")["train"][0]["grad_norm"])
    assert norms[0] == norms[1] > 0


# ---- batches and evaluation ----


def test_two_micro_batches_are_one_batch_of_twice_the_size(trainer, tmp_path):
    # Without biases: the gradient of a key's bias is nothing but rounding, which AdamW blows up to full size.
    flags = {"bias": False, "dtype": "float32"}
    whole = trainer(out_dir=tmp_path / "a", batch_size=8, **flags)
    halves = trainer(out_dir=tmp_path / "b", batch_size=4, gradient_accumulation_steps=2, **flags)
    for _ in range(2):  # the loader draws the same blocks either way, so the runs see the same tokens
        x, _ = whole.loaders["train"].next()
        parts = [halves.loaders["train"].next()[0] for _ in range(2)]
        assert torch.equal(x, torch.cat(parts))
    for one in (whole, halves):
        one.train()
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a == pytest.approx(b, rel=1e-5)
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "b")[name], rtol=1e-3, atol=1e-5)


def test_evaluating_more_often_does_not_disturb_training(trainer, tmp_path):
    for name, interval in (("rarely", 8), ("often", 1)):
        trainer(out_dir=tmp_path / name, dropout=0.3, eval_interval=interval, checkpoint_interval=8).train()
    assert len(evaluations(tmp_path / "often")) == 9
    assert len(evaluations(tmp_path / "rarely")) == 2
    assert losses(tmp_path / "often") == losses(tmp_path / "rarely")
    assert evaluations(tmp_path / "often")[8] == evaluations(tmp_path / "rarely")[8]


def test_evaluation_is_without_dropout_and_repeatable(trainer, tmp_path):
    dropping = trainer(out_dir=tmp_path / "a", dropout=0.5)
    plain = trainer(out_dir=tmp_path / "b", dropout=0.0)
    assert dropping.evaluate("val") == dropping.evaluate("val") == plain.evaluate("val")
    assert dropping.evaluate("train") != dropping.evaluate("val")
    assert dropping.model.training


def test_evaluation_leaves_no_gradient(trainer):
    one = trainer()
    one.evaluate("val")
    assert one.train_step.store.grad.count_nonzero() == 0


def test_the_best_checkpoint_stays_and_earlier_ones_go(trainer, tmp_path):
    one = trainer(eval_interval=2, keep_checkpoints=1)
    scripted = iter([9.0, 3.0, 1.0, 2.0, 4.0])  # at steps 0, 2, 4, 6, 8
    one.evaluate = lambda split: [next(scripted) if split == "val" else 5.0]
    one.train()
    assert checkpoint.steps(tmp_path / "run") == [4, 8]
    state = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))
    assert (state.best_step, state.best_val_loss) == (4, 1.0)


def test_checkpoints_can_be_more_frequent_than_evaluations(trainer, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(args[1].step) or save(*args))
    trainer(checkpoint_interval=3).train()
    assert saved == [3, 6, 8]


def test_the_best_is_chosen_among_the_steps_that_have_a_checkpoint(trainer, tmp_path):
    one = trainer(eval_interval=1, checkpoint_interval=2, keep_checkpoints=1)
    scripted = iter([9.0, 8.0, 5.0, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0])  # step 3 is best, but is not saved
    one.evaluate = lambda split: [next(scripted) if split == "val" else 5.0]
    one.train()
    assert checkpoint.steps(tmp_path / "run") == [2, 8]
    state = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))
    assert (state.best_step, state.best_val_loss) == (2, 5.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_diverged_run_fails_in_one_line_and_saves_nothing(trainer, tmp_path, capsys, dtype):
    one = trainer(dtype=dtype)
    with torch.no_grad():
        one.train_step.store.master.fill_(float("nan"))
    one.train_step.store.refresh()
    assert one.train() == 1
    assert "has diverged" in capsys.readouterr().out
    assert checkpoint.steps(tmp_path / "run") == []


def poison(one, steps):
    """Let the gradients of these updates be NaN."""
    update = one.train_step.update

    def poisoned():
        if one.step + 1 in steps:
            one.train_step.store.grad[3] = float("nan")
        update()

    one.train_step.update = poisoned


@pytest.mark.parametrize("log_interval", [1, 4])
def test_an_update_whose_gradients_are_not_finite_is_skipped_and_reported(trainer, tmp_path, capsys, log_interval):
    one = trainer(log_interval=log_interval)
    poison(one, {2, 3})
    assert one.train() == 0
    said = capsys.readouterr().out
    assert "skipped: gradients were not finite" in said
    assert ("2 updates up to step 4 skipped" in said) == (log_interval == 4)
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).skipped == 2


def test_the_place_in_the_data_of_a_skipped_update_is_told(trainer, data_dir, tmp_path, capsys):
    one = trainer(log_interval=4, gradient_accumulation_steps=2)
    poison(one, {2, 3})
    drawn, draw = [], one.loaders["train"].next

    def noted():
        batch = draw()
        drawn.append(batch[0])
        return batch

    one.loaders["train"].next = noted
    assert one.train() == 0
    findings = read_metrics(tmp_path / "run" / "metrics.jsonl")["finding"]
    (record,) = [finding for finding in findings if finding["code"] == "skipped"]
    file = data_dir / "words" / "train_000000.bin"
    tokens = read_shard(file)
    assert [[name, tokens[at : at + 16].tolist()] for name, at in record["blocks"]] == [
        [str(file), row] for row in torch.cat(drawn[4:6]).tolist()
    ]
    told = f"The last one, step 3, was of {file} at token {record['blocks'][0][1]:,} and 7 other blocks"
    assert told in record["text"]
    assert told in capsys.readouterr().out


def test_a_spike_is_skipped_and_reported_and_a_resumed_run_remembers_what_came_before(
    trainer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(spikes, "WINDOW", 4)
    for name, parts in (("whole", [8]), ("parts", [4, 8])):
        for i, last in enumerate(parts):
            start = "resume" if i else "scratch"
            one = trainer(out_dir=tmp_path / name, max_iters=last, init_from=start, skip_spikes=5.0)
            update = one.train_step.update

            def spike(one=one, update=update):
                if one.step == 5:
                    one.train_step.store.grad *= 1000.0
                update()

            one.train_step.update = spike
            assert one.train() == 0
        said = capsys.readouterr().out
        assert "1 update up to step 6 skipped: loss or gradient norm more than 5 standard deviations above" in said
    whole, parts = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    states = [checkpoint.load_state(path) for path in (whole, parts)]
    assert states[0].spike_window == states[1].spike_window
    assert [(state.skipped, state.spikes) for state in states] == [(1, 1), (1, 1)]


def test_a_resumed_run_counts_the_skipped_updates_as_an_uninterrupted_one_does(trainer, tmp_path):
    for name, parts in (("whole", [8]), ("parts", [4, 8])):
        for i, last in enumerate(parts):
            one = trainer(out_dir=tmp_path / name, max_iters=last, init_from="resume" if i else "scratch")
            poison(one, {2, 3, 6})
            assert one.train() == 0
    whole, parts = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert [checkpoint.load_state(path).skipped for path in (whole, parts)] == [3, 3]


def test_after_too_many_skipped_updates_in_a_row_the_run_ends_with_the_weights_from_before(trainer, tmp_path, capsys):
    one = trainer(max_skipped_updates=3)
    poison(one, {2, 4, 5, 6, 7, 8})
    assert one.train() == 1
    said = capsys.readouterr().out
    assert "the gradients of 3 updates in a row were not finite, up to step 6: the run ends." in said
    assert checkpoint.steps(tmp_path / "run")[-1] == 6
    other = trainer(out_dir=tmp_path / "other")
    poison(other, {2, 4, 5, 6})
    stop_after(other, 6, signal.SIGTERM)
    other.train()
    saved, expected = (checkpoint.newest(tmp_path / name) / "model.safetensors" for name in ("run", "other"))
    assert saved.read_bytes() == expected.read_bytes()


def test_after_skipped_updates_no_earlier_checkpoint_is_removed(trainer, tmp_path):
    """The weights may be ruined although they are finite."""
    one = trainer(max_skipped_updates=4, checkpoint_interval=1, keep_checkpoints=1)
    poison(one, {4, 5, 6, 7})
    assert one.train() == 1
    assert {3, 4, 5, 6, 7} <= set(checkpoint.steps(tmp_path / "run"))


def test_too_many_skipped_updates_between_two_logged_ones_are_noticed(trainer):
    one = trainer(max_skipped_updates=4, log_interval=8)
    poison(one, {4, 5, 6, 7})
    assert one.train() == 1


def test_a_row_of_skipped_updates_goes_on_in_a_resumed_run(trainer, tmp_path):
    one = trainer(max_iters=5)
    poison(one, {4, 5})
    assert one.train() == 0
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).skipped_in_a_row == 2
    two = trainer(init_from="resume", max_skipped_updates=3)
    poison(two, {6})
    assert two.train() == 1
    assert checkpoint.steps(tmp_path / "run")[-1] == 6


def test_an_fp16_run_whose_gradients_are_never_finite_ends(trainer, tmp_path, capsys):
    one = trainer(dtype="float16", max_iters=60, lr_decay_iters=60, max_skipped_updates=5)
    micro_step = one.train_step.micro_step

    def poisoned(batch):
        micro_step(batch)
        one.train_step.store.grad[3] = float("nan")

    one.train_step.micro_step = poisoned
    assert one.train() == 1
    assert "the gradients of 5 updates in a row were not finite" in capsys.readouterr().out
    assert one.train_step.loss_scale == LEAST_LOSS_SCALE


def test_a_best_checkpoint_that_the_disk_refuses_is_not_the_best(trainer, tmp_path, monkeypatch):
    fill_disk(monkeypatch, {2, 3})  # the second attempt to save, and once more with less on the disk
    one = trainer(eval_interval=2, keep_checkpoints=1)
    scripted = iter([9.0, 5.0, 1.0, 7.0, 6.0])  # at steps 0, 2, 4, 6, 8
    one.evaluate = lambda split: [next(scripted) if split == "val" else 5.0]
    assert one.train() == 0
    assert checkpoint.steps(tmp_path / "run") == [2, 8]
    state = checkpoint.load_state(checkpoint.newest(tmp_path / "run"))
    assert (state.best_step, state.best_val_loss) == (2, 5.0)


# ---- damaged data ----


def test_a_token_outside_the_vocabulary_ends_the_run_with_a_checkpoint_of_the_updates_before(trainer, tmp_path):
    whole = trainer(out_dir=tmp_path / "whole", max_iters=3)
    whole.train()
    one = trainer()
    draw, drawn = one.loaders["train"].next, []

    def bad():
        drawn.append(1)
        if len(drawn) == 4:
            raise RequestError("shard 0 has the token 51000")
        return draw()

    one.loaders["train"].next = bad
    with pytest.raises(RequestError, match="51000"):
        one.train()
    assert checkpoint.steps(tmp_path / "run") == [3]
    a, b = (checkpoint.newest(tmp_path / name) / "model.safetensors" for name in ("run", "whole"))
    assert a.read_bytes() == b.read_bytes()


def test_nothing_is_saved_of_data_that_have_been_found_to_be_damaged(trainer, tmp_path, monkeypatch):
    one = trainer()
    stop_after(one, 3, signal.SIGTERM)
    update = one.update

    def found():
        if one.step == 2:
            monkeypatch.setattr(one.shards, "check", damaged)
        return update()

    def damaged():
        raise RequestError("train_000000.bin is damaged")

    one.update = found
    with pytest.raises(RequestError, match="is damaged"):
        one.train()
    assert checkpoint.steps(tmp_path / "run") == []


# ---- when to save, evaluating only, other weights to start from ----


def test_checkpoints_may_be_saved_only_if_the_loss_is_the_best(trainer, tmp_path, monkeypatch):
    losses = iter([[3.0], [3.0], [2.0], [2.0], [2.5], [2.5], [1.5], [1.5], [1.6], [1.6]])
    one = trainer(eval_interval=2, always_save_checkpoint=False, keep_checkpoints=9)
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: saved.append(args[1].step) or save(*args))
    one.evaluate = lambda split: next(losses)
    assert one.train() == 0
    assert saved == [2, 6, 8]  # the last one always


def test_evaluating_only_trains_nothing_and_saves_nothing(trainer, tmp_path):
    assert trainer(eval_only=True).train() == 0
    assert list(evaluations(tmp_path / "run")) == [0]
    assert losses(tmp_path / "run") == {}
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_is_only_evaluated_stays_as_it_is(trainer, tmp_path):
    trainer(max_iters=4).train()
    before = files_of(tmp_path / "run" / "checkpoints")
    assert trainer(max_iters=4, init_from="resume", eval_only=True).train() == 0
    assert files_of(tmp_path / "run" / "checkpoints") == before


@pytest.mark.parametrize("block_size", [16, 9])
def test_a_run_starts_from_the_weights_of_a_model_and_is_resumed_as_any_other(trainer, tmp_path, block_size):
    trainer(n_embd=24, n_head=3, bias=True).train()
    source = weights(tmp_path / "run")
    source["transformer.wpe.weight"] = source["transformer.wpe.weight"][:block_size]
    tuned = {
        name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd", "bias", "block_size")
    }

    def fine(**flags):
        start = {"init_from": tmp_path / "run", "out_dir": tmp_path / "fine", "block_size": block_size}
        return trainer(only=tuned, **{**start, **flags})

    one = fine(max_iters=3)
    for name, p in one.train_step.store.named(one.train_step.store.master).items():
        assert torch.equal(p, source[name]), name
    assert (one.config.n_embd, one.config.bias, one.step) == (24, True, 0)
    assert one.train() == 0
    assert fine(init_from="resume").train() == 0
    fine(out_dir=tmp_path / "whole").train()
    ours, whole = weights(tmp_path / "fine"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_a_model_that_does_not_fit_is_refused(trainer, tmp_path, data_dir):
    trainer().train()
    tuned = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd")}
    start = {"only": tuned, "init_from": tmp_path / "run", "out_dir": tmp_path / "fine"}
    with pytest.raises(RequestError, match=r"--block_size 17 is longer than the context of .*run, 16"):
        trainer(**start, block_size=17)
    prepare("text", [data_dir / "words.txt"], tokenizer="byte", name="bytes", data_dir=data_dir)
    with pytest.raises(RequestError, match="reads char tokens, and bytes has byte tokens"):
        trainer(**start, dataset="bytes")
    with pytest.raises(RequestError, match=r"there is no scratc: .*did you mean scratch"):
        trainer(init_from="scratc")


# ---- what a process writes about itself ----


def test_every_process_notes_its_start_and_its_end(trainer, tmp_path):
    trainer(max_iters=3).train()
    two = trainer(init_from="resume")
    stop_after(two, 6, signal.SIGTERM)
    two.train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records["start"]] == [0, 3]
    assert [(end["step"], end["status"], end["reason"]) for end in records["end"]] == [
        (3, 0, "done"), (6, 143, "stopped by SIGTERM")
    ]  # fmt: skip
    start, end = records["start"][0], records["end"][0]
    dtype = units.dtype_name(two.dtype)  # fp32 on a CPU without instructions for bf16
    assert (start["torch"], start["dtype"], start["threads"]) == (torch.__version__, dtype, 1)
    assert start["parameters"] == two.settled.gpt_config.n_params
    assert start["dataset"]["id"] == two.settled.dataset.identity
    assert 0 < end["seconds"] < 3600
    assert end["peak_bytes"] > 50e6


# ---- a full disk ----


def fill_disk(monkeypatch, at_saves):
    """Let these attempts to save fail for lack of room, counted from 1."""
    write, attempts = checkpoint.save_file, iter(range(1, 1000))

    def full(content, path, **options):
        if path.name == "model.safetensors" and next(attempts) in at_saves:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(content, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)


def test_a_checkpoint_that_the_disk_refuses_is_told_and_the_run_goes_on(trainer, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, {2, 3})
    assert trainer(checkpoint_interval=2).train() == 0
    said = capsys.readouterr().out
    assert "no checkpoint at step 4: Error while serializing: I/O error: No space left on device" in said
    assert "no checkpoint at step 6" in said
    assert checkpoint.steps(tmp_path / "run") == [2, 8]


def test_if_the_disk_refuses_the_last_checkpoint_the_run_fails_in_one_line(trainer, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, {2})
    assert trainer(checkpoint_interval=4).train() == 1
    assert "the checkpoint of step 8 could not be written (Error while" in capsys.readouterr().out
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-0000004", "latest", "best"}


def test_a_run_trains_on_while_a_checkpoint_is_written(trainer, tmp_path, monkeypatch):
    write, written_until = checkpoint.save_file, threading.Event()
    one = trainer(checkpoint_interval=2)
    update = one.update

    def slow(content, path, **options):
        if path.parent.name.startswith("step-0000002"):
            assert written_until.wait(60)
        write(content, path, **options)

    def go():
        if one.step == 3:  # the update after the next one: the checkpoint of step 2 is still not there
            assert checkpoint.steps(tmp_path / "run") == []
            written_until.set()
        return update()

    monkeypatch.setattr(checkpoint, "save_file", slow)
    one.update = go
    assert one.train() == 0
    trainer(out_dir=tmp_path / "other", checkpoint_interval=2).train()
    assert checkpoint.steps(tmp_path / "run") == checkpoint.steps(tmp_path / "other")
    for step in checkpoint.steps(tmp_path / "run"):
        ours, others = (checkpoint.folder(tmp_path / name, step) / "model.safetensors" for name in ("run", "other"))
        assert ours.read_bytes() == others.read_bytes()


def slow_disk(monkeypatch, seconds):
    write = checkpoint.save_file

    def slow(content, path, **options):
        time.sleep(seconds)
        write(content, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)


def test_a_run_ends_only_when_its_last_checkpoint_is_on_the_disk(trainer, tmp_path, monkeypatch):
    """Also if there was nothing left to train: a signal came in the last evaluation, which the resumed run repeats."""
    one = trainer()
    evaluate = one.evaluate

    def stopped(split):
        if one.step == 8:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(split)

    one.evaluate = stopped
    assert one.train() == 143
    slow_disk(monkeypatch, 0.3)
    two = trainer(init_from="resume")
    two.evaluate = lambda split: [0.5, 0.5]
    assert two.train() == 0
    assert two.writer.idle
    assert checkpoint.load_state(checkpoint.newest(tmp_path / "run")).best_step == 8


def test_a_run_that_is_interrupted_at_once_keeps_its_lock_while_it_still_writes(trainer, tmp_path, monkeypatch):
    write, seen = checkpoint.save_file, threading.Event()

    def waiting(content, path, **options):
        assert seen.wait(60)
        write(content, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", waiting)
    one = trainer(checkpoint_interval=2)
    update = one.update

    def interrupted():
        if one.step == 3:
            raise KeyboardInterrupt
        return update()

    one.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert not one.writer.idle
    with pytest.raises(RequestError, match="is in use by process"):
        trainer(init_from="auto")
    seen.set()
    one.writer.wait()
    one.lock.until_exit = False
    one.lock.__exit__()


def test_an_update_that_memory_does_not_hold_gets_that_of_the_checkpoints_copies(trainer, tmp_path, capsys):
    one = trainer(checkpoint_interval=2)
    micro_step = one.train_step.micro_step

    def limited(batch):
        if one.writer.has_copies:
            raise OUT_OF_MEMORY[0]
        micro_step(batch)

    one.train_step.micro_step = limited
    assert one.train() == 0
    assert "out of memory" not in capsys.readouterr().out
    trainer(out_dir=tmp_path / "other", checkpoint_interval=2).train()
    ours, others = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert all(torch.equal(ours[name], others[name]) for name in others)


def test_skipped_updates_that_a_killed_run_had_not_told_are_told_by_the_resumed_one(trainer, tmp_path, capsys):
    one = trainer(log_interval=8, checkpoint_interval=4)
    poison(one, {2})
    update = one.update

    def killed():
        if one.step == 5:
            one.writer.wait()
            raise KeyboardInterrupt
        return update()

    one.update = killed
    with pytest.raises(KeyboardInterrupt):
        one.train()
    capsys.readouterr()
    assert trainer(log_interval=8, init_from="resume").train() == 0
    assert "1 update up to step 8 skipped: gradients were not finite" in capsys.readouterr().out


def test_in_fp16_a_spike_is_told_with_its_own_place(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "WINDOW", 3)
    one = trainer(dtype="float16", skip_spikes=5.0, log_interval=8)
    update = one.train_step.update

    def changed():
        if one.step + 1 == 6:
            one.train_step.store.grad *= 1000.0
        if one.step + 1 == 7:
            one.train_step.store.grad[3] = float("inf")
        update()

    one.train_step.update = changed
    one.train()
    (record,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl")["finding"] if r["code"] == "skipped"]
    assert record["text"].startswith("1 update up to step 8 skipped: loss or gradient norm")
    assert "The last one, step 6," in record["text"]


def test_why_a_run_diverged_is_told_also_if_the_disk_is_full(trainer, monkeypatch, capsys):
    one = trainer(max_skipped_updates=2)
    poison(one, {2, 3})
    fill_disk(monkeypatch, {1, 2, 3})
    assert one.train() == 1
    said = capsys.readouterr().out
    assert (
        "the gradients of 2 updates in a row were not finite, up to step 3: the run ends. The weights could not" in said
    )


def test_a_checkpoints_folder_that_is_a_link_can_be_replaced(trainer, tmp_path):
    trainer(max_iters=2).train()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert trainer(max_iters=2, overwrite=True).train() == 0
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert (tmp_path / "elsewhere" / "step-0000002").is_dir()  # what a link leads to is not touched
    assert not (tmp_path / "run" / "checkpoints").is_symlink()


def test_a_run_that_fails_leaves_the_checkpoint_that_was_being_written(trainer, tmp_path, monkeypatch):
    write = checkpoint.save_file

    def slow(content, path, **options):
        time.sleep(0.3)
        write(content, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    one = trainer(checkpoint_interval=2)
    update = one.update

    def fail():
        if one.step == 2:
            raise RuntimeError("a fault in the program")
        return update()

    one.update = fail
    with pytest.raises(RuntimeError, match="a fault"):
        one.train()
    assert checkpoint.steps(tmp_path / "run") == [2]


def test_on_a_signal_too(trainer, tmp_path, monkeypatch, capsys):
    fill_disk(monkeypatch, {1})
    one = trainer()
    stop_after(one, 3, signal.SIGTERM)
    assert one.train() == 1
    assert "the checkpoint of step 3 could not be written" in capsys.readouterr().out


def limit_disk(monkeypatch, one, checkpoints):
    """Let the disk have room for so many checkpoints of a run."""
    free = int(checkpoints * checkpoint.n_bytes(one.settled.gpt_config, 32, "adamw")) + 1
    usage = shutil.disk_usage(".")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize(("room", "warned"), [(4, False), (3.9, True)])
def test_a_run_says_so_if_the_disk_will_be_full(trainer, monkeypatch, capsys, room, warned):
    one = trainer(checkpoint_interval=2)  # two of the newest, the best one, and one that is being written
    limit_disk(monkeypatch, one, room)
    assert one.train() == 0
    assert ("free, and the run will write 4 checkpoints of " in capsys.readouterr().out) == warned


def test_a_run_without_room_for_a_checkpoint_is_refused_and_nothing_is_removed(trainer, tmp_path, monkeypatch):
    trainer(n_layer=1).train()
    before = files_of(tmp_path / "run")
    one = trainer(overwrite=True, n_embd=128)  # the old run's bytes count as free, but are too few
    limit_disk(monkeypatch, one, 0)
    with pytest.raises(RequestError, match=r"the disk of .* has .* free, and a checkpoint takes .*: make room"):
        one.train()
    assert {p: content for p, content in files_of(tmp_path / "run").items() if p.name != ".lock"} == before
    again = trainer(overwrite=True, max_iters=2)  # of the same size
    limit_disk(monkeypatch, again, 0)
    assert again.train() == 0


def test_a_checkpoint_takes_the_bytes_that_were_foretold(trainer, tmp_path):
    for bits in (32, 8):
        one = trainer(state_bits=bits, out_dir=tmp_path / f"run{bits}", max_iters=1)
        one.train()
        files = checkpoint.newest(tmp_path / f"run{bits}").iterdir()
        taken = sum(path.stat().st_size for path in files)
        assert 0 < taken - checkpoint.n_bytes(one.settled.gpt_config, bits, "adamw") < 20_000  # heads, random state
    one = trainer(optimizer="muon", out_dir=tmp_path / "muon", max_iters=1)
    one.train()
    taken = sum(path.stat().st_size for path in checkpoint.newest(tmp_path / "muon").iterdir())
    model = one.settled.gpt_config
    assert 0 < taken - checkpoint.n_bytes(model, 32, "muon") < 20_000


# ---- resuming ----


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"state_bits": 8}, {"optimizer": "muon", "muon_learning_rate": 0.01}, {"optimizer": "muon", "state_bits": 8}],
    ids=str,
)
@pytest.mark.parametrize("flags", [{}, {"dropout": 0.2, "gradient_accumulation_steps": 2, "dtype": "bfloat16"}])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trainer, tmp_path, flags, optimizer):
    flags = {**flags, **optimizer}
    trainer(out_dir=tmp_path / "whole", **flags).train()
    trainer(out_dir=tmp_path / "parts", max_iters=3, **flags).train()
    torch.rand(7)  # whatever the process did in between
    trainer(out_dir=tmp_path / "parts", init_from="resume", seed=99, **flags).train()  # every seed comes with the state
    whole, parts = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    a, b = checkpoint.load_state(whole), checkpoint.load_state(parts)
    assert (a.step, a.tokens, a.loader) == (b.step, b.tokens, b.loader)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert evaluations(tmp_path / "whole")[8] == evaluations(tmp_path / "parts")[8]


@pytest.mark.parametrize("preset", ["modern-124m", "speedrun-124m"])
def test_a_modern_preset_trains_as_it_is_but_for_its_size(data_dir, tmp_path, preset):
    from fastgpt.train import __main__ as command

    tiny = {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "total_batch_size": 256, "max_iters": 30,
        "lr_decay_iters": 30, "warmup_iters": 3, "eval_interval": 15, "eval_iters": 2,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in tiny.items()]
    run = tmp_path / "run"
    where = ["--dataset=words", f"--data_dir={data_dir}", f"--out_dir={run}", "--device=cpu"]
    assert command.main([f"--preset={preset}", *flags, *where]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["train"]["optimizer"], config["train"]["schedule"]) == ("muon", "wsd")
    assert evaluations(run)[30] < evaluations(run)[0] - 0.4


def test_a_model_beyond_gpt2_is_trained_and_resumed_as_any_other(trainer, tmp_path):
    flags = {
        "positions": "rotary", "norm": "rms", "qk_norm": True, "mlp": "relu2", "n_kv_head": 1, "tied": False,
        "softcap": 15.0, "window": 4, "zero_init": True, "value_embeddings": True, "optimizer": "muon",
        "schedule": "wsd",
    }  # fmt: skip
    trainer(out_dir=tmp_path / "whole", **flags).train()
    trainer(out_dir=tmp_path / "parts", max_iters=3, **flags).train()
    trainer(out_dir=tmp_path / "parts", init_from="resume", **flags).train()
    whole, parts = (checkpoint.newest(tmp_path / name) for name in ("whole", "parts"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    assert evaluations(tmp_path / "whole")[8] < evaluations(tmp_path / "whole")[0]
    with pytest.raises(RequestError, match=r"cannot resume.*mlp=relu2.*the request is"):
        trainer(out_dir=tmp_path / "parts", init_from="resume", **{**flags, "mlp": "swiglu"})


def test_a_checkpoint_of_before_there_were_options_is_resumed(trainer, tmp_path):
    trainer(max_iters=3).train()
    file = checkpoint.newest(tmp_path / "run") / "state.json"
    content = json_files.read(file)
    later = [name for name in content["model"] if name not in BEFORE_OPTIONS]
    for name in later:
        del content["model"][name]
    del content["optimizer"]
    json_files.write(file, content)
    (file.parent / "manifest.json").unlink()
    trainer(init_from="resume").train()
    assert checkpoint.steps(tmp_path / "run")[-1] == 8
    assert "positions" in later


def test_the_best_checkpoint_of_before_the_interruption_stays(trainer, tmp_path):
    for steps, scripted in ((4, [9.0, 1.0, 2.0]), (8, [3.0, 4.0])):  # at steps 0, 2, 4; at 6, 8
        losses = iter(scripted)
        start = "resume" if steps == 8 else "scratch"
        one = trainer(eval_interval=2, max_iters=steps, init_from=start, keep_checkpoints=1)
        one.evaluate = lambda split, losses=losses: [next(losses) if split == "val" else 5.0]
        one.train()
    assert checkpoint.steps(tmp_path / "run") == [2, 8]


def test_resuming_a_finished_run_changes_nothing_it_has_learnt(trainer, tmp_path):
    trainer().train()
    before = weights(tmp_path / "run")
    assert trainer(init_from="resume").train() == 0
    assert checkpoint.steps(tmp_path / "run")[-1] == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "run").items())


def test_a_resume_with_another_architecture_names_both_shapes(trainer, tmp_path):
    trainer(max_iters=1).train()
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=r"cannot resume.*n_layer=1, n_head=2.*the request is n_layer=2, n_head=4"):
        trainer(init_from="resume", n_layer=2, n_head=4)
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resume_with_moments_of_other_bits_says_which_to_pass(trainer, tmp_path, bits):
    trainer(max_iters=1, state_bits=bits).train()
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=rf"cannot resume: .* moments of {bits} bits; pass --state_bits {bits}$"):
        trainer(init_from="resume", state_bits=40 - bits)
    assert files_of(tmp_path / "run") == before


@pytest.mark.parametrize("before", ["adamw", "muon"])
def test_a_resume_with_another_optimizer_says_which_to_pass(trainer, tmp_path, before):
    trainer(max_iters=1, optimizer=before).train()
    files = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=rf"cannot resume: .* the state of {before}; pass --optimizer {before}$"):
        trainer(init_from="resume", optimizer={"adamw": "muon", "muon": "adamw"}[before])
    assert files_of(tmp_path / "run") == files


def test_a_run_with_muon_learns(trainer, tmp_path):
    trainer(
        optimizer="muon", muon_learning_rate=0.02, max_iters=30, lr_decay_iters=30, eval_interval=30
    ).train()  # fmt: skip
    losses = evaluations(tmp_path / "run")
    assert losses[30] < losses[0] - 0.3


def test_a_checkpoint_of_eight_bits_has_codes_and_scales_by_parameter(trainer, tmp_path):
    one = trainer(state_bits=8, max_iters=2)
    one.train()
    moments = checkpoint.load_moments(checkpoint.newest(tmp_path / "run"))
    assert moments.keys() == {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"}
    for kind, named in moments.items():
        assert named.keys() == weights(tmp_path / "run").keys()
        for name, parameter in weights(tmp_path / "run").items():
            scale = kind.endswith("_scale")
            assert named[name].dtype == (torch.float32 if scale else torch.uint8)
            assert named[name].shape == ((-(-parameter.numel() // 256),) if scale else parameter.shape)
            assert named[name].count_nonzero() > 0, (kind, name)


def test_a_run_with_moments_of_eight_bits_learns_as_one_with_fp32_moments_does(trainer, tmp_path):
    for bits in (32, 8):
        trainer(
            out_dir=tmp_path / str(bits), state_bits=bits, max_iters=30, lr_decay_iters=30, eval_interval=30
        ).train()
    full, compact = (evaluations(tmp_path / str(bits)) for bits in (32, 8))
    assert compact[30] < compact[0] - 0.3
    assert compact[30] == pytest.approx(full[30], rel=0.05)


def test_a_resume_may_change_dropout_and_the_learning_rate(trainer, tmp_path):
    trainer(max_iters=2).train()
    trainer(init_from="resume", dropout=0.4, learning_rate=5e-3).train()
    assert checkpoint.newest(tmp_path / "run").name == "step-0000008"


def test_nothing_to_resume_is_a_wrong_request_that_leaves_no_folder(trainer, tmp_path):
    with pytest.raises(RequestError, match="holds no checkpoint"):
        trainer(init_from="resume")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_a_wrong_request(trainer, tmp_path):
    trainer(max_iters=1).train()
    file = checkpoint.newest(tmp_path / "run") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"no checkpoint that can be used: .*model.safetensors is damaged"):
        trainer(init_from="resume")


def test_a_checkpoint_of_a_version_that_drew_batches_otherwise_is_refused_and_left_alone(trainer, tmp_path):
    trainer(max_iters=1).train()
    file = checkpoint.newest(tmp_path / "run") / "state.json"
    json_files.write(file, json_files.read(file) | {"loader": {"rng": 1}})
    (file.parent / "manifest.json").unlink()  # such a version had none
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=r"cannot resume: .*another version"):
        trainer(init_from="resume")
    assert files_of(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_resumed(trainer, tmp_path, capsys):
    trainer(out_dir=tmp_path / "whole", max_iters=8).train()
    one = trainer(eval_interval=4)
    scripted = iter([9.0, 1.0, 2.0])  # at steps 0, 4, 8: the checkpoint of step 4 is the best, and stays
    one.evaluate = lambda split: [next(scripted) if split == "val" else 5.0]
    one.train()
    assert checkpoint.steps(tmp_path / "run") == [4, 8]
    file = checkpoint.newest(tmp_path / "run") / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    assert trainer(init_from="resume").train() == 0
    said = capsys.readouterr().out
    assert f"{file} is damaged: its SHA-256 is not the one in manifest.json: resuming from " in said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    newest = checkpoint.newest(tmp_path / "run")
    assert all(
        torch.equal(t, weights(tmp_path / "whole")[name]) for name, t in checkpoint.load_parameters(newest).items()
    )


# ---- folders ----


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_left_alone(trainer, tmp_path):
    trainer(max_iters=1).train()
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=r"already holds a run: pass --overwrite.*--init_from resume"):
        trainer(max_iters=2)
    assert files_of(tmp_path / "run") == before


def test_overwriting_replaces_the_run_and_nothing_else_in_its_folder(trainer, tmp_path):
    run = tmp_path / "run"
    trainer(max_iters=3).train()
    (run / "notes.txt").write_text("mine")
    (run / "plots").mkdir()
    (run / "plots" / "a.png").write_text("also mine")
    trainer(max_iters=1, overwrite=True).train()
    assert list(losses(run)) == [1]
    assert checkpoint.steps(run) == [1]
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "plots" / "a.png").read_text() == "also mine"


def test_a_wrong_request_with_overwrite_leaves_the_earlier_run_alone(trainer, tmp_path):
    trainer(max_iters=1).train()
    before = files_of(tmp_path / "run")
    for flags in ({"n_head": 3}, {"block_size": 10_000_000}, {"dataset": "nowhere"}, {"device": "tpu"}):
        with pytest.raises(RequestError):
            trainer(overwrite=True, **flags)
    assert files_of(tmp_path / "run") == before


def test_a_folder_with_other_things_in_it_may_hold_a_run(trainer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert trainer(max_iters=1).train() == 0


def test_a_file_cannot_be_a_run(trainer, tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(RequestError, match="is a file"):
        trainer()


# ---- requests that this machine or dataset cannot meet ----


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"device": "tpu"}, "--device takes cpu, cuda, cuda:N or auto, not 'tpu'"),
        ({"device": "meta"}, "--device meta is not supported"),
        ({"device": "cuda:99"}, "PyTorch sees [0-9]+ CUDA devices"),
        ({"backend": "triton"}, "backend 'triton' cannot run torch.b?float[0-9]+ on cpu"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
        ({"block_size": 1_000_000}, "training split of words has [0-9]+ tokens, too few"),
        ({"expect_params": "124M"}, "this model has 0.00M"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(trainer, tmp_path, flags, said):
    with use_backend(flags.get("backend", "auto")), pytest.raises(RequestError, match=said):
        trainer(**flags)
    assert not (tmp_path / "run").exists()


def test_a_run_below_a_file_is_refused(trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write to --out_dir"):
        trainer(out_dir=tmp_path / "file" / "run").train()


def test_large_vocabularies_are_padded(trainer, data_dir, tmp_path):
    tokens = open_dataset("words", data_dir).train[0]
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.bin", tokens[:500])
    assert trainer(dataset=tmp_path / "train.bin").settled.gpt_config.vocab_size == 50304  # of a bare file, GPT-2's
    assert trainer().settled.gpt_config.vocab_size == open_dataset("words", data_dir).vocab_size


# ---- stopping early ----


def test_a_time_limit_ends_the_run_with_a_checkpoint_to_go_on_from(trainer, tmp_path):
    run = tmp_path / "run"
    trainer(out_dir=tmp_path / "whole").train()
    assert trainer(max_hours=1e-9).train() == 0
    assert checkpoint.steps(run) == [1]
    trainer(init_from="resume", max_hours=0).train()
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(trainer, tmp_path, number, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    trainer(out_dir=tmp_path / "whole").train()
    one = trainer()
    stop_after(one, 3, number)
    assert one.train() == 128 + number
    assert checkpoint.steps(tmp_path / "run") == [3]
    assert f"stopped by {number.name} at step 3" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    trainer(init_from="resume").train()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_after_a_signal_in_the_last_step_the_resumed_run_only_evaluates(trainer, tmp_path):
    trainer(out_dir=tmp_path / "whole").train()
    one = trainer()
    stop_after(one, 8, signal.SIGTERM)
    assert one.train() == 128 + signal.SIGTERM
    assert checkpoint.steps(tmp_path / "run")[-1] == 8
    assert 8 not in evaluations(tmp_path / "run")
    assert trainer(init_from="resume").train() == 0
    assert (tmp_path / "run" / "loss.png").exists()
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("flags", [{}, {"dropout": 0.2, "dtype": "bfloat16"}])
def test_a_signal_between_micro_batches_is_heard_there_and_the_update_is_done_anew(trainer, tmp_path, flags):
    flags = {**flags, "gradient_accumulation_steps": 4}
    trainer(out_dir=tmp_path / "whole", **flags).train()
    one = trainer(**flags)
    drawn, next_batch = [], one.batches.next

    def interrupted():
        drawn.append(1)
        if len(drawn) == 10:  # the second micro-batch of the third update
            signal.raise_signal(signal.SIGTERM)
        return next_batch()

    one.batches.next = interrupted
    assert one.train() == 128 + signal.SIGTERM
    assert len(drawn) == 10
    assert checkpoint.steps(tmp_path / "run") == [2]
    assert trainer(init_from="resume", **flags).train() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_in_an_evaluation_is_heard_between_its_batches_and_the_resumed_run_makes_up_for_it(
    trainer, tmp_path, step
):
    flags = {"eval_iters": 5}
    trainer(out_dir=tmp_path / "whole", **flags).train()
    one = trainer(**flags)
    seen, forward = [], one.train_step.forward

    def interrupted(x, y):
        if one.step == step and not one.model.training:
            seen.append(1)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGTERM)
        return forward(x, y)

    one.train_step.forward = interrupted
    assert one.train() == 128 + signal.SIGTERM
    assert len(seen) == 2
    assert one.model.training
    assert checkpoint.steps(tmp_path / "run") == [step]
    assert trainer(init_from="resume", **flags).train() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "run") == evaluations(tmp_path / "whole")
    whole, parts = (checkpoint.load_state(checkpoint.newest(tmp_path / name)) for name in ("whole", "run"))
    assert (whole.best_step, whole.best_val_loss) == (parts.best_step, parts.best_val_loss)


# ---- what a resumed run takes over ----


def test_a_resumed_run_takes_its_own_flags_and_lists_those_that_differ(trainer, data_dir, tmp_path, capsys):
    trainer(max_iters=2, dropout=0.1).train()
    capsys.readouterr()
    run = tmp_path / "run"
    config = resume.parse(["--init_from=resume", f"--out_dir={run}", "--learning_rate=0.005", "--max_iters=4"], PRESETS)
    assert (config.n_embd, config.dropout, config.learning_rate, config.max_iters) == (16, 0.1, 0.005, 4)
    assert config.dataset == "words"
    assert config.data_dir == str(data_dir)
    assert Trainer(settle(config)).train() == 0
    said = capsys.readouterr().out
    assert "changed since the run was started: max_iters 4 (was 2), learning_rate 0.005 (was 0.01)" in said


def test_a_micro_batch_that_was_left_to_the_device_is_settled_anew(trainer, tmp_path):
    trainer(batch_size="auto", total_batch_size=6 * 16, max_iters=1).train()
    config = resume.parse(["--init_from=resume", f"--out_dir={tmp_path / 'run'}"], PRESETS)
    assert (config.batch_size, config.total_batch_size, config.recompute) == (None, 96, "auto")


def test_auto_starts_a_run_and_later_resumes_it(trainer, data_dir, tmp_path):
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    flags += ["--dataset=words", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", "--init_from=auto"]
    trainer(out_dir=tmp_path / "whole").train()
    for max_hours in (1e-9, 1e-9, 0):
        assert Trainer(settle(resume.parse([*flags, f"--max_hours={max_hours}"], PRESETS))).train() == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_auto_starts_anew_where_a_run_ended_before_its_first_checkpoint(trainer, tmp_path):
    trainer(max_iters=1).train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    config = resume.parse(["--init_from=auto", f"--out_dir={tmp_path / 'run'}"], PRESETS)
    assert (config.init_from, config.overwrite) == ("scratch", True)


def test_auto_does_not_start_anew_where_a_checkpoint_lost_its_name_in_a_crash(trainer, tmp_path):
    trainer(max_iters=1).train()
    path = checkpoint.newest(tmp_path / "run")
    path.rename(path.with_name(path.name + ".old"))
    config = resume.parse(["--init_from=auto", f"--out_dir={tmp_path / 'run'}"], PRESETS)
    assert (config.init_from, config.overwrite) == ("resume", False)
    assert checkpoint.newest(tmp_path / "run") == path


def test_a_run_in_which_another_process_saved_meanwhile_is_refused(trainer, tmp_path):
    trainer(max_iters=4).train()
    late = trainer(init_from="resume")
    trainer(init_from="resume").train()
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match=r"another process has trained in .* meanwhile; start again"):
        late.train()
    assert {path: content for path, content in files_of(tmp_path / "run").items() if path.name != ".lock"} == before


def test_other_data_of_the_same_vocabulary_is_refused(trainer, data_dir, tmp_path):
    trainer(max_iters=1).train()
    before = files_of(tmp_path / "run")
    (tmp_path / "other.txt").write_text((data_dir / "words.txt").read_text()[::-1])
    prepare("text", [tmp_path / "other.txt"], tokenizer="char", data_dir=tmp_path)
    with pytest.raises(RequestError, match=r"cannot resume: .* was trained on .*words .*other .* is other data"):
        trainer(init_from="resume", dataset="other", data_dir=tmp_path)
    assert files_of(tmp_path / "run") == before


def test_the_same_data_in_another_place_is_the_same_data(trainer, data_dir, tmp_path):
    trainer(max_iters=1).train()
    shutil.copytree(data_dir / "words", tmp_path / "moved" / "words")
    assert trainer(init_from="resume", data_dir=tmp_path / "moved").train() == 0


def test_a_run_that_is_past_its_last_step_is_refused(trainer, tmp_path):
    trainer(max_iters=4).train()
    before = files_of(tmp_path / "run")
    with pytest.raises(RequestError, match="the run is at step 4 already, and --max_iters is 2"):
        trainer(init_from="resume", max_iters=2)
    assert files_of(tmp_path / "run") == before


def test_a_second_signal_ends_the_run_at_once(trainer, monkeypatch):
    monkeypatch.setattr("fastgpt.train.stop.SAME_CTRL_C", -1.0)
    one = trainer()
    one.update = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_killed_process_exits_with_128_plus_the_signal_and_a_checkpoint(data_dir, tmp_path):
    run = tmp_path / "run"
    flags = [
        "--dataset=words", f"--data_dir={data_dir}", f"--out_dir={run}", "--max_iters=1000000", "--eval_iters=1",
        "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--log_interval=1",
        "--device=cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgpt.train", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "FASTGPT_BACKEND": "reference"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        metrics = run / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
    state = checkpoint.load_state(checkpoint.newest(run))
    assert state.step == max(losses(run)) >= 1
    assert Path(checkpoint.newest(run), "model.safetensors").stat().st_size > 1000
