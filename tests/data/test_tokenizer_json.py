import json

import numpy as np
import pytest

from fastgpt.data.tokenizer_json import END_OF_TEXT, JsonTokenizer
from fastgpt.data.tokenizer_meta import tokenizer_from_meta
from fastgpt.errors import RequestError

pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat, the cat sat", "naïve façade — 漢字 🙂\n\n\tindented", "the end"] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return JsonTokenizer.train(TEXTS, 300)


@pytest.mark.parametrize("text", [*TEXTS, "", " ", "unseen ж\0 bytes\r\n", f"a{END_OF_TEXT}b"])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text


def test_it_has_learnt_pairs_and_knows_every_byte(tokenizer):
    assert 257 < tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert len(tokenizer.encode("ж")) == 2


def test_the_end_of_text_is_a_token_of_its_own_that_text_never_becomes(tokenizer):
    assert tokenizer.eot == 0
    assert tokenizer.decode([0]) == END_OF_TEXT
    assert 0 not in tokenizer.encode(END_OF_TEXT)


def test_it_comes_back_from_meta_json_and_from_a_file(tokenizer, tmp_path):
    meta = json.loads(json.dumps(tokenizer.to_meta()))
    same = tokenizer_from_meta(meta)
    assert same.to_meta() == tokenizer.to_meta()
    (tmp_path / "tokenizer.json").write_text(json.dumps(meta["content"]))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        other = JsonTokenizer.open(path)
        assert np.array_equal(other.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])


def test_padding_and_truncation_that_a_file_asks_for_are_left_out(tokenizer, tmp_path):
    content = tokenizer.to_meta()["content"]
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(JsonTokenizer(json.dumps(content)).encode("the cat sat on the mat")) > 2


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(RequestError, match=r"tokenizer\.json is not a tokenizer: "):
        JsonTokenizer.open(tmp_path)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        JsonTokenizer.open(tmp_path / "none.json")
    with pytest.raises(RequestError, match="is not a tokenizer"):
        tokenizer_from_meta({"name": "json"})


def test_more_ids_than_16_bits_number_are_refused():
    import tokenizers

    many = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(65_537)}, unk_token="w0"))
    with pytest.raises(RequestError, match="65,537 tokens; at most 65,536"):
        JsonTokenizer(many.to_str())
