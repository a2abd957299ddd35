"""The fuzzers in their short form, after what they once found, and that they notice what they are there to notice."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import strategies as st

from bench.robustness import fuzz, fuzz_files, fuzz_kernels
from bench.robustness.fuzz_kernels import Call, Floats, Indices, Steps, Wrong
from fastgpt import kernels
from fastgpt.errors import RequestError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("fuzzer", fuzz.FUZZERS)
def test_what_once_failed_and_a_few_new_examples_show_no_fault(fuzzer):
    command = [sys.executable, "-m", "bench.robustness.fuzz", fuzzer, "--examples", "30", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" examples, 0 faults\n")


# ---- what is noticed ----


def test_a_fault_is_reported_once_and_small(tmp_path, capsys):
    def check(n):
        if n >= 7:
            raise ValueError("too large")

    search = fuzz.Search(check, tmp_path / "journal")
    for number in range(3):
        search.draw(st.integers(0, 1000), number, 50)
    said = capsys.readouterr().out
    assert said.count("FAULT ValueError at test_fuzz.py:") == 1
    assert "\n  7\n" in said
    assert search.n_examples >= 100  # of the second and third


def child(code):
    """What is seen of a process that runs this, with the path of its journal in ``journal``."""
    return fuzz.watch([sys.executable, "-c", f"import os, sys, time; journal = sys.argv[1]; {code}"], hang=1.0)


def test_a_crash_is_seen_with_its_example():
    n, found = child("open(journal, 'w').write('an example'); os.abort()")
    assert n == 0
    assert len(found) == 1
    assert found[0].startswith("CRASH with status -6\n  an example")


def test_a_hang_is_seen_with_its_example():
    _, found = child("open(journal, 'w').write('an example'); time.sleep(60)")
    assert found == ["HANG for 1 s\n  an example"]


def test_faults_and_the_number_of_examples_are_read_from_what_the_child_says():
    assert child("print('FAULT one\\nhere\\nFAULT two\\nDONE 12')") == (12, ["FAULT one\nhere", "FAULT two"])


X, WEIGHT = Floats((3, 8)), Floats((5, 8))
GOOD = [
    Call("linear", {"x": X, "weight": WEIGHT, "bias": None}, dout="reversed"),
    Call("layer_norm", {"x": Floats((3, 8), "bfloat16", "every other"), "weight": None, "bias": None, "eps": 1e-5}),
    Call("cross_entropy", {"logits": X, "targets": Indices((3,), 8, (9,)), "ignore_index": 9}),
    Call(
        "cross_entropy",
        {
            "logits": X,
            "targets": Indices((3,), 8),
            "weight": Floats((8,), asks=False),
            "softcap": 1,
            "reduction": "none",
        },
    ),
    Call("cross_entropy", {"logits": X, "targets": Indices((3,), 8), "label_smoothing": Wrong("2")}),  # refused
    Call("linear", {"x": X, "weight": Wrong("nan"), "bias": None}),  # refused
    Steps((X,), (X,), {"max_grad_norm": 1.0}, {"grad_scale": 0.5}),
    Steps((), (), {}, {}),  # refused by torch.optim
]


@pytest.mark.parametrize("example", GOOD, ids=range(len(GOOD)))
def test_results_and_refusals_are_no_faults(example):
    fuzz_kernels.check(example)


def wrong_result(x, weight, bias=None):
    return torch.nn.functional.linear(x, weight, bias) * (1 + 1e-3 * (x.dtype == torch.float32))


def wrong_gradient(x, weight, bias=None):
    y = torch.nn.functional.linear(x, weight, bias)
    return y - x[..., :1] + x[..., :1].detach() if x.dtype == torch.float32 else y


def unnamed(x, weight, bias=None):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def other_error(x, weight, bias=None):
    raise KeyError("x: is not there")


def one_backend_refuses(x, weight, bias=None):
    if kernels.dispatch.backend_of("cpu", torch.float32)[1] == "chosen":
        raise ValueError("x: not here")
    return torch.nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("function", [wrong_result, wrong_gradient, unnamed, other_error, one_backend_refuses])
def test_a_call_that_goes_wrong_is_a_fault(monkeypatch, function):
    monkeypatch.setattr(kernels, "linear", function)
    with pytest.raises(KeyError if function is other_error else fuzz_kernels.Fault):
        fuzz_kernels.check(GOOD[0])


def says(text):
    def main(argv):
        print(text)
        return 1

    return main


def raises(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize("main", [says("the weights are not finite"), raises(RequestError("x")), raises(SystemExit(0))])
def test_a_refusal_a_diverged_run_and_help_are_no_faults(monkeypatch, main):
    monkeypatch.setitem(fuzz_files.COMMANDS, "train", main)
    fuzz_files.command("train")


@pytest.mark.parametrize(
    ("main", "fault"),
    [
        (says("nothing"), fuzz_files.Fault),
        (raises(RequestError("two\nlines")), fuzz_files.Fault),
        (raises(RequestError("")), fuzz_files.Fault),
        (raises(SystemExit(2)), fuzz_files.Fault),
        (raises(OSError("too long")), OSError),
    ],
)
def test_any_other_end_of_a_command_is_a_fault(monkeypatch, main, fault):
    monkeypatch.setitem(fuzz_files.COMMANDS, "train", main)
    with pytest.raises(fault):
        fuzz_files.command("train")


@pytest.mark.parametrize(
    ("edit", "suffix", "changed"),
    [
        (fuzz_files.Entry(1, "set", 7), ".json", b'{\n "a": 1,\n "b": 7\n}'),
        (fuzz_files.Entry(0, "remove"), ".json", b'{\n "b": {\n  "c": 2\n }\n}'),
        (fuzz_files.Entry(0, "rename", "d"), ".json", b'{\n "b": {\n  "c": 2\n },\n "d": 1\n}'),
        (fuzz_files.Entry(0, "add", "d"), ".json", b'{\n "a": 1,\n "b": {\n  "c": 2\n },\n "d": 1\n}'),
        (fuzz_files.Bytes(1, "over", b"xy"), ".json", b'{xy": 1, "b": {"c": 2}}'),
        (fuzz_files.Bytes(1, "between", b"xy"), ".json", b'{xy"a": 1, "b": {"c": 2}}'),
        (fuzz_files.Bytes(1, "cut"), ".json", b"{"),
    ],
)
def test_every_edit_changes_a_file(edit, suffix, changed):
    found = fuzz_files.edited(b'{"a": 1, "b": {"c": 2}}', edit, suffix)
    assert found == changed
