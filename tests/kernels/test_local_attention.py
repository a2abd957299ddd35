"""attention with fewer heads of keys, a window, documents and a soft cap, forward and backward."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastgpt.kernels import (
    attention,
    attention_qkv,
    document_bounds,
    document_starts,
    document_starts_from_cu_seqlens,
    use_backend,
)
from fastgpt.kernels.heads import split_qkv
from fastgpt.kernels.philox import dropout_factors
from tests.kernels.local import formula, sdpa, starts_of, visible


def operands(B, H, Hk, T, S, D, *, dtype=torch.float32, device=None):
    return [torch.randn(B, h, n, D, device=device).to(dtype) for h, n in ((H, T), (Hk, S), (Hk, S))]


# ---- as accurate as PyTorch ----


@dataclass(frozen=True)
class Case:
    """Shapes and options. Blocks of the kernels are 16 to 256 rows high: windows and documents end in and at them."""

    B: int = 1
    H: int = 2
    Hk: int = 2
    T: int = 130
    S: int | None = None
    D: int = 17
    window: int | None = None
    softcap: float | None = None
    lengths: tuple[int, ...] | None = None
    causal: bool = True

    def made(self, dtype, device):
        S = self.S or self.T
        documents = None if self.lengths is None else starts_of(list(self.lengths), S, self.B, device)
        options = {"window": self.window, "softcap": self.softcap, "documents": documents, "causal": self.causal}
        return operands(self.B, self.H, self.Hk, self.T, S, self.D, dtype=dtype, device=device), options


CASES = {
    "groups": Case(B=2, H=6, Hk=2, T=65),
    "one head of keys": Case(H=4, Hk=1, D=64),
    "groups, full": Case(B=2, H=4, Hk=2, T=63, S=130, causal=False),
    "groups, many": Case(B=1, H=40, Hk=1, T=33, D=5),
    "groups of shares": Case(B=6, H=21, Hk=3, T=17, D=8),
    "groups, later queries": Case(H=4, Hk=2, T=33, S=130),
    "window of 1": Case(T=65, window=1),
    "window of 3": Case(T=127, window=3),
    "window of 64": Case(T=200, window=64, D=64),
    "window of 65": Case(T=200, window=65),
    "window of 100": Case(B=2, T=333, window=100, D=8),
    "window, later queries": Case(T=33, S=300, window=70),
    "window, one query": Case(T=1, S=300, window=70),
    "window, seven queries": Case(T=7, S=300, window=70),
    "documents": Case(B=3, T=300, lengths=(100, 7, 1, 64, 128)),
    "documents of one token": Case(T=65, lengths=(1,)),
    "documents, later queries": Case(B=2, T=40, S=300, lengths=(90, 20)),
    "documents, few queries": Case(B=2, T=5, S=300, lengths=(90, 208, 1)),
    "soft cap": Case(T=130, softcap=2.0),
    "soft cap, full": Case(T=63, S=130, softcap=1.0, causal=False),
    "soft cap, one query": Case(T=1, S=130, softcap=1.0),
    "all": Case(B=2, H=4, Hk=2, T=200, window=70, softcap=5.0, lengths=(90, 33, 150)),
    "all, heads of 64": Case(B=1, H=2, Hk=1, T=150, D=64, window=40, softcap=5.0, lengths=(90, 33, 150)),
    "all, later queries": Case(B=2, H=4, Hk=1, T=50, S=200, window=70, softcap=5.0, lengths=(90, 33, 150)),
    "all, few queries": Case(B=2, H=4, Hk=2, T=3, S=200, window=70, softcap=5.0, lengths=(90, 33, 150)),
}
cases = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
passes = pytest.mark.parametrize("deterministic", [True, False], ids=["two passes", "one pass"])


@cases
def test_attention_is_as_accurate_as_pytorch(device, dtype, rule, case):
    inputs, options = case.made(dtype, device)
    rule.accuracy(lambda *t: attention(*t, **options), formula(**options), inputs, second_peer=sdpa(**options))


@cases
@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # the others have no such backward
def test_a_single_pass_is_as_accurate_as_pytorch(backend, device, dtype, rule, case):
    inputs, options = case.made(dtype, device)
    ours = lambda *t: attention(*t, **options, deterministic=False)  # noqa: E731
    rule.accuracy(ours, formula(**options), inputs, second_peer=sdpa(**options))


def on_packed(function, H, Hk):
    """``function`` of q, k and v as one of their packing."""
    return lambda qkv: function(*split_qkv(qkv.contiguous(), H, Hk)).transpose(1, 2).flatten(2)


PACKED = {"all", "groups", "documents", "window of 65", "soft cap"}


@pytest.mark.parametrize("name", sorted(PACKED))
def test_attention_qkv_is_as_accurate_as_pytorch(device, dtype, rule, strided, name):
    case = CASES[name]
    _, options = case.made(dtype, device)
    qkv = torch.randn(case.B, case.T, (case.H + 2 * case.Hk) * case.D, device=device).to(dtype)
    rule.accuracy(
        lambda t: attention_qkv(t, case.H, n_kv_head=case.Hk, **options),
        on_packed(formula(**options), case.H, case.Hk), [strided(qkv)],
        second_peer=on_packed(sdpa(**options), case.H, case.Hk),
    )  # fmt: skip


@pytest.mark.parametrize("incoming", [False, True], ids=["inputs", "incoming gradient"])
def test_attention_takes_any_strides(device, dtype, rule, strided, incoming):
    case = Case(B=3, H=4, Hk=2, T=65, D=20, window=30, softcap=5.0, lengths=(33, 5))
    (q, k, v), options = case.made(dtype, device)
    options["documents"] = options["documents"].t().contiguous().t()
    ours, plain = (lambda *t: attention(*t, **options)), formula(**options)
    if incoming:
        rule.accuracy(ours, plain, [q, k, v], strided, second_peer=sdpa(**options))
    else:
        rule.accuracy(ours, plain, [strided(t) for t in (q, k, v)], second_peer=sdpa(**options))


@passes
@pytest.mark.parametrize("name", ["groups", "window of 3", "documents", "all", "all, later queries"])
def test_dropout_drops_what_the_formula_drops(device, dtype, rule, name, deterministic):
    case = CASES[name]
    inputs, options = case.made(dtype, device)
    torch.manual_seed(3)  # what attention will draw
    seed = torch.randint(2**62, ())
    factors = dropout_factors(seed, 0.3, case.B, case.H, case.T, case.S or case.T).to(device)

    def ours(*t):
        torch.manual_seed(3)
        return attention(*t, **options, dropout_p=0.3, deterministic=deterministic)

    rule.accuracy(ours, formula(**options, factors=factors), inputs)


@pytest.mark.parametrize("scale", [0.0, -1.0, 2.0])
def test_scores_are_scaled_before_the_cap(device, rule, scale):
    inputs, options = Case(T=65, softcap=2.0, window=20).made(torch.float32, device)
    ours = lambda *t: attention(*t, **options, scale=scale)  # noqa: E731
    rule.accuracy(ours, formula(**options, scale=scale), inputs, second_peer=sdpa(**options, scale=scale))


@pytest.mark.parametrize("softcap", [1e-3, 0.3, 30.0, 1e4, 1e30])
def test_any_cap_is_as_accurate_as_pytorchs(device, dtype, rule, softcap):
    """A large one changes nothing, although s / cap is then near 0; a small one makes all scores +-cap."""
    inputs, options = Case(T=65, D=16, softcap=softcap).made(dtype, device)
    ours = lambda *t: attention(*t, **options)  # noqa: E731
    rule.accuracy(ours, formula(**options), inputs, second_peer=sdpa(**options))


def test_capped_scores_are_at_most_the_cap(device):
    """Two keys with scores of +-1e4 get the weights of +-5."""
    q, k = torch.full((1, 1, 1, 1), 100.0, device=device), torch.tensor([100.0, -100.0], device=device)
    out = attention(q, k.view(1, 1, 2, 1), k.new_tensor([1.0, 0.0]).view(1, 1, 2, 1), scale=1.0, softcap=5.0)
    torch.testing.assert_close(out.item(), 1 / (1 + math.exp(-10.0)))


# ---- what it is that is computed ----


def test_a_window_counts_the_query_itself(device, dtype):
    q, k, v = operands(1, 2, 2, 65, 65, 16, dtype=dtype, device=device)
    torch.testing.assert_close(attention(q, k, v, window=1), v)


def test_a_window_is_that_of_flex_attention(device):
    """That is FlashAttention's ``window_size=(window - 1, 0)``."""
    q, k, v = (t.cpu() for t in operands(2, 4, 2, 130, 130, 16))
    starts = starts_of([70, 20], 130, 2)

    def sees(b, h, query, key):
        return (query >= key) & (query - key < 40) & (starts[b, query] == starts[b, key])

    mask = create_block_mask(sees, 2, None, 130, 130, device="cpu")
    capped = lambda score, b, h, query, key: 3.0 * torch.tanh(score / 3.0)  # noqa: E731
    expected = flex_attention(q, k, v, capped, mask, enable_gqa=True)
    ours = attention(*(t.to(device) for t in (q, k, v)), window=40, softcap=3.0, documents=starts.to(device))
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5)


def gradients_of(function, inputs, seed=3):
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.manual_seed(seed)
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


def test_a_document_is_computed_as_if_it_were_alone(device, dtype):
    inputs = operands(1, 2, 1, 150, 150, 16, dtype=dtype, device=device)
    starts = document_starts_from_cu_seqlens(torch.tensor([0, 70, 71, 150]), 150).to(device)
    whole = gradients_of(lambda *t: attention(*t, documents=starts), inputs)
    dout = torch.linspace(-1, 1, whole[0].numel(), device=device).view(whole[0].shape).to(dtype)
    for begin, end in ((0, 70), (70, 71), (71, 150)):
        leaves = [t[:, :, begin:end].clone().requires_grad_() for t in inputs]
        out = attention(*leaves)
        out.backward(dout[:, :, begin:end])
        for ours, alone in zip(whole, (out, *(leaf.grad for leaf in leaves)), strict=True):
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
            torch.testing.assert_close(ours[:, :, begin:end], alone, **tolerance)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_shared_keys_give_the_bits_of_repeated_ones(device, dtype, dropout_p):
    """All but the gradients of keys and values, which are the sums of those of the repeated ones."""
    q, k, v = operands(2, 6, 2, 70, 70, 16, dtype=dtype, device=device)
    repeated = [t.repeat_interleave(3, 1) for t in (k, v)]
    function = lambda *t: attention(*t, dropout_p=dropout_p)  # noqa: E731
    shared, expected = gradients_of(function, [q, k, v]), gradients_of(function, [q, *repeated])
    assert torch.equal(shared[0], expected[0])
    assert torch.equal(shared[1], expected[1])
    for ours, each in zip(shared[2:], expected[2:], strict=True):
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.05)
        torch.testing.assert_close(ours, each.float().unflatten(1, (2, 3)).sum(2).to(dtype), rtol=rtol, atol=atol)


def test_options_that_hide_nothing_change_no_bit(device, dtype):
    inputs = operands(2, 2, 2, 70, 70, 16, dtype=dtype, device=device)
    expected = gradients_of(attention, inputs)
    for window in (70, 71, 10**18):
        got = gradients_of(lambda *t: attention(*t, window=window), inputs)  # noqa: B023
        assert all(map(torch.equal, got, expected))
    one = torch.zeros(2, 70, dtype=torch.int32, device=device)
    for a, b in zip(gradients_of(lambda *t: attention(*t, documents=one), inputs), expected, strict=True):
        rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (0.02, 0.02)
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_bounds_made_before_are_the_starts_again(device):
    inputs, options = CASES["all"].made(torch.float32, device)
    starts = options.pop("documents")
    expected = gradients_of(lambda *t: attention(*t, **options, documents=starts), inputs)
    got = gradients_of(lambda *t: attention(*t, **options, documents=document_bounds(starts)), inputs)
    assert all(map(torch.equal, got, expected))


def test_one_head_needs_no_dimension_of_its_own(device):
    (q, k, v), options = CASES["documents"].made(torch.float32, device)
    ours = attention(q[:, 0], k[:, 0], v[:, 0], **options)
    assert torch.equal(ours, attention(q[:, :1], k[:, :1], v[:, :1], **options).squeeze(1))


# ---- blocks that nobody sees ----

# No block of queries or of keys is higher: shipped configurations have at most 128 rows, the C++ kernels read 256 keys.
BLOCK = 256


compiled = pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)  # the reference computes all


@compiled
@passes
@pytest.mark.parametrize("options", [{"window": 20}, {"lengths": [400]}], ids=["window", "documents"])
def test_blocks_that_nobody_sees_are_not_computed(backend, device, dtype, options, deterministic):
    """A masked weight is 0, and 0 * NaN is NaN: a NaN is in every result of every block that reads it.

    Without a window, one key of NaN spoils all later rows, and without blocks that are left out the earlier ones too.
    """
    T, at, D = 1200, 100, 16
    q, k, v = operands(1, 1, 1, T, T, D, dtype=dtype, device=device)
    dout = torch.randn(1, 1, T, D, device=device).to(dtype)
    given = {"window": options.get("window")}
    if "lengths" in options:
        given["documents"] = starts_of(options["lengths"], T, 1, device)
    reach = 20 if "window" in options else 400 - at
    far = slice(at + reach + BLOCK, None)  # rows and keys that share no block with what sees position ``at``
    for spoilt in range(4):  # q, k, v, dout
        tensors = [t.clone() for t in (q, k, v, dout)]
        tensors[spoilt][0, 0, at] = math.nan
        leaves = [t.requires_grad_() for t in tensors[:3]]
        out = attention(*leaves, **given, deterministic=deterministic)
        out.backward(tensors[3])
        results = [out.detach(), *(leaf.grad for leaf in leaves)]
        assert any(t.isnan().any() for t in results)
        assert all(t[0, 0, far].isfinite().all() for t in results), ["q", "k", "v", "dout"][spoilt]
    with_all = attention(q, k, v.index_fill(2, torch.tensor([at], device=device), math.nan))
    assert with_all[0, 0, far].isnan().all()  # the test can fail


@compiled
@pytest.mark.parametrize("options", [{"window": 20}, {"lengths": [400]}], ids=["window", "documents"])
def test_keys_before_those_that_one_query_sees_are_not_read(backend, device, dtype, options):
    """As when a text is generated with a window: of 1200 keys, those of the last blocks."""
    for T in (1, 5, 20):
        q, k, v = operands(1, 2, 1, T, 1200, 16, dtype=dtype, device=device)
        given = {"window": options.get("window")}
        if "lengths" in options:
            given["documents"] = starts_of(options["lengths"], 1200, 1, device)
        for t in (k, v):
            t[:, :, : 1200 - 400 - BLOCK] = math.nan
        assert attention(q, k, v, **given).isfinite().all()


# ---- determinism ----


@pytest.mark.parametrize("name", ["groups, many", "groups of shares", "all"])
def test_the_same_inputs_give_the_same_bits(device, dtype, name):
    inputs, options = CASES[name].made(dtype, device)
    function = lambda *t: attention(*t, **options)  # noqa: E731
    assert all(map(torch.equal, gradients_of(function, inputs), gradients_of(function, inputs)))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("name", ["groups", "groups, many", "groups of shares", "all", "all, few queries"])
def test_the_number_of_threads_changes_no_bit(device, dtype, on_threads, name):
    inputs, options = CASES[name].made(dtype, device)
    function = lambda *t: attention(*t, **options, dropout_p=0.2)  # noqa: E731
    one, two, three = (on_threads(n, lambda: gradients_of(function, inputs)) for n in (1, 2, 3))
    assert all(map(torch.equal, one, two))
    assert all(map(torch.equal, one, three))


# ---- documents ----


def test_a_document_ends_with_its_end_of_text():
    tokens = torch.tensor([[5, 9, 9, 3, 4, 9], [1, 2, 3, 4, 5, 6], [9, 1, 1, 1, 1, 1]])
    expected = [[0, 0, 2, 3, 3, 3], [0] * 6, [0, 1, 1, 1, 1, 1]]
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        starts = document_starts(tokens.to(dtype), 9)
        assert starts.dtype == torch.int32
        assert starts.tolist() == expected
    assert document_starts(tokens.t().contiguous().t(), 9).tolist() == expected
    assert document_starts(tokens[:, :1], 9).tolist() == [[0], [0], [0]]
    assert document_starts(tokens[:, :0], 9).shape == (3, 0)


def test_running_sums_of_lengths_say_the_same():
    starts = document_starts_from_cu_seqlens(torch.tensor([0, 3, 3, 4, 6]))
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4]]
    assert starts.dtype == torch.int32
    padded = document_starts_from_cu_seqlens(torch.tensor([0, 3, 4], dtype=torch.int32), 7)
    assert padded.tolist() == [[0, 0, 0, 3, 4, 4, 4]]


def test_bounds_are_what_their_definition_says():
    starts = document_starts(torch.randint(0, 5, (3, 200)), 0)
    bounds = document_bounds(starts)
    assert bounds.shape == (3, 2, 200)
    assert bounds.dtype == torch.int32
    assert bounds.is_contiguous()
    mask = visible(200, 200, documents=starts)[:, 0]
    assert torch.equal(bounds[:, 0], starts)
    last = (mask * torch.arange(200)[:, None]).amax(1)  # of the queries that see each key
    assert torch.equal(bounds[:, 1], last.int() + 1)


MALFORMED = {
    "beyond the end": lambda S: torch.full((2, S), 2**31 - 1),
    "negative": lambda S: torch.full((2, S), -(2**31)),
    "falling": lambda S: torch.arange(S, 0, -1).expand(2, S),
    "random": lambda S: torch.randint(-(2**31), 2**31 - 1, (2, S)),
    "later than the position": lambda S: torch.arange(S).expand(2, S) + 3,
}


@pytest.mark.parametrize("name", list(MALFORMED))
def test_starts_that_make_no_sense_are_moved(device, dtype, name):
    starts = MALFORMED[name](130).to(torch.int32).to(device)
    inputs = operands(2, 2, 2, 130, 130, 16, dtype=dtype, device=device)
    bounds = document_bounds(starts)
    positions = torch.arange(130, device=device)
    assert (bounds[:, 0] <= positions).all()
    assert (bounds[:, 1] > positions).all()
    assert (bounds >= 0).all()
    assert (bounds <= 130).all()
    got = gradients_of(lambda *t: attention(*t, documents=starts), inputs)
    expected = gradients_of(lambda *t: attention(*t, documents=bounds), inputs)
    assert all(map(torch.equal, got, expected))


@passes
@pytest.mark.parametrize("name", list(MALFORMED))
@pytest.mark.parametrize("T", [1, 40, 130])
def test_bounds_that_make_no_sense_do_no_harm(device, dtype, name, T, deterministic):
    """Nothing outside the tensors is read or written: what lies around them is NaN, and no NaN comes out."""
    bounds = torch.stack([MALFORMED[name](130), MALFORMED[name](130).flip(0)], 1).to(torch.int32).to(device)
    around = [torch.full((2, 2, 130 + 2 * 130, 16), math.nan, dtype=dtype, device=device) for _ in range(3)]
    inputs = operands(2, 2, 2, T, 130, 16, dtype=dtype, device=device)
    for larger, t in zip(around, inputs, strict=True):
        larger[:, :, 130 : 130 + t.shape[2]] = t
    leaves = [larger[:, :, 130 : 130 + t.shape[2]].requires_grad_() for larger, t in zip(around, inputs, strict=True)]
    out = attention(*leaves, documents=bounds, deterministic=deterministic)
    for t in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert t.isfinite().all()


# ---- arguments ----


def wrong_arguments():
    q = torch.randn(2, 4, 5, 8)
    starts = torch.zeros(2, 5, dtype=torch.int32)
    yield "k: heads that do not divide", "k", ValueError, (q, q[:, :3], q[:, :3]), {}
    yield "k: more heads", "k", ValueError, (q[:, :2], q, q), {}
    yield "k: no heads", "k", ValueError, (q, q[:, :0], q[:, :0]), {}
    yield "v: other heads than k", "v", ValueError, (q, q[:, :2], q[:, :1]), {}
    for window in (0, -1):
        yield f"window: {window}", "window", ValueError, (q, q, q), {"window": window}
    for window in (2.0, "2", True, torch.tensor(2)):
        yield f"window: {window!r}", "window", TypeError, (q, q, q), {"window": window}
    yield "window: full", "window", ValueError, (q, q, q), {"window": 2, "causal": False}
    for softcap in (0.0, -1.0, math.nan, math.inf, 1e-31, 1e31):
        yield f"softcap: {softcap}", "softcap", ValueError, (q, q, q), {"softcap": softcap}
    for softcap in ("1", True, torch.tensor(1.0)):
        yield f"softcap: {softcap!r}", "softcap", TypeError, (q, q, q), {"softcap": softcap}
    yield "documents: full", "documents", ValueError, (q, q, q), {"documents": starts, "causal": False}
    yield "documents: int64", "documents", TypeError, (q, q, q), {"documents": starts.long()}
    yield "documents: a list", "documents", TypeError, (q, q, q), {"documents": starts.tolist()}
    yield "documents: device", "documents", ValueError, (q, q, q), {"documents": starts.to("meta")}
    for shape in ((2, 4), (1, 5), (5,), (2, 3, 5), (2, 2, 4)):
        documents = torch.zeros(shape, dtype=torch.int32)
        yield f"documents: {shape}", "documents", ValueError, (q, q, q), {"documents": documents}


@pytest.mark.parametrize(
    ("name", "error", "arguments", "options"), [pytest.param(*case[1:], id=case[0]) for case in wrong_arguments()]
)
def test_a_wrong_argument_is_named(name, error, arguments, options):
    with pytest.raises(error, match=rf"^{name}: [^\n]*\Z"):
        attention(*arguments, **options)


@pytest.mark.parametrize(
    ("name", "error", "width", "n_head", "n_kv_head"),
    [
        ("n_kv_head", ValueError, 24, 4, 3),
        ("n_kv_head", ValueError, 24, 4, 0),
        ("n_kv_head", ValueError, 24, 4, 8),
        ("n_kv_head", TypeError, 24, 4, 2.0),
        ("n_kv_head", TypeError, 24, 4, True),
        ("qkv", ValueError, 26, 4, 2),
        ("qkv", ValueError, 257 * 8, 4, 2),
        ("n_head", ValueError, 24, 0, 1),
        ("n_head", ValueError, 24, -4, 2),
    ],
)
def test_a_wrong_number_of_packed_heads_is_named(name, error, width, n_head, n_kv_head):
    with pytest.raises(error, match=rf"^{name}: [^\n]*\Z"):
        attention_qkv(torch.randn(2, 5, width), n_head, n_kv_head=n_kv_head)


@pytest.mark.parametrize(
    ("name", "error", "function", "arguments"),
    [
        ("tokens", TypeError, document_starts, (torch.rand(2, 3), 1)),
        ("tokens", TypeError, document_starts, ([[1, 2]], 1)),
        ("tokens", ValueError, document_starts, (torch.ones(3, dtype=torch.int64), 1)),
        ("end_of_text", TypeError, document_starts, (torch.ones(2, 3, dtype=torch.int64), None)),
        ("cu_seqlens", TypeError, document_starts_from_cu_seqlens, (torch.rand(3),)),
        ("cu_seqlens", ValueError, document_starts_from_cu_seqlens, (torch.ones(2, 3, dtype=torch.int32),)),
        ("cu_seqlens", ValueError, document_starts_from_cu_seqlens, (torch.ones(0, dtype=torch.int32),)),
        ("length", ValueError, document_starts_from_cu_seqlens, (torch.zeros(2, dtype=torch.int32),)),
        ("length", TypeError, document_starts_from_cu_seqlens, (torch.zeros(2, dtype=torch.int32), 3.0)),
        ("starts", TypeError, document_bounds, (torch.zeros(2, 3, dtype=torch.int64),)),
        ("starts", ValueError, document_bounds, (torch.zeros(3, dtype=torch.int32),)),
    ],
)
def test_a_wrong_argument_of_documents_is_named(name, error, function, arguments):
    with pytest.raises(error, match=rf"^{name}: [^\n]*\Z"):
        function(*arguments)


def test_an_empty_batch_has_gradients(device):
    leaves = [torch.randn(0, h, 5, 4, device=device, requires_grad=True) for h in (4, 2, 2)]
    documents = torch.zeros(0, 5, dtype=torch.int32, device=device)
    out = attention(*leaves, window=2, softcap=1.0, documents=documents)
    assert out.shape == (0, 4, 5, 4)
    out.sum().backward()
    assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]
    assert attention_qkv(torch.randn(0, 5, 32, device=device), 4, n_kv_head=2, documents=documents).shape == (0, 5, 16)


def test_float64_gradients_agree_with_finite_differences():
    q, k, v = (torch.randn(2, h, 7, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    options = {"window": 3, "softcap": 1.0, "documents": starts_of([5, 1], 7, 2)}
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **options), (q, k, v))
    qkv = torch.randn(2, 7, 8 * 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: attention_qkv(t, 4, n_kv_head=2, **options), (qkv,))


def test_the_operators_refuse_what_would_be_read_elsewhere(backend, device):
    """They may be called without the functions that check their arguments."""
    q, k, v = operands(1, 1, 1, 5, 3, 16, device=device)
    if backend == "reference":
        pytest.skip("PyTorch's own operators check")
    name = {"cpp": "fastgpt", "triton": "fastgpt.kernels.triton"}[backend]
    if name == "fastgpt":
        run = torch.ops.fastgpt.attention
    else:
        from fastgpt.kernels.triton import IMPLEMENTATIONS

        run = IMPLEMENTATIONS["attention"]
    short = torch.zeros(1, 2, 4, dtype=torch.int32, device=device)
    for arguments in (
        (q, k, v, True, 1.0, 0.0, None, 2),  # more queries than keys
        (q, q, q, False, 1.0, 0.0, None, 2),  # not causal
        (q, q, q, True, 1.0, 0.0, None, 0, 0.0, short),
        (q, q, q, True, 1.0, 0.0, None, 0, 0.0, torch.zeros(1, 2, 5, device=device)),  # not int32
    ):
        with pytest.raises(RuntimeError, match=r"causal|documents"):
            run(*arguments)


def test_half_precision_on_a_cpu_runs_on_the_reference(rule):
    inputs, options = Case(T=33, H=4, Hk=2, D=8, window=9, softcap=2.0, lengths=(20, 5)).made(torch.float16, "cpu")
    with use_backend("auto"):
        rule.accuracy(lambda *t: attention(*t, **options), formula(**options), inputs)
