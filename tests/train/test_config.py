import argparse

import pytest

from fastgpt.errors import RequestError
from fastgpt.model.config import padded_vocab_size
from fastgpt.train.config import TrainConfig, divisors
from fastgpt.train.presets import PRESETS
from fastgpt.train.resume import parse
from fastgpt.units import parse_count, parse_gigabytes

_NAMES = """
    device compile dtype eval_interval eval_iters log_interval block_size batch_size gradient_accumulation_steps
    n_layer n_head n_embd bias max_iters lr_decay_iters learning_rate min_lr warmup_iters beta1 beta2 weight_decay
    grad_clip dropout init_from out_dir dataset decay_lr eval_only always_save_checkpoint wandb_project wandb_run_name
    backend
"""
NANOGPT_NAMES = _NAMES.split()


def config(*argv):
    return parse(argv, PRESETS)


def refusal(*argv):
    with pytest.raises(RequestError) as caught:
        config(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", NANOGPT_NAMES)
def test_nanogpts_flags_exist_under_their_names(name):
    value = getattr(config(), name)
    assert getattr(config(f"--{name}={value}"), name) == value


def test_nanogpts_way_to_write_values_is_read():
    run = config('--dtype="float16"', "--out_dir='elsewhere'", "--max_iters=1e3", "--batch_size=2", "--wandb_log=True")
    assert (run.dtype, run.out_dir, run.max_iters, run.wandb) == ("float16", "elsewhere", 1000, True)
    assert config("--backend=nccl").backend == "auto"
    for wrong in ("1.5", "1e-3", "inf", "many", "1e400"):
        assert "expected a whole number" in refusal(f"--max_iters={wrong}")
    assert config("--seed=9007199254740993").seed == 9007199254740993  # not by way of a float


# nanoGPT's seven config files, as their documentation has the values.
CONFIG_FILES = {
    "eval_gpt2": "batch_size = 8\neval_iters = 500 # more\neval_only = True\nwandb_log = False\ninit_from = 'gpt2'\n",
    "eval_gpt2_xl": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\ninit_from = 'gpt2-xl'\n",
    "finetune_shakespeare": """import time
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())
dataset = 'shakespeare'
init_from = 'gpt2-xl'
always_save_checkpoint = False
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
learning_rate = 3e-5
decay_lr = False
""",
    "train_gpt2": """wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "train_shakespeare_char": """out_dir = 'out-shakespeare-char'
eval_interval = 250 # keep frequent because we'll overfit
eval_iters = 200
log_interval = 10 # don't print too too often
always_save_checkpoint = False
wandb_log = False # override via command line if you like
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
""",
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_nanogpts_config_files_are_read(tmp_path, name):
    file = tmp_path / f"{name}.py"
    file.write_text(CONFIG_FILES[name])
    run = config(str(file), "--log_interval=7")
    assert run.log_interval == 7
    assert run.preset == "nanogpt"
    if name == "train_shakespeare_char":
        assert (run.n_layer, run.dropout, run.out_dir, run.always_save_checkpoint) == (
            6,
            0.2,
            "out-shakespeare-char",
            False,
        )
    if name == "train_gpt2":
        assert (run.gradient_accumulation_steps, run.wandb, run.wandb_run_name) == (40, True, "gpt2-124M")
    if name == "finetune_shakespeare":
        assert (run.init_from, run.decay_lr, run.learning_rate_at(0)) == ("gpt2-xl", False, 3e-5)
        assert run.tokens_per_step == 32 * 1024  # its block_size is train.py's
    if name.startswith("eval"):
        assert run.eval_only


def test_a_config_file_with_a_wrong_line_is_refused_with_its_name(tmp_path):
    file = tmp_path / "mine.py"
    for line, message in (
        ("n_layers = 3", "mine.py: unknown flag --n_layers; did you mean --n_layer?"),
        ("batch_size = 'x'", "mine.py: argument --batch_size"),
        ("x = y", "mine.py, line 1"),
    ):
        file.write_text(line)
        assert message in refusal(str(file))
    assert "unexpected argument 'quickstart'" in refusal("quickstart")
    assert "cannot be read" in refusal(str(tmp_path / "none.py"))


@pytest.mark.parametrize("n", [1, 2, 12, 36, 97, 1024, 2**31 - 1])
def test_divisors(n):
    found = divisors(n)
    assert found == sorted(set(found))
    assert all(n % d == 0 for d in found)
    if n < 2000:
        assert found == [d for d in range(1, n + 1) if n % d == 0]
    else:
        assert found == [1, n]  # a prime


def test_the_architecture_is_that_of_the_model_to_start_from():
    assert "--n_layer is the model's that --init_from gpt2 starts from" in refusal("--init_from=gpt2", "--n_layer=3")
    assert config("--init_from=gpt2", "--dropout=0.1").init_from == "gpt2"


def test_a_constant_rate_neither_warms_up_nor_decays():
    run = config("--decay_lr=False")
    assert {run.learning_rate_at(step) for step in (0, 5, 100, 10**6)} == {run.learning_rate}


def test_without_flags_the_quickstart_runs():
    assert config() == config("--preset", "quickstart") == TrainConfig(**PRESETS["quickstart"])
    assert config().preset == "quickstart"


def test_the_defaults_beneath_the_presets_are_nanogpts():
    plain = TrainConfig()
    assert (plain.n_layer, plain.n_head, plain.n_embd, plain.block_size) == (12, 12, 768, 1024)
    assert (plain.learning_rate, plain.min_lr, plain.warmup_iters, plain.lr_decay_iters) == (6e-4, 6e-5, 2000, 600_000)
    assert (plain.beta1, plain.beta2, plain.weight_decay, plain.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (plain.max_iters, plain.batch_size, plain.eval_interval, plain.eval_iters) == (600_000, 12, 2000, 200)


@pytest.mark.parametrize("flag", ["--max_iters=7", "--max-iters=7"])
def test_underscores_and_dashes_are_alike(flag):
    assert config(flag).max_iters == config(*flag.split("=")).max_iters == 7


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--compile=True"], True),
        (["--compile=False"], False),
        (["--compile", "False"], False),
        (["--compile", "true"], True),
        (["--compile"], True),
        (["--compile", "--max_iters=3"], True),
        ([], False),
    ],
)
def test_a_yes_or_no_flag_takes_a_value_or_stands_alone(argv, expected):
    assert config(*argv).compile is expected


def test_bias_false_is_false():
    assert config("--bias", "False").bias is False
    assert config("--bias=0").bias is False


def test_overwrite_needs_no_value():
    assert config("--overwrite").overwrite is True
    assert config().overwrite is False


def test_flags_override_the_preset_wherever_they_stand():
    preset = config("--preset", "shakespeare-char")
    assert (preset.dropout, preset.n_layer, preset.beta2) == (0.2, 6, 0.99)
    for argv in (["--preset", "shakespeare-char", "--n_layer", "2"], ["--n_layer=2", "--preset=shakespeare-char"]):
        assert (config(*argv).n_layer, config(*argv).dropout) == (2, 0.2)


def test_a_flag_that_repeats_a_default_still_overrides_the_preset():
    assert config("--preset", "shakespeare-char", "--dropout", "0.0").dropout == 0.0


def test_a_run_lies_in_a_folder_of_its_presets_name():
    assert config("--preset", "gpt2-30m").out_dir == "runs/gpt2-30m"
    assert config("--preset", "gpt2-30m", "--out_dir", "elsewhere").out_dir == "elsewhere"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_run_of_a_valid_model(name):
    run = config("--preset", name)
    model = run.gpt_config(padded_vocab_size(50257))
    assert (model.n_layer, model.n_head, model.n_embd) == (run.n_layer, run.n_head, run.n_embd)
    assert (model.block_size, model.dropout, model.bias) == (run.block_size, run.dropout, run.bias)
    assert model.vocab_size == 50304
    assert run.warmup_iters < run.lr_decay_iters == run.max_iters  # the schedule fits the run
    assert run.min_lr == pytest.approx(run.learning_rate / 10 if run.schedule == "cosine" else 0.0)
    assert run.max_iters > run.eval_interval


def test_the_presets_are_those_that_are_documented():
    documented = """
        quickstart nanogpt shakespeare-char shakespeare-char-cpu gpt2-30m gpt2-124m gpt2-350m gpt2-774m gpt2-1558m
        modern-30m modern-124m modern-350m speedrun-124m
    """
    assert set(PRESETS) == set(documented.split())


@pytest.mark.parametrize("size", ["30m", "124m", "350m"])
def test_a_modern_preset_is_its_gpt2_in_shape_and_data_on_half_of_the_tokens(size):
    gpt2, modern = config("--preset", f"gpt2-{size}"), config("--preset", f"modern-{size}")
    for name in ("n_layer", "n_head", "n_embd", "block_size", "dataset", "total_batch_size", "batch_size"):
        assert getattr(modern, name) == getattr(gpt2, name)
    assert modern.max_iters == gpt2.max_iters // 2


def test_muons_rate_in_the_presets_is_the_same_step_of_a_square_matrix_at_every_width():
    for name in ("modern-30m", "modern-124m", "modern-350m", "speedrun-124m"):
        run = config("--preset", name)
        # The step's singular values are about the rate times 0.2 sqrt(width): 0.025, modded-nanogpt's.
        assert run.muon_learning_rate * 0.2 * run.n_embd**0.5 == pytest.approx(0.025)
        assert run.learning_rate * run.n_embd**0.5 == pytest.approx(3.6e-3 * 768**0.5)


def test_the_speedrun_takes_the_tokens_of_the_public_run_that_it_follows():
    run = config("--preset", "speedrun-124m")
    assert run.tokens_before(run.max_iters) == 3250 * 2**19


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("gpt2-", "modern-", "speedrun-"))])
def test_a_preset_named_after_a_size_takes_half_a_million_tokens_a_step_and_has_that_size(name):
    run = config("--preset", name)
    assert run.tokens_per_step == 524_288
    config("--preset", name, "--expect_params", name.partition("-")[2]).gpt_config(50304)
    with pytest.raises(RequestError, match="this model has"):
        config("--preset", name, "--expect_params", "201M").gpt_config(50304)


@pytest.mark.parametrize("count", ["124M", "124.4M", "0.124B", "124000K", "124000000", " 124m ", "123.7M"])
def test_a_size_that_the_model_has_is_accepted_however_it_is_written(count):
    assert config("--preset", "gpt2-124m", "--expect_params", count).gpt_config(50304).n_layer == 12


def test_a_model_of_another_size_than_expected_is_refused_with_its_size():
    with pytest.raises(RequestError, match=r"--expect_params 124M, but this model has 134.37M parameters.*n_layer=12"):
        config("--preset", "gpt2-124m", "--n_embd=804", "--expect_params", "124M").gpt_config(50304)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--muon_learning_rate=0.01"], "--muon_learning_rate needs --optimizer muon"),
        (["--optimizer=muon", "--muon_learning_rate=-1"], "--muon_learning_rate must not be negative"),
        (["--optimizer=muon", "--momentum=1"], r"--momentum must be in \[0, 1\)"),
    ],
)
def test_what_muon_cannot_do_is_refused(flags, reason):
    with pytest.raises(RequestError, match=reason):
        parse(flags, PRESETS)


def test_muons_rate_follows_the_schedule_of_the_others():
    run = parse(["--optimizer=muon", "--learning_rate=1e-3", "--muon_learning_rate=4e-3"], PRESETS)
    assert run.muon_lr_ratio == pytest.approx(4.0)
    assert parse(["--optimizer=muon"], PRESETS).muon_lr_ratio == 1.0


@pytest.mark.parametrize("seed", [2**63, 2**64])
def test_a_seed_that_a_resumed_run_could_not_read_is_refused(seed):
    with pytest.raises(RequestError, match=r"--seed must be less than 2\*\*63"):
        parse([f"--seed={seed}"], PRESETS)
    assert parse([f"--seed={2**63 - 1}"], PRESETS).seed == 2**63 - 1


@pytest.mark.parametrize("count", ["large", "-3M", "0", "M", "1.2.3M", "nan"])
def test_an_expected_size_that_is_no_count_is_refused(count):
    with pytest.raises(RequestError, match="124M"):
        config(f"--expect_params={count}").gpt_config(50304)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("gpt2-124", "gpt2-124m"), ("quick-start", "quickstart"), ("shakespeare_char", "shakespeare-char")],
)
def test_an_unknown_preset_is_answered_with_the_nearest(typed, meant):
    message = refusal("--preset", typed)
    assert f"unknown preset '{typed}'; did you mean {meant}?" in message
    assert all(name in message for name in PRESETS)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--learning_rte", "--learning_rate"), ("--max-iter", "--max_iters"), ("--batchsize=4", "--batch_size")],
)
def test_an_unknown_flag_is_answered_with_the_nearest(typed, meant):
    assert f"unknown flag {typed.partition('=')[0]}; did you mean {meant}?" in refusal(typed)


def test_a_flag_that_is_near_to_none_gets_no_suggestion():
    message = refusal("--zzzzzz", "1")
    assert "unknown flag --zzzzzz" in message
    assert "did you mean" not in message


def test_a_flag_is_never_guessed_from_its_beginning():
    assert "unknown flag --max_it" in refusal("--max_it", "5")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max_iters", "many"], "max_iters"),
        (["--max_iters=1.5"], "max_iters"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--bias", "perhaps"], "expected True or False, not 'perhaps'"),
        (["--dtype", "float8"], "float8"),
        (["--state_bits", "16"], "choose from 8, 32"),
        (["--init_from", "gpt3"], "resume"),
        (["--backend", "cuda"], "reference"),
        (["--max_iters"], "max_iters"),
        (["surplus"], "unexpected argument 'surplus'"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--batch_ramp=-1"], "--batch_ramp must not be negative, got -1"),
        (
            ["--batch_ramp=9", "--batch_size=4", "--block_size=64"],
            "--batch_ramp begins with 1/8 of an update, and 256 tokens are not 8 times a whole number of micro-batches "
            "of 4 x 64: --total_batch_size 2048 would be",
        ),
        (
            ["--preset=gpt2-124m", "--batch_ramp=9", "--batch_size=128"],
            "524,288 tokens are not 8 times a whole number of micro-batches of 128 x 1024: --total_batch_size 1048576",
        ),
        (
            ["--preset=gpt2-124m", "--batch_ramp=9", "--total_batch_size=4096"],
            "4,096 tokens are not 8 times a whole number of sequences of 1024: --total_batch_size 8192 would be",
        ),
        (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps must be at least 1"),
        (["--batch_size=many"], "expected a number or auto, not 'many'"),
        (["--batch_size=auto"], "--batch_size auto needs --total_batch_size"),
        (["--total_batch_size=-1"], "--total_batch_size must not be negative"),
        (["--preset=gpt2-124m", "--batch_size=12"], "--batch_size 8 or 16 would be exact"),
        (["--preset=gpt2-124m", "--batch_size=12"], "or --total_batch_size 516096 or 528384"),
        (["--preset=gpt2-124m", "--batch_size=8", "--block_size=1000"], "520000 or 528000 would be exact"),
        (["--preset=gpt2-124m", "--gradient_accumulation_steps=60"], "does not divide an update of 524,288 tokens"),
        (
            ["--batch_size=4", "--total_batch_size=1024", "--gradient_accumulation_steps=3"],
            "--gradient_accumulation_steps 3 contradicts --total_batch_size 1024, which takes 2",
        ),
        (["--batch_size=99999999999"], "--batch_size must be at most 16,777,216, got 99,999,999,999"),
        (["--total_batch_size=999999999999999968"], "--total_batch_size must be at most 1,099,511,627,776"),
        (["--total_batch_size=1099511627769"], "would be exact"),
        (["--max_iters=0"], "--max_iters must be at least 1"),
        (["--eval_interval=0"], "--eval_interval must be at least 1"),
        (["--eval_iters=0"], "--eval_iters must be at least 1"),
        (["--log_interval=-1"], "--log_interval must be at least 1"),
        (["--checkpoint_interval=-1"], "--checkpoint_interval must not be negative"),
        (["--max_hours=-1"], "--max_hours must not be negative"),
        (["--learning_rate=-1"], "--learning_rate must not be negative"),
        (["--weight_decay=-1"], "--weight_decay must not be negative"),
        (["--grad_clip=-1"], "--grad_clip must not be negative"),
        (["--seed=-1"], "--seed must not be negative"),
        (["--beta2=1.0"], "--beta2 must be in [0, 1)"),
        (["--beta1=-0.1"], "--beta1 must be in [0, 1)"),
        (["--warmup_iters=500", "--lr_decay_iters=400"], "--lr_decay_iters=400"),
        (["--compile", "--recompute=block"], "--recompute block has no effect with --compile"),
        (["--compile", "--recompute=cheap"], "--recompute cheap has no effect with --compile"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_in_a_line_that_names_it(argv, said):
    assert said in refusal(*argv)


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--n_head=3", "n_embd=128 is not divisible by n_head=3"), ("--dropout=1", "dropout"), ("--n_layer=0", "n_layer")],
)
def test_a_model_that_cannot_be_is_refused(flag, said):
    with pytest.raises(RequestError, match=said):
        config(flag).gpt_config(256)


def test_the_options_of_the_model_are_flags():
    flags = [
        "--positions=rotary", "--norm=rms", "--qk_norm", "--mlp=swiglu", "--n_kv_head=2", "--tied=False",
        "--softcap=15", "--window=64", "--document_mask", "--zero_init", "--value_embeddings",
    ]  # fmt: skip
    model = config(*flags).gpt_config(256, end_of_text=7)
    assert (model.positions, model.norm, model.qk_norm, model.mlp) == ("rotary", "rms", True, "swiglu")
    assert (model.n_kv_head, model.tied, model.softcap, model.window) == (2, False, 15.0, 64)
    assert (model.end_of_text, model.zero_init, model.value_embeddings) == (7, True, True)
    assert config().gpt_config(256, end_of_text=7).beyond_gpt2 == []


def test_a_document_mask_needs_a_token_that_ends_documents():
    with pytest.raises(RequestError, match="--document_mask needs a dataset whose tokenizer has an end-of-text token"):
        config("--document_mask").gpt_config(256)


@pytest.mark.parametrize("cooldown", ["0", "-0.1", "1.1"])
def test_a_cooldown_is_a_share_of_the_run(cooldown):
    assert "--cooldown must be in (0, 1]" in refusal(f"--cooldown={cooldown}")


def test_a_schedule_of_wsd_is_constant_before_its_cooldown():
    run = config("--schedule=wsd", "--cooldown=0.25", "--learning_rate=1e-3", "--min_lr=0")
    assert run.learning_rate_at(run.warmup_iters) == run.learning_rate_at(run.lr_decay_iters * 3 // 4) == 1e-3
    assert run.learning_rate_at(run.lr_decay_iters * 7 // 8) == pytest.approx(5e-4)


def test_help_names_every_flag_and_preset(capsys):
    with pytest.raises(SystemExit) as caught:
        config("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in NANOGPT_NAMES)
    assert all(name in text for name in PRESETS)
    assert argparse.SUPPRESS not in text


@pytest.mark.parametrize("flag", ["learning_rate", "dropout", "max_hours"])
def test_a_number_that_is_none_is_refused(flag):
    with pytest.raises(RequestError, match=f"--{flag} must be a finite number"):
        parse([f"--{flag}=nan"], PRESETS)


def test_a_preset_of_another_width_gets_a_learning_rate_for_that_width():
    preset = PRESETS["shakespeare-char"]
    narrow = parse(["--preset=shakespeare-char", "--n_embd=128"], PRESETS)
    assert narrow.learning_rate == pytest.approx(preset["learning_rate"] * preset["n_embd"] / 128)
    assert narrow.min_lr == pytest.approx(preset["min_lr"] * preset["n_embd"] / 128)


def test_a_learning_rate_that_is_given_is_taken_at_any_width():
    config = parse(["--preset=shakespeare-char", "--n_embd=128", "--learning_rate=5e-4"], PRESETS)
    assert (config.learning_rate, config.min_lr) == (5e-4, PRESETS["shakespeare-char"]["min_lr"])
    assert parse(["--preset=shakespeare-char", "--n_embd=128", "--min_lr=1e-5"], PRESETS).min_lr == 1e-5


def test_other_flags_leave_the_learning_rate_alone():
    config = parse(["--preset=shakespeare-char", "--n_layer=2", "--batch_size=3"], PRESETS)
    assert config.learning_rate == PRESETS["shakespeare-char"]["learning_rate"]


@pytest.mark.parametrize("ramp", range(8))
def test_the_ramp_doubles_an_update_in_thirds_and_adds_up(ramp):
    flags = ["--batch_size=4", "--block_size=16", "--total_batch_size=4096", f"--batch_ramp={ramp}"]
    config = parse(flags, PRESETS)
    sizes = [config.tokens_at(step) for step in range(12)]
    assert sizes == [4096 // (8, 4, 2, 1)[3 if step >= ramp else 3 * step // ramp] for step in range(12)]
    assert [config.accumulation_at(step) * 64 for step in range(12)] == sizes
    for step in range(13):
        assert config.tokens_before(step) == sum(sizes[:step])
        assert config.updates_for(sum(sizes[:step])) == step
    assert config.updates_for(sum(sizes[:2]) + sizes[2] // 2) == 2.5


def test_the_ramp_does_not_depend_on_the_micro_batch():
    flags = ["--preset=gpt2-124m", "--batch_ramp=100"]
    sizes = [
        [config.tokens_at(step) for step in range(0, 110, 10)]
        for config in (parse([*flags, f"--batch_size={n}"], PRESETS) for n in ("auto", 1, 8, 64))
    ]
    assert sizes == sizes[:1] * 4
    assert set(sizes[0]) == {2**16, 2**17, 2**18, 2**19}


def test_a_ramp_scales_no_learning_rate():
    flags = ["--batch_size=1", "--gradient_accumulation_steps=8"]
    without, with_ramp = (parse([*flags, f"--batch_ramp={n}"], PRESETS) for n in (0, 100))
    assert [without.learning_rate_at(i) for i in range(200)] == [with_ramp.learning_rate_at(i) for i in range(200)]


def test_the_tokens_of_an_update_settle_the_accumulation():
    settled = parse(["--preset=gpt2-124m", "--batch_size=8"], PRESETS)
    assert (settled.batch_size, settled.gradient_accumulation_steps, settled.tokens_per_step) == (8, 64, 2**19)
    assert (
        parse(["--preset=gpt2-124m", "--batch_size=8", "--block_size=512"], PRESETS).gradient_accumulation_steps == 128
    )
    assert parse(["--preset=gpt2-124m", "--gradient_accumulation_steps=64"], PRESETS).batch_size == 8


def test_a_preset_of_gpt2_leaves_the_micro_batch_to_the_device_and_says_the_tokens_of_an_update():
    config = parse(["--preset=gpt2-124m"], PRESETS)
    assert (config.batch_size, config.tokens_per_step) == (None, 2**19)


def test_nanogpts_two_flags_mean_what_they_mean_there_whatever_the_preset():
    config = parse(["--preset=gpt2-124m", "--batch_size=12", "--gradient_accumulation_steps=40"], PRESETS)
    assert config.tokens_per_step == 12 * 40 * 1024


@pytest.mark.parametrize(("text", "expected"), [("12GB", 12.0), ("11.5", 11.5), ("8 gib", 8.0)])
def test_memory_is_given_as_cards_are_sold(text, expected):
    assert parse_gigabytes("vram", text) == expected


@pytest.mark.parametrize("text", ["0", "-1", "", "x", "1e400", 400 * "9"])
def test_an_amount_that_no_float_holds_is_refused_like_any_that_is_none(text):
    with pytest.raises(RequestError, match=f"--vram takes an amount such as 12GB, not '{text}'"):
        parse_gigabytes("vram", text)
    with pytest.raises(RequestError, match=f"--tokens takes a count such as 124M, not '{text}'"):
        parse_count("tokens", text)
