"""The gradient of an embedding, added to its main_grad: tokens in every pattern, and positions."""

import pytest
import torch
import torch.nn.functional as F

from fastgpt.kernels import dispatch, embedding
from fastgpt.kernels.linear import add_positions

# Of n tokens, so many different ones at most that they fit V. A block on a GPU has 32 rows, and 16 blocks are added
# up at a time.
PATTERNS = {
    "all equal": lambda n: torch.full((n,), 3),
    "all different": lambda n: torch.randperm(n),
    "all different, in order": lambda n: torch.arange(n),
    "runs as long as a block": lambda n: torch.arange(n) // 32,
    "runs a little longer": lambda n: torch.arange(n) // 33,
    "runs a little shorter": lambda n: torch.arange(n) // 31,
    "runs of several blocks": lambda n: torch.arange(n) // 100,
    "runs of very many blocks": lambda n: (torch.arange(n) // 600) * 2,
    "two in turns": lambda n: torch.arange(n) % 2,
    "from the last to the first": lambda n: torch.arange(n).flip(0) // 5,
    "frequent as in a text": lambda n: torch.multinomial(1.0 / torch.arange(1, n + 2), n, replacement=True).cpu(),
}


def add(main_grad, dy, index):
    dispatch.resolve("embedding_backward_", dy)(main_grad, dy, index)


def check(rule, V, dy, index):
    """Against index_add_ in fp64; rows that no token names keep every bit, and once more gives the same bits."""
    before = torch.randn(V, dy.shape[1], device=dy.device)
    main_grad, again = before.clone(), before.clone()
    add(main_grad, dy, index)
    add(again, dy, index)
    truth = before.double().index_add_(0, index, dy.double())
    rule.error("main_grad", main_grad, [before.clone().index_add_(0, index, dy.float())], truth, torch.float32, 3.0)
    assert torch.equal(main_grad, again)
    unnamed = torch.ones(V, dtype=torch.bool, device=dy.device).index_fill_(0, index, False)
    assert torch.equal(main_grad[unnamed], before[unnamed])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", [1, 63, 127, 1023])
def test_rows_are_added_where_their_tokens_say(device, dtype, rule, pattern, n):
    check(rule, n + 2 + 3, torch.randn(n, 33, device=device).to(dtype), PATTERNS[pattern](n).to(device))


@pytest.mark.parametrize("C", [1, 7, 64, 255, 300, 513])
def test_rows_may_have_any_width(device, dtype, rule, C):
    check(rule, 5, torch.randn(127, C, device=device).to(dtype), torch.randint(5, (127,), device=device))


@pytest.mark.parametrize(("V", "n"), [(1, 70), (3, 200), (5000, 70)])
def test_there_may_be_more_tokens_than_rows_and_fewer(device, dtype, rule, V, n):
    check(rule, V, torch.randn(n, 33, device=device).to(dtype), torch.randint(V, (n,), device=device))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_fp16_rows_are_added_in_fp32(device, rule, pattern):
    check(rule, 132, torch.randn(127, 33, device=device).half(), PATTERNS[pattern](127).to(device))


def test_the_gradient_may_have_any_strides(device, dtype, rule, strided):
    check(rule, 9, strided(torch.randn(127, 33, device=device).to(dtype)), torch.randint(9, (127,), device=device))


def test_no_tokens_change_nothing(device, dtype):
    main_grad = torch.ones(3, 5, device=device)
    add(main_grad, torch.empty(0, 5, dtype=dtype, device=device), torch.empty(0, dtype=torch.int64, device=device))
    assert (main_grad == 1.0).all()


def test_a_nan_reaches_the_row_of_its_token_alone(device, dtype):
    dy, index = torch.randn(127, 33, device=device).to(dtype), torch.arange(127, device=device) // 40
    dy[50, 7] = torch.nan
    main_grad = torch.zeros(5, 33, device=device)
    add(main_grad, dy, index)
    assert main_grad.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_the_number_of_threads_changes_no_bit(device, dtype, on_threads):
    dy, index = torch.randn(1023, 300).to(dtype), torch.randint(9, (1023,))
    main_grads = torch.zeros(2, 9, 300)
    for n in (1, 2):
        on_threads(n, lambda n=n: add(main_grads[n - 1], dy, index))
    assert torch.equal(*main_grads)


@pytest.mark.parametrize("token", [-1, 9, 2**40])
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_a_token_outside_of_the_matrix_is_refused_before_anything_is_added(device, token):
    main_grad, index = torch.zeros(9, 5), torch.arange(9)
    index[8] = token
    with pytest.raises(RuntimeError, match="index: "):
        add(main_grad, torch.ones(9, 5), index)
    assert main_grad.count_nonzero() == 0


@pytest.mark.parametrize("wrong", [torch.zeros(9, 5).bfloat16(), torch.zeros(5, 9).T])
@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_a_main_grad_that_cannot_be_added_to_is_refused(device, wrong):
    with pytest.raises((RuntimeError, ValueError), match="main_grad: expected 45 elements of float32"):
        add(wrong.to(device), torch.ones(9, 5, device=device), torch.arange(9, device=device))


def test_main_grad_of_an_embedding_receives_what_autograd_would_give(device, dtype, rule):
    weight = torch.randn(9, 33, device=device).to(dtype).requires_grad_()
    weight.main_grad = torch.ones(9, 33, device=device)
    index, dy = torch.randint(9, (4, 50), device=device), torch.randn(4, 50, 33, device=device).to(dtype)
    embedding(index, weight).backward(dy)
    assert weight.grad is None
    truth = rule.run(lambda w: F.embedding(index, w), [weight.double()], [dy.double()])[1][0]
    peer = rule.run(lambda w: F.embedding(index, w), [weight.float()], [dy.float()])[1][0]
    rule.error("main_grad", weight.main_grad - 1, [peer], truth, torch.float32, rule.gradient)


# ---- positions ----


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("with_main_grad", [True, False])
def test_positions_are_added_and_get_their_gradient(device, dtype, rule, start, with_main_grad):
    x, weight = torch.randn(4, 7, 33, device=device).to(dtype), torch.randn(11, 33, device=device).to(dtype)
    dy = torch.randn(4, 7, 33, device=device).to(dtype)
    for t in (x, weight):
        t.requires_grad_()
    if with_main_grad:
        weight.main_grad = torch.ones(11, 33, device=device)
    y = add_positions(x, weight, start)
    assert torch.equal(y, x + weight[start : start + 7])
    y.backward(dy)
    assert torch.equal(x.grad, dy)
    truth = torch.zeros(11, 33, device=device, dtype=torch.float64)
    truth[start : start + 7] = dy.double().sum(0)
    peer = torch.zeros(11, 33, device=device, dtype=dtype)
    peer[start : start + 7] = dy.sum(0)
    assert (weight.grad is None) == with_main_grad
    got = weight.main_grad - 1 if with_main_grad else weight.grad
    rule.error("gradient", got, [peer], truth, dtype, rule.gradient)


def test_positions_of_a_frozen_embedding_let_the_gradient_pass(device):
    x, weight = torch.randn(4, 7, 33, device=device, requires_grad=True), torch.randn(11, 33, device=device)
    weight.main_grad = torch.ones(11, 33, device=device)
    add_positions(x, weight, 0).sum().backward()
    assert (x.grad == 1.0).all()
    assert (weight.main_grad == 1.0).all()
