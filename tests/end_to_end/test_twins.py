"""A misconfigured run, replayed on a small scale, and a twin without its faults.

The original run: "gpt2-124m" with n_embd=384, which has 40.56M parameters; dropout 0.1 on data seen once; a validation
loss below the training loss; 7.6 billion tokens, nearly ten times Chinchilla's number; "MFU 11 %" on an RTX 4070, of an
A100's peak. The replay is smaller by a factor of 2000, trains on the bytes of Python's standard library, and takes ten
seconds.
"""

import json
import re

import pytest

from fastgpt import hardware
from fastgpt.data.prepare import prepare
from fastgpt.gpus import find_gpu
from fastgpt.train import diagnose
from fastgpt.train.predict import roofline
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.train.settle import settle
from fastgpt.train.trainer import Trainer

N_UPDATES = 3800
SMALL = [
    "--dataset=stdlib", "--device=cpu", "--dtype=float32", "--n_layer=1", "--n_head=2", "--block_size=64",
    "--batch_size=16", "--gradient_accumulation_steps=1", "--learning_rate=3e-3", "--min_lr=3e-4",
    "--eval_interval=950", "--eval_iters=60", "--log_interval=10", "--warmup_iters=100",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare("stdlib", data_dir=folder)
    return folder


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch, capsys):
    """A function that trains and returns the output and the codes of the findings."""
    # Apply Chinchilla's law to models as small as these, and let the CPU pass for the original's RTX 4070.
    monkeypatch.setattr("fastgpt.train.diagnose.preflight.LAW_HOLDS_FROM", 0)
    monkeypatch.setattr("fastgpt.train.diagnose.preflight.SMALLEST_SUBWORD_VOCABULARY", 0)

    def train(*flags):
        flags = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", *flags]
        one = Trainer(settle(parse(flags, PRESETS)))
        monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: 58.3e12)
        monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA GeForce RTX 4070")
        assert one.train() == 0
        return capsys.readouterr().out, [finding.code for finding in one.monitor.findings]

    return train


def test_every_fault_of_the_run_is_named(run, tmp_path):
    length = [f"--max_iters={N_UPDATES}", f"--lr_decay_iters={N_UPDATES}"]
    said, codes = run("--preset=gpt2-124m", "--n_embd=32", "--dropout=0.1", *length)
    lines = said.splitlines()
    # 1: the size, in the first line
    assert re.match(r"gpt2-124m with n_layer=1, n_embd=32.*: 0\.02M parameters, not 124M", lines[0])
    # 2: dropout on data seen once
    assert re.search(r"of an epoch \(.* tokens\)\. No token is seen twice, so dropout prevents no overfitting", said)
    # 3: validation below training
    assert re.search(r"Dropout adds 0\.\d+ to the logged loss, so validation loss is 0\.\d+ below it", said)
    # 4: ten times the tokens
    times = float(re.search(r"per parameter, ([\d.]+) times Chinchilla's 20", said)[1])
    assert times == pytest.approx(N_UPDATES * 1024 / (20 * 20_608), rel=0.1)
    # 5: the peak that the MFU is relative to
    assert "of the NVIDIA GeForce RTX 4070's 58.3 TFLOP/s, dense" in said
    assert "nanoGPT, which divides by an A100's 312 on any device, would say" in said
    assert {"named-size", "dropout-on-fresh-data", "dropout-gap", "past-chinchilla"} <= set(codes)
    # each is printed when it is found, and again at the end
    for code in codes:
        records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        (found,) = [r for r in records if r["kind"] == "finding" and r["code"] == code]
        assert said.count(found["text"]) == 2


def test_the_clean_twin_has_no_fault(run):
    length = ["--max_iters=1600", "--lr_decay_iters=1600", "--eval_interval=400"]  # four times Chinchilla's tokens
    said, codes = run("--preset=quickstart", "--n_embd=32", *length)
    assert codes == []
    assert "findings:" not in said


def test_the_plan_of_the_original_says_what_it_is_not(data_dir):
    config = parse(["--preset=gpt2-124m", "--n_embd=384", "--dropout=0.1", "--max_iters=14500"], PRESETS)
    config = config.with_batch_size(16)
    facts = diagnose.Facts(config, config.gpt_config(50304), 9_035_582_198)
    found = {finding.code: finding.text for finding in diagnose.preflight.check(facts)}
    assert found["named-size"].startswith("gpt2-124m with n_embd=384: 40.56M parameters, not 124M")
    assert "of an epoch" in found["dropout-on-fresh-data"]
    assert "9.4 times Chinchilla's 20" in found["past-chinchilla"]
    assert roofline.machine(find_gpu("rtx-4070")).peak == pytest.approx(58.3e12, rel=1e-3)
