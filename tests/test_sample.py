import pytest
import torch

from fastgpt import sample
from fastgpt.data.stream import decode_stream, show, until
from fastgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer
from fastgpt.errors import RequestError
from fastgpt.model import GPT, GPTConfig
from fastgpt.sample import encode_prompt

WIDE = "aé€😀\n한글 naïve 🏳️‍🌈!"  # characters of one to four bytes


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=8))


def shown(capsys, model, tokenizer, **options):
    prompt = encode_prompt(tokenizer, options.pop("prompt", "a"))
    show(model, tokenizer, prompt, **{"max_new_tokens": 12, "seed": 0, **options})
    return capsys.readouterr().out


def test_a_character_of_several_bytes_comes_whole():
    tokenizer = ByteTokenizer()
    pieces = list(decode_stream(tokenizer, (int(i) for i in tokenizer.encode(WIDE))))
    assert "".join(pieces) == WIDE
    assert [piece for piece in pieces if piece] == list(WIDE)


def test_a_character_comes_as_soon_as_its_last_byte_does():
    tokenizer = ByteTokenizer()
    taken = 0

    def ids():
        nonlocal taken
        for i in tokenizer.encode("€a"):
            taken += 1
            yield int(i)

    stream = decode_stream(tokenizer, ids())
    assert (next(stream), taken) == ("€", 3)
    assert (next(stream), taken) == ("a", 4)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_never_ends_is_shown_as_broken(cut):
    ids = "x😀".encode()[: 1 + cut]
    text = "".join(decode_stream(ByteTokenizer(), ids))
    assert text.startswith("x\N{REPLACEMENT CHARACTER}")


def test_bytes_that_form_no_character_hold_up_nothing():
    text = "".join(decode_stream(ByteTokenizer(), [0xFF] * 9 + list(b"abc")))
    assert text.endswith("abc")
    assert text.count("\N{REPLACEMENT CHARACTER}") == 9


def test_a_whole_character_after_broken_bytes_stays_whole():
    text = "".join(decode_stream(ByteTokenizer(), [0x80, 0x80, 0x80, *"é".encode()]))
    assert text == "\N{REPLACEMENT CHARACTER}" * 3 + "é"


def test_single_characters_are_never_held_back():
    tokenizer = CharTokenizer("ab\N{REPLACEMENT CHARACTER}")
    assert "".join(decode_stream(tokenizer, [0, 2, 2, 2, 2, 2, 1])) == "a" + "\N{REPLACEMENT CHARACTER}" * 5 + "b"


def test_the_prompt_comes_first_and_a_line_break_last(capsys, model):
    text = shown(capsys, model, CharTokenizer("abc\n"), prompt="abcab")
    assert text.startswith("abcab")
    assert text.endswith("\n")
    assert len(text) == 5 + 12 + 1


def test_without_a_prompt_the_text_starts_with_a_line_break(capsys, model):
    assert shown(capsys, model, CharTokenizer("abc\n"), prompt=None).startswith("\n")


def test_a_vocabulary_without_line_breaks_starts_with_its_first_character(capsys, model):
    assert shown(capsys, model, CharTokenizer("cab"), prompt=None)[0] == "c"


def test_only_characters_of_the_vocabulary_are_drawn_though_the_model_has_more(capsys, model):
    text = shown(capsys, model, CharTokenizer("ab"), max_new_tokens=200, temperature=10.0)
    assert set(text) == {"a", "b", "\n"}


def test_the_same_seed_gives_the_same_text(capsys, model):
    first, again, other = (shown(capsys, model, ByteTokenizer(), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_temperature_0_does_not_depend_on_the_seed(capsys, model):
    first, other = (shown(capsys, model, ByteTokenizer(), seed=seed, temperature=0.0) for seed in (1, 2))
    assert first == other


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_model_in_its_mode(capsys, model, training):
    model.train(training)
    shown(capsys, model, ByteTokenizer())
    assert model.training is training


def test_an_empty_prompt_is_a_wrong_request():
    with pytest.raises(RequestError, match="--prompt is empty"):
        encode_prompt(ByteTokenizer(), "")


def test_a_character_outside_the_vocabulary_is_a_wrong_request():
    with pytest.raises(RequestError, match="'z' is not among"):
        encode_prompt(CharTokenizer("abc"), "az")


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["ab", "cd", "ef"], ["cd"], "ab"), (["a", "b", "c", "d"], ["bcd"], "a"), (["ab"] * 3, ["x"], "ababab"),
        (["a\n", "\n", "b"], ["\n\n", "b"], "a"), (["aab", "c"], ["abc"], "a"), (["abab", "ac"], ["abac"], "ab"),
        (["ab"], [], "ab"), (["abc"], ["c", "b"], "a"), (["x", "ab"], ["abc"], "xab"),
    ],
)  # fmt: skip
def test_a_text_ends_before_what_stops_it_however_it_is_cut(pieces, stop, expected):
    assert "".join(until(iter(pieces), stop)) == expected


def test_what_cannot_become_a_stop_is_not_held_back():
    assert next(until(iter(["hello"]), ["xyz"])) == "hello"
    assert next(until(iter(["hellox"]), ["xyz"])) == "hello"


def test_a_sample_ends_before_a_stop_but_the_prompt_may_have_it(capsys, model):
    tokenizer = ByteTokenizer()
    whole = shown(capsys, model, tokenizer, prompt="ab", max_new_tokens=40)
    generated = whole[2:]
    stop = generated[10:12]
    place = generated.find(stop)
    assert (
        shown(capsys, model, tokenizer, prompt="ab", max_new_tokens=40, stop=[stop]) == "ab" + generated[:place] + "\n"
    )
    assert shown(capsys, model, tokenizer, prompt="ab", max_new_tokens=40, stop=["ab"]).startswith("ab")


def test_an_end_of_text_in_a_prompt_is_one_token():
    tokenizer = GPT2Tokenizer()
    ids = encode_prompt(tokenizer, "one<|endoftext|>two")
    assert ids == [*tokenizer.encode("one").tolist(), tokenizer.eot, *tokenizer.encode("two").tolist()]
    assert encode_prompt(tokenizer, "<|endoftext|>") == [tokenizer.eot]


@pytest.fixture
def run(trainer, tmp_path, capsys):
    assert trainer().train() == 0
    capsys.readouterr()
    return str(tmp_path / "run")


def sampled(capsys, *argv):
    sample.main([*argv, "--max_new_tokens=20"])
    return capsys.readouterr()


def test_the_command_samples_from_a_run_as_fastgpt_or_nanogpt_names_it(run, capsys):
    plain = sampled(capsys, run, "--prompt", "sea")
    assert plain.out.startswith("sea")
    assert f"step 8 of {run}: 20 tokens, " in plain.err
    assert sampled(capsys, "--out_dir", run, "--start=sea").out == plain.out
    assert sampled(capsys, "--init_from", run, "--start=sea").out == plain.out
    assert sampled(capsys, run, "--prompt", "sea", "--seed", "7").out != plain.out
    assert sampled(capsys, run, "--prompt", "sea", "--checkpoint", "4").err.startswith("step 4 of ")


def test_several_prompts_and_samples_come_one_after_another(run, capsys, tmp_path):
    (tmp_path / "start.txt").write_text("\ufeffsoil")
    said = sampled(capsys, run, "--prompt", "sea", "--prompt", f"FILE:{tmp_path / 'start.txt'}", "--num_samples=2")
    parts = said.out.split("-" * 20 + "\n")
    assert [part[:3] for part in parts] == ["sea", "sea", "soi", "soi"]
    assert parts[0] != parts[1]
    assert "80 tokens" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give the MODEL to sample from"),
        (["RUN", "--top_p=0"], "--top_p must be above 0"),
        (["RUN", "--repetition_penalty=nan"], "--repetition_penalty must be above 0"),
        (["RUN", "--stop="], "--stop is empty"),
        (["RUN", "--out_dir=other"], "is the model already: leave out --out_dir and --init_from"),
        (["RUN", "--init_from=gpt2"], "is the model already: leave out --out_dir and --init_from"),
        (["RUN", "--prompt=FILE:none.txt"], "none.txt cannot be read: No such file"),
        (["RUN", "--prompt", "sea " * 5, "--long_prompt=refuse"], "has 20 tokens, more than the model's context of 16"),
        (["RUN", "--checkpoint=5"], "no checkpoint of step 5"),
        (["nothing"], "there is no nothing"),
    ],
)
def test_a_wrong_request_is_refused_in_a_line(run, argv, message):
    with pytest.raises(RequestError, match=message) as caught:
        sample.main([run if arg == "RUN" else arg for arg in argv])
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_longer_than_the_context_slides(run, capsys):
    prompt = "sea soil " * 4
    assert sampled(capsys, run, "--prompt", prompt).out.startswith(prompt)
