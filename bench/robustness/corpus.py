"""Examples on which a fuzzer once failed; each is checked before any is drawn."""

from dataclasses import replace

from bench.robustness.fuzz_files import SMALL, Damage, Entry, Line
from bench.robustness.fuzz_kernels import Call, Floats, Steps, Wrong

ONE, HALF = Floats((1,)), Floats((1,), "bfloat16")
LONG = "x" * 300  # than a file's name may be

EXAMPLES = {
    "kernels": [
        # float64's own gradient was wrong, with a mean rounded to fp32
        Call(
            "add_layer_norm",
            {"x": ONE, "residual": replace(ONE, fill="large"), "weight": None, "bias": None, "eps": 1e-12},
            "contiguous",
        ),
        # an error that named no argument
        Steps((replace(ONE, shape=(), layout="negative"),), (replace(ONE, shape=()),), {}, {}, 1),
        Steps((HALF,), (HALF,), {"stochastic_rounding": Wrong("text")}, {}, 1),
        Steps((ONE,), (ONE,), {}, {"zero_grad": Wrong("text")}, 1),
    ],
    "files": [
        Damage("run/config.json", (Entry(at=0, how="rename", value="é\n"),)),  # an error of two lines
        Damage("run/metrics.jsonl", "folder"),
        Damage("d/train_000000.bin", "folder"),
        Damage("bare/val.bin", "folder"),
        Line("data", ("prepare", 20 * LONG)),
        Line("data", ("prepare", "text", "{folder}/text.txt", "--data_dir={folder}/made", f"--name={LONG}")),
        Line("train", (*SMALL, f"--dataset={LONG}")),
        Line("train", (*SMALL, f"--data_dir={{folder}}/{LONG}")),
        Line("train", (*SMALL, f"--out_dir={{folder}}/{LONG}")),
        Line("train", (*SMALL, f"--out_dir={{folder}}/{LONG}", "--init_from=auto")),
        Line("train", (*SMALL, "--n_head=9999999999")),  # divisors were looked for up to there
        Line("train", (*SMALL, "--n_layer=1000000")),  # made until memory ran out
        Line("plan", (*SMALL, "--gpu=rtx-4070", f"--n_embd=1{30 * '0'}")),
        Line("plan", (*SMALL, "--gpu=rtx-4070", "--tokens=1e400")),
        Line("plan", (*SMALL, "--gpu=rtx-4070", f"--vram={400 * '9'}")),
        Line("sample", (f"{{folder}}/{LONG}",)),
        Line("sample", ("{folder}/run", f"--seed={2**64}")),
        Line("sample", ("{folder}/run", "--max_new_tokens=3", "--temperature=1e-45")),
        Line("sample", ("{folder}/run", "--max_new_tokens=3", "--temperature=1e-320")),
    ],
}
