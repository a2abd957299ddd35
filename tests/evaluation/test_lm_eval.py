"""The adapter for lm-evaluation-harness, against transformers on the same weights."""

import pytest
import torch

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from lm_eval.api.instance import Instance  # noqa: E402

from fastgpt.data.tokenizers import GPT2Tokenizer  # noqa: E402
from fastgpt.errors import RequestError  # noqa: E402
from fastgpt.evaluation.lm_eval import FastGPT  # noqa: E402

T = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 whose predictions are far from uniform. It has GPT-2's vocabulary, and so its tokenizer."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gpt2")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=T, n_embd=32, n_layer=2, n_head=2))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return FastGPT(str(folder), device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def request(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@torch.no_grad()
def likelihood(theirs, context, continuation):
    """Of ids after ids, and whether each is the most likely one."""
    ids = (context + continuation)[-(T + 1) :]
    logits = theirs(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


def test_continuations_have_transformers_likelihoods(model, theirs):
    encode = GPT2Tokenizer().encode
    pairs = [("The cat", " sat on the mat"), ("", "No context"), ("A long context " * 20, " ends"), ("Space ", "moved")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        if not context:
            ids = [GPT2Tokenizer.eot], encode(continuation).tolist()
        else:
            whole, before = encode(context + continuation).tolist(), encode(context.rstrip(" ")).tolist()
            ids = whole[: len(before)], whole[len(before) :]
        assert (value, greedy) == (pytest.approx(likelihood(theirs, *ids)[0], rel=1e-4), likelihood(theirs, *ids)[1])


def test_a_long_text_is_predicted_once_from_its_first_token_on(model, theirs):
    text = "Every token counts once, whatever the length of the context is. " * 8
    ids = GPT2Tokenizer().encode(text).tolist()
    assert len(ids) > 3 * T
    expected = 0.0
    for start in range(0, len(ids), T):
        part = ids[start : start + T]
        before = [GPT2Tokenizer.eot, *ids][: start + 1]  # a window that is not full reaches back
        expected += likelihood(theirs, before if len(part) < T else before[-1:], part)[0]
    assert model.loglikelihood_rolling([request("loglikelihood_rolling", text)])[0] == pytest.approx(expected, rel=1e-4)


def test_generation_is_transformers_greedy_text_up_to_the_stop(model, theirs):
    tokenizer = GPT2Tokenizer()
    ids = torch.tensor([tokenizer.encode("The cat").tolist()])
    text = tokenizer.decode(theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :])
    whole = model.generate_until([request("generate_until", "The cat", {"until": [], "max_gen_toks": 8})])
    assert whole == [text]
    stop = text[len(text) // 2 :][:3]
    cut = model.generate_until([request("generate_until", "The cat", {"until": [stop], "max_gen_toks": 8})])
    assert cut == [text[: text.index(stop)]]


def test_a_tokenizer_without_a_mark_between_documents_is_refused(trainer):
    made = trainer(max_iters=1)
    made.train()
    with pytest.raises(RequestError, match="parts documents"):
        FastGPT(str(made.run_dir))
