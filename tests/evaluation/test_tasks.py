import json
import math

import pytest
import torch

from fastgpt.data.tokenizers import ByteTokenizer, CharTokenizer
from fastgpt.errors import RequestError
from fastgpt.evaluation.tasks import Rate, continuations, hellaswag, lambada
from fastgpt.model import GPT, GPTConfig

T = 48


@pytest.fixture(scope="module", params=[{}, {"tied": False, "softcap": 3.0}], ids=["gpt2", "untied and capped"])
def model(request):
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 300, 2, 2, 32, **request.param)).eval()  # 44 ids of padding
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@torch.no_grad()
def by_hand(model, context, continuation):
    """Log-likelihood and whether it is what the model would write, token by token."""
    ids = list((context + continuation).encode())
    total, greedy = 0.0, True
    for i in range(len(context.encode()), len(ids)):
        logits = model(torch.tensor(ids[max(0, i - T) : i])[None])[0, :256].double()
        total += logits.log_softmax(-1)[ids[i]].item()
        greedy &= logits.argmax().item() == ids[i]
    return total, greedy


def test_continuations_have_the_likelihood_of_their_tokens(model):
    pairs = [("The cat", " sat"), ("A", " longer continuation, of many words"), ("Some context is longer", " x")]
    for pair, score in zip(pairs, continuations(model, ByteTokenizer(), pairs, batch_size=2), strict=True):
        expected, greedy = by_hand(model, *pair)
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert score.greedy == greedy


def test_a_context_that_is_too_long_loses_its_beginning(model):
    context, continuation = "word " * 30, "and more"
    (score,) = continuations(model, ByteTokenizer(), [(context, continuation)])
    (same,) = continuations(model, ByteTokenizer(), [(context[-(T + 1 - len(continuation)) :], continuation)])
    assert score == same
    assert score.log_likelihood < 0


def test_lambada_asks_for_the_last_word(model, tmp_path, monkeypatch):
    lines = ["The quick brown fox", "it was the best of times", "a b"]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    found = lambada(model, ByteTokenizer(), tmp_path / "l.jsonl")
    likelihoods = [by_hand(model, line.rpartition(" ")[0], " " + line.rpartition(" ")[2])[0] for line in lines]
    assert found["perplexity"] == pytest.approx(math.exp(-sum(likelihoods) / 3), rel=1e-3)
    assert found["accuracy"] == Rate(0.0, 3)
    assert lambada(model, ByteTokenizer(), tmp_path / "l.jsonl", limit=1)["accuracy"].examples == 1


def test_a_line_may_have_a_byte_order_mark_and_unicodes_line_breaks(model, tmp_path):
    lines = [
        json.dumps({"text": text}, ensure_ascii=False) for text in ("one\u2028two three", "four\x85 five", "six seven")
    ]
    (tmp_path / "l.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert lambada(model, ByteTokenizer(), tmp_path / "l.jsonl")["accuracy"].examples == 3


def test_lambadas_accuracy_counts_words_that_the_model_would_write(tmp_path):
    """A model that always writes the same letter."""
    tokenizer = CharTokenizer(" abx")
    model = GPT(GPTConfig(16, 4, 1, 1, 8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[0].fill_(0.5)  # a space after anything
    lines = ["a b ", "ab x", "a  "]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"text": line + "x"}) + "\n" for line in lines))
    assert lambada(model, tokenizer, tmp_path / "l.jsonl")["accuracy"] == Rate(0.0, 3)
    with torch.no_grad():
        model.transformer.wte.weight[0].fill_(0.0)
        model.transformer.wte.weight[3].fill_(0.5)
    # " x" begins with a space, which it would not write
    assert lambada(model, tokenizer, tmp_path / "l.jsonl")["accuracy"] == Rate(0.0, 3)
    (score,) = continuations(model, tokenizer, [("ab", "xx")])
    assert score.greedy


def example(**changes):
    return {
        "activity_label": "Cooking", "ctx_a": "A man stirs a pot.", "ctx_b": "he", "label": 1,
        "endings": ["tastes it [substeps] and smiles.", "sings.", "[title] leaves", "is a very very long ending."],
    } | changes  # fmt: skip


def test_hellaswag_chooses_the_likeliest_ending(model, tmp_path):
    wide = GPT(GPTConfig(128, 300, 2, 2, 32)).eval()
    (tmp_path / "h.jsonl").write_text(json.dumps(example()) + "\n\n" + json.dumps(example(label="0")) + "\n")
    context = "Cooking: A man stirs a pot. He"
    endings = ["tastes it and smiles.", "sings.", " leaves", "is a very very long ending."]
    scores = [
        score.log_likelihood for score in continuations(wide, ByteTokenizer(), [(context, f" {e}") for e in endings])
    ]
    norms = [score / len(ending) for score, ending in zip(scores, endings, strict=True)]
    best, best_norm = scores.index(max(scores)), norms.index(max(norms))
    found = hellaswag(wide, ByteTokenizer(), tmp_path / "h.jsonl")
    assert found["acc"] == Rate(((best == 1) + (best == 0)) / 2, 2)
    assert found["acc_norm"] == Rate(((best_norm == 1) + (best_norm == 0)) / 2, 2)


def test_a_rates_error_is_that_of_a_proportion():
    assert Rate(0.25, 101).error == pytest.approx(math.sqrt(0.25 * 0.75 / 100))


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        (lambada, "{", r"line 1: "),
        (lambada, "[]", r"line 1: not an object"),
        (lambada, "{}", r"line 1: text is missing, or not a text"),
        (lambada, '{"text": "word"}', r"less than two words"),
        (lambada, "", r"has no lines"),
        (hellaswag, json.dumps(example(endings="x")), r"endings is not a list of texts"),
        (hellaswag, json.dumps(example(label=4)), r"label 4 is not the number of an ending"),
        (hellaswag, json.dumps(example(label="²")), r"label '²' is not the number of an ending"),
        (hellaswag, json.dumps(example(ctx_b=None)), r"ctx_b is missing"),
    ],
)
def test_a_file_that_is_not_the_tasks_is_refused(model, tmp_path, task, line, message):
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(RequestError, match=message):
        task(model, ByteTokenizer(), tmp_path / "x.jsonl")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        task(model, ByteTokenizer(), tmp_path / "none.jsonl")
