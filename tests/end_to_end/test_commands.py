"""The commands as a person types them; in this process wherever the outcome does not depend on a fresh one."""

import ast
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastgpt
from fastgpt import doctor, sample
from fastgpt.__main__ import VERBS
from fastgpt.__main__ import main as fastgpt_main
from fastgpt.cli import run
from fastgpt.data import stream
from fastgpt.data.__main__ import main as data_main
from fastgpt.errors import RequestError
from fastgpt.train.__main__ import main as train_main

MODEL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
LENGTH = ["--batch_size=4", "--max_iters=3", "--warmup_iters=1", "--lr_decay_iters=3", "--eval_interval=3",
          "--eval_iters=1", "--log_interval=1", "--device=cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def words(workplace):
    """The dataset ``words`` under ``data``."""
    rng = random.Random(0)
    lines = (" ".join(rng.choices(["to", "be", "or", "not", "question"], k=6)) for _ in range(100))
    Path("words.txt").write_text("\n".join(lines))
    assert data_main(["prepare", "text", "words.txt"]) == 0
    return "words"


@pytest.fixture
def trained(words):
    """A run on ``words`` in the folder ``run``."""
    assert train_main(["--dataset", words, "--out_dir", "run", *MODEL, *LENGTH]) == 0
    return "run"


def refusal(capsys, main, *argv):
    """The one line that a wrong request is answered with; fails if it is not one, or the status not 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(main, argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def verb(monkeypatch, *argv):
    """The status of ``fastgpt ARGV…``."""
    monkeypatch.setattr(sys, "argv", ["fastgpt", *argv])
    with pytest.raises(SystemExit) as caught:
        fastgpt_main()
    return caught.value.code


def process(*argv, **environment):
    """Python in a process of its own, with these variables in its environment."""
    inherited = {name: value for name, value in os.environ.items() if name != "FASTGPT_BACKEND"}
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )


# ---- wrong requests ----


def test_an_unknown_preset_is_answered_with_the_nearest(capsys):
    assert "did you mean gpt2-124m?" in refusal(capsys, train_main, "--preset", "gpt2-124")


def test_an_unknown_flag_is_answered_with_the_nearest(capsys):
    assert "did you mean --batch_size?" in refusal(capsys, train_main, "--batchsize", "4")
    assert "did you mean --temperature?" in refusal(capsys, sample.main, "run", "--temprature", "1")
    assert "did you mean --tokenizer?" in refusal(capsys, data_main, "prepare", "stdlib", "--tokeniser", "byte")
    assert "did you mean --json?" in refusal(capsys, doctor.main, "--jsn")


def test_heads_that_do_not_divide_the_width_are_refused(capsys, words):
    line = refusal(capsys, train_main, "--dataset", words, "--n_embd=100", "--n_head=12")
    assert "n_embd=100 is not divisible by n_head=12; n_head=10 or n_embd=96 would do" in line


@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-1558m"])
def test_missing_fineweb_is_answered_with_how_to_get_it_or_do_without(capsys, preset):
    line = refusal(capsys, train_main, "--preset", preset, "--device=cpu")
    assert "no dataset 'fineweb10b' in data" in line
    assert "python -m fastgpt.data prepare fineweb10b" in line
    assert "needs network" in line
    assert "python -m fastgpt.data prepare text FILE --tokenizer gpt2" in line
    assert not Path("runs").exists()


def test_a_missing_dataset_of_ones_own_is_answered_with_what_there_is(capsys, words):
    line = refusal(capsys, train_main, "--dataset", "wrods")
    assert "there are words" in line
    assert "did you mean words?" in line


def test_an_empty_text_is_refused(capsys):
    Path("empty.txt").touch()
    assert "empty.txt is empty" in refusal(capsys, data_main, "prepare", "text", "empty.txt")
    assert not Path("data").exists()


def test_a_text_shorter_than_a_block_is_refused_with_both_lengths(capsys):
    Path("short.txt").write_text("too short to train on. " * 10)
    assert data_main(["prepare", "text", "short.txt"]) == 0
    line = refusal(capsys, train_main, "--dataset=short", "--block_size=1024")
    assert "207 tokens, too few for one block of 1024" in line
    assert "lower --block_size or prepare more text" in line
    assert not Path("runs").exists()


def test_nothing_to_resume_is_refused(capsys, words):
    line = refusal(capsys, train_main, "--dataset", words, "--out_dir=run", "--init_from=resume", *MODEL, *LENGTH)
    assert "run holds no checkpoint" in line


def test_a_resume_with_another_architecture_is_refused_with_both(capsys, trained):
    argv = ["--dataset=words", "--out_dir", trained, "--init_from=resume", *MODEL, *LENGTH, "--n_embd=32"]
    line = refusal(capsys, train_main, *argv)
    assert "n_embd=16" in line
    assert "n_embd=32" in line


def test_a_resume_with_moments_of_other_bits_is_refused_with_the_flag_to_pass(capsys, trained):
    argv = ["--dataset=words", "--out_dir", trained, "--init_from=resume", *MODEL, *LENGTH, "--state_bits=8"]
    line = refusal(capsys, train_main, *argv)
    assert "cannot resume: " in line
    assert "moments of 32 bits; pass --state_bits 32" in line


def test_a_folder_that_holds_a_run_is_refused_with_the_ways_on(capsys, trained):
    line = refusal(capsys, train_main, "--dataset=words", "--out_dir", trained, *MODEL, *LENGTH)
    assert "run already holds a run" in line
    assert "--overwrite" in line
    assert "--init_from resume" in line


def test_a_backend_that_cannot_run_here_is_refused(capsys, words):
    line = refusal(capsys, train_main, "--dataset", words, "--device=cpu", "--backend=triton", "--dtype=float32")
    assert "backend 'triton' cannot run torch.float32 on cpu" in line


def test_one_of_several_processes_is_refused(capsys, words, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    line = refusal(capsys, train_main, "--dataset", words, "--out_dir=run", *MODEL, *LENGTH)
    assert "WORLD_SIZE is 4, but fastgpt trains on one device: start one process" in line
    assert not Path("run").exists()


def test_one_process_of_torchrun_trains(words, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    assert train_main(["--dataset", words, "--out_dir=run", *MODEL, *LENGTH]) == 0


def test_sampling_a_character_outside_the_vocabulary_is_refused(capsys, trained):
    assert "'Z' is not among the" in refusal(capsys, sample.main, trained, "--prompt", "to be Z")


def test_sampling_where_there_is_no_run_is_refused(capsys, words):
    assert "there is no nowhere" in refusal(capsys, sample.main, "nowhere")
    assert "words.txt is a file" in refusal(capsys, sample.main, "words.txt")


def test_sampling_without_a_checkpoint_is_refused(capsys, trained):
    shutil.rmtree("run/checkpoints")
    assert "run holds no checkpoint" in refusal(capsys, sample.main, trained)


def test_sampling_a_damaged_run_is_refused(capsys, trained):
    (file,) = Path(trained).glob("checkpoints/step-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors is damaged" in refusal(capsys, sample.main, trained)
    Path(trained, "config.json").write_text("{")
    assert "config.json is damaged" in refusal(capsys, sample.main, trained)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--max_new_tokens=0", "--max_new_tokens must be at least 1"),
        ("--num_samples=0", "--num_samples must be at least 1"),
        ("--top_k=0", "--top_k must be at least 1"),
        ("--temperature=-1", "--temperature must be at least 0"),
        ("--temperature=nan", "--temperature must be at least 0"),
        ("--seed=-1", "--seed must be from 0 to 2**62"),
        ("--seed=18446744073709551616", "--seed must be from 0 to 2**62"),
        ("--device=tpu", "not 'tpu'"),
        ("--device=cuda:99", "CUDA devices here"),
        ("--prompt=", "--prompt is empty"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(capsys, trained, flag, said):
    assert said in refusal(capsys, sample.main, trained, flag)


def test_a_run_on_bare_tokens_cannot_be_sampled(capsys, words, workplace):
    for split, shard in (("train", "train_000000.bin"), ("val", "val_000000.bin")):
        shutil.copy(Path("data", words, shard), f"{split}.bin")
    assert train_main(["--dataset=train.bin", "--out_dir=bare", *MODEL, *LENGTH]) == 0
    assert "sample" not in capsys.readouterr().out
    assert "so they cannot be turned into text" in refusal(capsys, sample.main, "bare")


# ---- the commands ----


def test_text_becomes_a_model_that_writes(capsys, monkeypatch):
    Path("book.txt").write_text("\n".join(f"line {i} of the book" for i in range(200)))
    assert verb(monkeypatch, "data", "prepare", "text", "book.txt", "--tokenizer", "char") == 0
    assert "char vocabulary of" in capsys.readouterr().out
    assert verb(monkeypatch, "train", "--dataset", "book", "--out-dir", "runs/book", *MODEL, *LENGTH) == 0
    out = capsys.readouterr().out
    assert "step 3/3  loss " in out
    assert "step 3: train loss " in out
    prompt, text = re.search(r"sample, continued from ('.*'):\n(.*)", out, flags=re.DOTALL).groups()
    prompt = ast.literal_eval(prompt)
    assert prompt
    assert prompt in Path("book.txt").read_text()
    assert text.startswith(prompt)
    assert len(text) == len(prompt) + 300 + len("\n")
    assert Path("runs/book/loss.png").is_file()
    assert verb(monkeypatch, "sample", "runs/book", "--prompt", "line 1", "--max-new-tokens", "20") == 0
    text = capsys.readouterr().out
    assert text.startswith("line 1")
    assert len(text) == len("line 1") + 20 + 1
    assert set(text) <= set(Path("book.txt").read_text())


def test_a_text_without_line_breaks_trains_and_samples(capsys):
    Path("line.txt").write_text("all on one line, " * 100)
    assert data_main(["prepare", "text", "line.txt"]) == 0
    assert train_main(["--dataset=line", "--out_dir=run", *MODEL, *LENGTH]) == 0
    capsys.readouterr()
    sample.main(["run", "--max_new_tokens=5"])
    assert len(capsys.readouterr().out) == 7


def test_a_run_whose_model_cannot_be_sampled_is_done_all_the_same(capsys, words, monkeypatch):
    def diverged(*args, **options):
        raise RequestError("the model's logits are not finite")

    monkeypatch.setattr(stream, "generate", diverged)
    capsys.readouterr()
    assert train_main(["--dataset", words, "--out_dir=run", *MODEL, *LENGTH]) == 0
    assert capsys.readouterr().err == "no sample: the model's logits are not finite\n"


def test_a_sample_that_ends_early_ends_its_line(capsys, trained, monkeypatch):
    def interrupted(model, prompt, n, **options):
        yield prompt[0, :1]
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "generate", interrupted)
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt):
        sample.main([trained, "--prompt=to"])
    assert capsys.readouterr().out == "tot\n"


def test_samples_are_separate_and_each_has_a_seed_of_its_own(capsys, trained):
    capsys.readouterr()
    sample.main([trained, "--prompt=to", "--num_samples=2", "--max_new_tokens=40", "--seed=5"])
    first, second = capsys.readouterr().out.split("-" * 20 + "\n")
    assert first.startswith("to")
    assert second.startswith("to")
    assert first != second
    sample.main([trained, "--prompt=to", "--max_new_tokens=40", "--seed=6"])
    assert capsys.readouterr().out == second


def test_a_sample_of_bytes_shows_whole_characters(capsys, monkeypatch):
    Path("wide.txt").write_text("żółć — naïve 한글 " * 100, encoding="utf-8")
    assert data_main(["prepare", "text", "wide.txt", "--tokenizer", "byte"]) == 0
    assert train_main(["--dataset=wide", "--out_dir=run", *MODEL, *LENGTH]) == 0
    capsys.readouterr()
    ids = iter("żółć 한글".encode())

    def scripted(model, prompt, n, **options):
        return (prompt.new_tensor([next(ids)]) for _ in range(n))

    monkeypatch.setattr(stream, "generate", scripted)
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    sample.main(["run", "--prompt=한", f"--max_new_tokens={len('żółć 한글'.encode())}"])
    assert [text for text in written if text] == ["한", *"żółć 한글", "\n"]


def test_python_m_fastgpt_lists_its_verbs(capsys, monkeypatch):
    assert verb(monkeypatch, "--help") == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in VERBS)
    assert verb(monkeypatch) == 2
    assert capsys.readouterr().out == helped


def test_an_unknown_verb_is_refused_with_the_nearest(capsys, monkeypatch):
    assert verb(monkeypatch, "smaple", "run") == 2
    err = capsys.readouterr().err
    assert "unknown verb 'smaple'; did you mean sample?" in err
    assert all(name in err for name in VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(capsys, monkeypatch, name):
    assert verb(monkeypatch, name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: python -m fastgpt.{name}" in out
    assert "--" in out


# ---- processes of their own ----

TRAIN_WORDS = ["--dataset=words", "--out_dir=run", *MODEL, *LENGTH]
SAY_BACKEND_AND_TRAIN = """
import sys
import fastgpt
from fastgpt.kernels import backends
from fastgpt.train.__main__ import main
print(*fastgpt.__path__, backends()["cpu"]["layer_norm"], sep="\\n")
sys.exit(main(sys.argv[1:]))
"""
RUN_AND_SAY_DYNAMO = """
import sys
from fastgpt.{} import main
status = main(sys.argv[1:])
print("torch._dynamo" in sys.modules)
sys.exit(status)
"""
SAY_MEMORY_AND_TRAIN = """
import sys
from pathlib import Path
from fastgpt.train.__main__ import main
from fastgpt.train.trainer import Trainer
update = Trainer.update
def watched(trainer):
    rate = update(trainer)
    if trainer.step + 1 in (100, 2000):
        print("resident kB:", Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0], file=sys.stderr)
    return rate
Trainer.update = watched
sys.exit(main(sys.argv[1:]))
"""


def test_training_needs_no_cpp_library(words, workplace):
    copy = workplace / "without" / "fastgpt"
    (package,) = fastgpt.__path__
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    trained = process("-c", SAY_BACKEND_AND_TRAIN, *TRAIN_WORDS, PYTHONPATH=str(copy.parent))
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[:2] == [str(copy), "reference (the C++ kernels are not built)"]
    assert "step 3/3" in trained.stdout
    assert Path("run/checkpoints/step-0000003/model.safetensors").is_file()
    assert trained.stderr.count("fastgpt runs on plain PyTorch, slower: the C++ kernels are not built") == 1


def test_the_environment_chooses_the_reference_without_a_warning(words):
    trained = process("-c", SAY_BACKEND_AND_TRAIN, *TRAIN_WORDS, FASTGPT_BACKEND="reference")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[1] == "reference (FASTGPT_BACKEND=reference)"
    assert "step 3/3" in trained.stdout
    assert "slower" not in trained.stderr


def test_training_and_sampling_do_not_import_the_compiler(words):
    for command, arguments in (("train.__main__", TRAIN_WORDS), ("sample", ["run", "--max_new_tokens=2"])):
        done = process("-c", RUN_AND_SAY_DYNAMO.format(command), *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc that tells the resident size")
def test_the_memory_of_a_long_run_is_flat(words):
    length = ["--max_iters=2000", "--lr_decay_iters=2000", "--eval_interval=50"]
    trained = process("-c", SAY_MEMORY_AND_TRAIN, *TRAIN_WORDS, *length)
    assert trained.returncode == 0, trained.stderr
    early, late = map(int, re.findall(r"resident kB: (\d+)", trained.stderr))
    assert late == pytest.approx(early, rel=0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="a compiler that is a shell script")
def test_a_compiler_that_fails_is_told_in_a_line(words, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    failed = process("-m", "fastgpt.train", *TRAIN_WORDS, "--compile=True", CXX=str(compiler))
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("error: torch.compile failed (")


def test_a_backend_of_the_environment_that_cannot_run_here_is_refused(words):
    refused = process("-m", "fastgpt.train", *TRAIN_WORDS, FASTGPT_BACKEND="triton")
    assert refused.returncode == 2
    assert "backend 'triton' cannot run" in refused.stderr


def test_a_wrong_request_ends_a_process_with_2_and_one_line(words):
    refused = process("-m", "fastgpt.train", *TRAIN_WORDS, "--n_head=3")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == "error: n_embd=16 is not divisible by n_head=3; n_head=2 or n_embd=15 would do\n"
