import pytest
import torch

from fastgpt.data.stream import decode_stream, show
from fastgpt.data.tokenizers import ByteTokenizer, CharTokenizer
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
