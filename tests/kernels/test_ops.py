"""The seam: operators as the dispatcher sees them, the choice of the backend, what importing does and does not do."""

import ctypes
import datetime
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastgpt.kernels
from fastgpt import hardware
from fastgpt.kernels import (
    add_layer_norm,
    add_rms_norm,
    attention,
    attention_qkv,
    backends,
    cross_entropy,
    dispatch,
    geglu,
    gelu,
    layer_norm,
    linear_cross_entropy,
    ops,
    reference,
    relu2,
    rms_norm,
    rms_norm_rotary,
    rotary,
    rotary_qkv,
    rotary_tables,
    swiglu,
    use_backend,
)
from fastgpt.kernels.glu import halves

ROOT = Path(fastgpt.__file__).parents[1]
ORDER = ["default", *hardware.ISAS]  # of instruction sets, the narrowest first
ISAS = ["default", "avx2", "avx512", "avx512_bf16"]  # with a library of their own


def python(code, path=ROOT, **environment):
    """What ``code`` prints in a fresh interpreter that finds fastgpt under ``path``."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    variables = {k: v for k, v in os.environ.items() if k != "FASTGPT_BACKEND"}
    variables |= {"PYTHONPATH": str(path), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


# ---- the operators ----


def cases(dtype):
    """Arguments for every operator, with and without the optional ones."""

    def r(*shape):
        return torch.randn(shape).to(dtype)

    seed, targets = torch.tensor(3), torch.tensor([0, -1, 2])
    rows, lse = torch.randn(3, 4), torch.randn(2, 3, 5)
    turned = r(4, 3, 7).transpose(0, 1)
    heads, keys, qkv = r(2, 3, 5, 8), r(2, 3, 6, 8), r(2, 5, 12)

    def adamw(copies, scale):
        tensors = [[r(3, 5), r(7)] for _ in range(4)]
        tensors[3] = [t.abs() for t in tensors[3]]
        twins = [t.bfloat16() for t in tensors[0]] if copies else []
        step, lr = torch.tensor(1.0), torch.tensor(1e-3, dtype=torch.float64)
        return (*tensors, twins, step, lr, torch.tensor(0.5) if scale else None, 0.9, 0.99, 1e-8, 0.1, copies)

    def compact(eight_bits, stochastic_rounding):
        params, grads, exp_avgs, exp_avg_sqs, twins, *rest, zero_grad = adamw(eight_bits, stochastic_rounding)
        scales = []
        if eight_bits:
            exp_avgs, exp_avg_sqs = ([torch.randint(256, t.shape).to(torch.uint8) for t in params] for _ in range(2))
            scales = [torch.full((1,), 2.0**-3) for _ in params]
        *before_seed, beta1, beta2, eps, weight_decay = rest
        return (
            params, grads, exp_avgs, exp_avg_sqs, scales, [t.clone() for t in scales], twins, *before_seed, seed,
            beta1, beta2, eps, weight_decay, zero_grad, stochastic_rounding,
        )  # fmt: skip

    f = torch.randn  # this operator is for fp32 alone
    yield "matmul_", (f(3, 5), f(3, 4), f(5, 4).t(), f(5), False, None)
    yield "matmul_", (f(3, 5), f(3, 4), f(4, 5), None, True, f(3))
    yield "matmul_", (f(3, 5), f(3, 4), f(4, 5), None, False, f(3))
    yield "add_column_sums_", (f(7), turned.reshape(12, 7))
    yield "embedding_backward_", (f(9, 7), turned.reshape(12, 7), torch.arange(12) % 5)
    yield "layer_norm", (r(3, 4, 7), r(7), r(7), 1e-5)
    yield "layer_norm", (turned, r(7), None, 1e-5)
    yield "add_layer_norm", (r(3, 4, 7), r(3, 4, 7), r(7), r(7), 1e-5)
    yield "add_layer_norm", (turned, r(3, 4, 7), r(7), None, 1e-5)
    yield "layer_norm_backward", (r(3, 4, 7), None, r(3, 4, 7), r(7), rows, rows, True)
    yield "layer_norm_backward", (r(3, 4, 7), r(3, 4, 7), turned, r(7), rows, rows, False)
    yield "layer_norm_backward", (r(3, 4, 7), None, r(3, 4, 7), r(7), rows, rows, True, f(7), f(7))
    yield "layer_norm_backward", (r(3, 4, 7), None, r(3, 4, 7), r(7), rows, rows, True, None, f(7))
    yield "layer_norm_backward", (r(3, 4, 7), None, r(3, 4, 7), r(7), rows, rows, False, f(7), None, f(7))
    yield "rms_norm", (r(3, 4, 7), r(7), 1e-6)
    yield "rms_norm", (turned, None, 1e-6)
    yield "add_rms_norm", (r(3, 4, 7), r(3, 4, 7), r(7), 1e-6)
    yield "add_rms_norm", (turned, r(3, 4, 7), None, 1e-6)
    yield "rms_norm_backward", (r(3, 4, 7), None, r(3, 4, 7), r(7), rows)
    yield "rms_norm_backward", (r(3, 4, 7), r(3, 4, 7), turned, None, rows)
    yield "rms_norm_backward", (r(3, 4, 7), r(3, 4, 7), turned, r(7), rows, f(7))
    yield "gelu", (turned, None, True)
    yield "gelu", (r(3, 4), r(4), False)
    yield "gelu_backward", (turned, r(3, 4, 7), r(7), True)
    yield "gelu_backward", (r(3, 4), r(3, 4), None, False)
    yield "gelu_backward", (turned, r(3, 4, 7), r(7), True, f(7))
    yield "gelu_backward_recompute_", (r(3, 4, 7), turned, r(7), True)
    yield "gelu_backward_recompute_", (r(3, 4, 7), turned, r(7), True, f(7))
    yield "gelu_backward_recompute_", (r(3, 4), r(3, 4), None, False)
    yield "relu2", (turned,)
    yield "relu2_backward", (turned, r(3, 4, 7))
    yield "relu2_backward_recompute_", (r(3, 4, 7), turned)
    for activation in (ops.SILU, ops.GELU_TANH, ops.GELU_EXACT):
        yield "glu", (turned, r(3, 4, 7), activation)
        yield "glu_backward_", (*halves(r(3, 4, 14)), turned, *halves(r(3, 4, 14)), activation)
        yield "glu_backward_", (r(3, 4, 7), r(3, 4, 7), turned, r(3, 4, 7), turned, activation, r(3, 4, 7))
    yield "attention", (heads, heads, heads, True, 0.5, 0.0, None)
    yield "attention", (heads.transpose(1, 2), heads.transpose(1, 2), heads.transpose(1, 2), True, 0.5, 0.2, seed)
    yield "attention_backward", (heads, heads, heads, heads, heads, lse, True, 0.5, 0.2, seed)
    yield "attention_backward", (heads, heads, keys, keys, heads, lse, False, 0.5, 0.0, None)
    yield "attention_backward", (heads, heads, heads, heads, heads, lse, True, 0.5, 0.2, seed, False)
    documents = torch.tensor([[[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]]], dtype=torch.int32).expand(2, 2, 5)
    shared = heads[:, :1]
    yield "attention", (heads, shared, shared, True, 0.5, 0.2, seed, 3, 2.0, documents)
    yield (
        "attention_backward",
        (heads, heads, shared, shared, heads, lse, True, 0.5, 0.2, seed, True, 3, 2.0, documents),
    )
    yield "attention_qkv", (r(2, 5, 16), 4, True, 0.5, 0.0, None, 2, 3, 2.0, documents)
    yield (
        "attention_qkv_backward",
        (
            r(2, 5, 8),
            r(2, 5, 16),
            r(2, 5, 8),
            torch.randn(2, 4, 5),
            4,
            True,
            0.5,
            0.0,
            None,
            True,
            2,
            3,
            2.0,
            documents,
        ),
    )
    yield "attention_qkv", (qkv, 2, True, 0.5, 0.0, None)
    yield "attention_qkv", (r(5, 2, 12).transpose(0, 1), 2, False, 0.5, 0.2, seed)
    yield "attention_qkv_backward", (r(2, 5, 4), qkv, r(2, 5, 4), torch.randn(2, 2, 5), 2, True, 0.5, 0.0, None)
    yield "attention_qkv_backward", (r(2, 5, 4), qkv, r(2, 5, 4), torch.randn(2, 2, 5), 2, True, 0.5, 0.2, seed)
    yield "attention_qkv_backward", (r(2, 5, 4), qkv, r(2, 5, 4), torch.randn(2, 2, 5), 2, True, 0.5, 0.0, None, False)
    angles, by_sequence, each = (f(5, 4), f(5, 4)), (f(2, 5, 4), f(2, 5, 4)), torch.rand(2, 5, 3)
    several, part, wide_qkv = r(2, 5, 3, 8), r(2, 5, 40).unflatten(-1, (5, 8))[:, :, :3], r(2, 5, 40)
    for turn, interleaved in ((angles, False), (by_sequence, True)):
        yield "rotary", (part, *turn, interleaved, interleaved)
        yield "rotary_", (part, *turn, interleaved, interleaved)
    for turn in (angles, (None, None)):
        yield "rms_norm_rotary", (part, r(8), *turn, 1e-5, True)
        yield "rms_norm_rotary_", (part, *turn, 1e-5, False)
        yield "rms_norm_rotary_backward", (several, part, r(8), *turn, each, False)
        yield "rms_norm_rotary_backward_", (part, several, *turn, each, True)
    yield "rms_norm_rotary", (heads.transpose(1, 2), None, *by_sequence, 1e-5, False)
    yield "rms_norm_rotary_backward", (several, part, None, *by_sequence, each, True)
    yield "rms_norm_rotary_backward", (several, part, r(8), *by_sequence, each, True, f(8))
    yield "rotary_qkv", (wide_qkv, 3, 1, *angles, False, 0.0, False)
    yield "rotary_qkv", (r(5, 2, 32).transpose(0, 1), 2, 1, *by_sequence, True, 1e-5, True)
    yield "rotary_qkv_backward", (wide_qkv[..., :32], None, None, 2, 1, *angles, False)
    yield "rotary_qkv_backward", (r(2, 5, 32), r(2, 5, 32), each, 2, 1, None, None, True)
    yield "cross_entropy", (r(3, 5), targets, -1)
    yield "cross_entropy_backward", (torch.randn(3), r(3, 5), targets, torch.randn(3), -1)
    yield "cross_entropy_", (r(3, 5), targets, torch.tensor(0.5), -1)
    for needs_dx in (True, False):
        for needs_dweight in (True, False):
            yield "linear_cross_entropy", (r(3, 5), r(7, 5), targets, -1, None, needs_dx, needs_dweight)
    yield "linear_cross_entropy", (r(3, 5), r(7, 5), targets, -1, torch.tensor(0.5), True, True)
    for options in ((3.0, 0.1, 0.2, f(5).abs()), (3.0, 0.0, 0.2, None), (0.0, 0.1, 0.0, f(5).abs())):
        yield "cross_entropy", (r(3, 5), targets, -1, *options)
        yield "cross_entropy_backward", (f(3), r(5, 3).t(), targets, f(3), -1, *options)
        yield "cross_entropy_", (r(3, 5), targets, torch.tensor(0.5), -1, *options)
        yield "cross_entropy_", (r(3, 5), targets, f(3), -1, *options)
        yield "linear_cross_entropy", (r(3, 4), r(5, 4), targets, -1, None, True, True, *options, "sum")
        yield "linear_cross_entropy", (r(3, 4), r(5, 4), targets, -1, None, False, False, *options, "none")
        yield "linear_cross_entropy_backward", (f(3), r(3, 4), r(5, 4), targets, -1, True, True, *options)
        yield "linear_cross_entropy_backward", (f(3), r(3, 4), r(5, 4), targets, -1, False, True, *options)
    yield "grad_norm", ([r(3, 5), r(7)],)
    yield "adamw_", adamw(copies=False, scale=False)
    yield "adamw_", adamw(copies=True, scale=True)
    for found_inf in (torch.tensor(0.0), torch.tensor(1.0)):
        yield "adamw_", (*adamw(copies=True, scale=True), found_inf)
        yield "adamw_8bit_", (*compact(eight_bits=True, stochastic_rounding=False), found_inf)
        yield "adamw_8bit_", (*compact(eight_bits=False, stochastic_rounding=True), found_inf)
    yield "adamw_8bit_", compact(eight_bits=True, stochastic_rounding=False)
    yield "adamw_8bit_", compact(eight_bits=False, stochastic_rounding=True)


def test_every_operator_has_a_case():
    assert {name for name, _ in cases(torch.float32)} == set(ops.OPERATORS)


@pytest.mark.parametrize("name", ops.OPERATORS)
def test_the_table_describes_every_tensor_of_an_operator(name):
    schema = getattr(torch.ops.fastgpt, name).default._schema
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type)]
    described = ops.OPERATORS[name].fake.__doc__
    assert [t for t in (*tensors, *(r.name for r in schema.returns)) if not re.search(rf"\b{t}\b", described)] == []


def test_the_compiled_backends_have_every_operator_but_those_that_plain_pytorch_runs():
    from fastgpt.kernels.triton import IMPLEMENTATIONS

    ours = ops.OPERATORS.keys() - dispatch.LEFT_TO_TORCH["triton"]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {name for name in ops.OPERATORS if has_kernel(f"fastgpt::{name}", "CUDA")} == ours
    made_of_others = {"linear_cross_entropy", "linear_cross_entropy_backward"}
    assert set(IMPLEMENTATIONS) == ours - made_of_others


@pytest.mark.parametrize("number", range(len(list(cases(torch.float32)))))
@pytest.mark.parametrize("place", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_every_operator_passes_opcheck(dtype, place, number):
    """Schema (what it mutates, what it aliases), fake (shapes and strides) and tracing under AOTAutograd."""
    with torch.device(place):
        name, arguments = list(cases(dtype))[number]
    torch.library.opcheck(getattr(torch.ops.fastgpt, name).default, arguments)


def test_the_reference_passes_opcheck_too():
    """With nothing compiled loaded, the same operators run on the reference."""
    tests = f"{Path(__file__)}::test_every_operator_passes_opcheck"
    code = f"import pytest, sys; sys.exit(pytest.main(['-p', 'no:cacheprovider', '-k', 'float32 and cpu', {tests!r}]))"
    out, _ = python(code, FASTGPT_BACKEND="reference")
    assert f"{len(list(cases(torch.float32)))} passed" in out


# ---- the choice ----


def random(*shape, **options):
    return torch.randn(shape, requires_grad=True, **options)


def calls():
    """Every differentiable public function on small inputs."""

    def targets():
        return torch.tensor([1, -1, 4])

    yield "layer_norm", layer_norm, [random(3, 8), random(8), random(8)]
    yield "add_layer_norm", lambda *t: add_layer_norm(*t)[0], [random(3, 8), random(3, 8), random(8)]
    yield "rms_norm", rms_norm, [random(3, 8), random(8)]
    yield "add_rms_norm", lambda *t: add_rms_norm(*t)[0], [random(3, 8), random(3, 8), random(8)]
    yield "gelu", gelu, [random(3, 8)]
    yield "relu2", relu2, [random(3, 8)]
    yield "swiglu", swiglu, [random(3, 8), random(3, 8)]
    yield "swiglu, packed", swiglu, [random(3, 8)]
    yield "geglu", geglu, [random(3, 8), random(3, 8)]
    yield "attention", attention, [random(2, 3, 20, 8) for _ in range(3)]
    yield "attention_qkv", lambda t: attention_qkv(t, 2), [random(2, 20, 24)]
    yield "rotary", lambda t: rotary(t, *rotary_tables(20, 8)), [random(2, 20, 3, 8)]
    yield (
        "rms_norm_rotary",
        lambda *t: rms_norm_rotary(t[0], *rotary_tables(20, 8), t[1]),
        [random(2, 20, 3, 8), random(8)],
    )
    yield "rotary_qkv", lambda t: rotary_qkv(t, 2, *rotary_tables(20, 4), qk_norm=True), [random(2, 20, 24)]
    yield "cross_entropy", lambda t: cross_entropy(t, targets()), [random(3, 5)]
    yield "linear_cross_entropy", lambda *t: linear_cross_entropy(*t, targets()), [random(3, 8), random(5, 8)]
    options = {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2, "reduction": "none"}
    yield "cross_entropy, options", lambda t: cross_entropy(t, targets(), **options), [random(3, 5)]
    yield (
        "linear_cross_entropy, options",
        lambda *t: linear_cross_entropy(*t, targets(), **options),
        [random(3, 8), random(5, 8)],
    )


@pytest.fixture(params=[name for name, *_ in calls()])
def call(request):
    """One of them, its inputs made where the backend of the test wants them."""
    return next((function, inputs) for name, function, inputs in calls() if name == request.param)


def test_a_forward_on_one_backend_and_a_backward_on_another_agree(backend, call):
    function, inputs = call
    leaves = [t.detach().mT.clone(memory_format=torch.contiguous_format).mT.requires_grad_() if t.dim() > 1 else t
              for t in inputs]  # fmt: skip

    def gradients(first, second):
        with use_backend(first):
            out = function(*leaves)
        with use_backend(second):
            return torch.autograd.grad(out, leaves, torch.linspace(1, 2, out.numel()).view(out.shape))

    for ours, theirs in zip(gradients("reference", backend), gradients(backend, backend), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_autograd_leaves_undefined_stops_there(backend, call):
    function, inputs = call

    class Wall(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return None

    for leaf in inputs:
        leaf.grad = None
    Wall.apply(function(*inputs)).sum().backward()
    assert all(leaf.grad is None or leaf.grad.count_nonzero() == 0 for leaf in inputs)


def test_backends_agree(backend, call):
    function, inputs = call

    def results():
        out = function(*inputs)
        return out, *torch.autograd.grad(out, inputs, torch.linspace(1, 2, out.numel()).view(out.shape))

    ours = results()
    with use_backend("reference"):
        theirs = results()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_forced_backend_that_cannot_take_a_tensor_says_so(call):
    function, inputs = call
    doubles = [t.detach().double() for t in inputs]
    for name in ("cpp", "triton"):
        with use_backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' cannot run torch.float64 on cpu"):
            function(*doubles)


def test_use_backend_holds_inside_the_block_and_no_longer():
    def now():
        return dispatch.backend_of("cpu", torch.float32)

    before = now()
    with use_backend("reference"):
        assert now() == ("reference", "chosen")
        with use_backend("auto"):
            assert now()[0] != "reference" or dispatch.backend_of("cpu", torch.float32)[1] != "chosen"
        assert now() == ("reference", "chosen")
    assert now() == before
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        raise ZeroDivisionError
    assert now() == before


def test_an_unknown_backend_is_refused_by_name():
    with (
        pytest.raises(ValueError, match=r"^name: expected one of auto, triton, cpp, reference, got 'mps'$"),
        use_backend("mps"),
    ):
        pass


def test_backends_says_what_each_operator_runs_on_and_why(backend, device):
    table = backends()[device.type]
    assert set(table) == set(ops.OPERATORS)
    for name, answer in table.items():
        tensor = torch.empty(0, device=device)
        expected = "reference" if dispatch.resolve(name, tensor) is getattr(reference, name) else backend
        assert re.fullmatch(rf"{expected} \(.+\)", answer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_backends_says_so_where_the_chosen_one_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with use_backend("triton"):
        answers = set(backends()["cpu"].values())
    assert answers == {"none (backend 'triton' cannot run torch.float32 on cpu: it needs an NVIDIA GPU)"}


def test_float64_runs_on_the_reference_without_being_asked():
    with use_backend("auto"):
        assert dispatch.backend_of("cpu", torch.float64)[0] == "reference"
        assert dispatch.backend_of("cpu", torch.float16)[0] == "reference"


# ---- imports, each in a fresh interpreter ----

LOADED = """
    import sys, torch
    before = set(sys.modules)
    import fastgpt.kernels
    from fastgpt.kernels import dispatch, ops
    x = torch.randn(3, 8, requires_grad=True)
    fastgpt.kernels.layer_norm(x, torch.ones(8)).sum().backward()
    print(sorted(torch.ops.loaded_libraries))
    print(*sorted(m for m in set(sys.modules) - before if m.split(".")[0] in ("fastgpt", "triton")))
    print(dispatch.backends()["cpu"]["layer_norm"])
"""


def test_asked_for_the_reference_nothing_compiled_is_loaded():
    out, err = python(LOADED, FASTGPT_BACKEND="reference")
    libraries, _, answer = out.splitlines()
    assert libraries == "[]"
    assert answer == "reference (FASTGPT_BACKEND=reference)"
    assert err == ""


def test_importing_the_kernels_imports_neither_triton_nor_the_rest_of_fastgpt(tmp_path):
    (tmp_path / "triton").mkdir()  # stands in for Triton where there is none, and would be found first
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.6.0'\n")
    out, _ = python(LOADED, path=f"{tmp_path}{os.pathsep}{ROOT}", FASTGPT_BACKEND="reference")
    modules = out.splitlines()[1].split()
    assert "fastgpt.kernels.ops" in modules
    assert [m for m in modules if not (m == "fastgpt" or m.startswith("fastgpt.kernels"))] == []


def test_an_unknown_name_in_the_environment_warns_and_is_ignored():
    code = """
        import torch
        from fastgpt.kernels import dispatch
        print(*(dispatch.backend_of("cpu", dtype) for dtype in (torch.float32, torch.float64)))
    """
    out, err = python(code, FASTGPT_BACKEND="cuda")
    assert (out, "") == python(code, FASTGPT_BACKEND="auto")
    assert "FASTGPT_BACKEND: expected one of auto, triton, cpp, reference, got 'cuda'" in err


WARNINGS = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        before = len(caught)
        from fastgpt.kernels import backends, gelu
        x = torch.randn(3, 8, requires_grad=True)
        for _ in range(3):
            gelu(x).sum().backward()
    print(len(caught) - before)
    print(caught[-1].message)
    print(backends()["cpu"]["gelu"])
    print(torch.equal(gelu(x), torch.nn.functional.gelu(x, approximate="tanh")))
"""


@pytest.mark.parametrize(
    ("libraries", "reason"),
    [
        ([], "the C++ kernels are not built"),
        (["_cpu_avx2", "_cpu_avx512", "_cpu_avx512_bf16", "_cpu_default"], "does not load: "),
        (["_cpu_other"], "the build has _cpu_other.abi3.so"),
    ],
    ids=["not built", "broken", "for another CPU"],
)
def test_a_machine_without_the_library_warns_once_in_one_line_and_works(tmp_path, libraries, reason):
    shutil.copytree(ROOT / "fastgpt", tmp_path / "fastgpt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in libraries:
        (tmp_path / "fastgpt" / "kernels" / f"{name}.abi3.so").write_bytes(b"not a library")
    out, _ = python(WARNINGS, path=tmp_path)
    count, message, answer, right = out.splitlines()  # one line each
    assert count == "1"
    assert message.startswith("fastgpt runs on plain PyTorch, slower: ")
    assert reason in message
    assert answer.startswith("reference (")
    assert reason in answer
    assert right == "True"


@pytest.mark.parametrize(
    ("before", "run", "expected"),
    [
        ("", "gelu(x.half()); gelu(x.half()); layer_norm(x.half(), x[0].half())", ["take float32 and bfloat16, not"]),
        ("", "gelu(x.half()); gelu(x.double())", ["not torch.float16", "not torch.float64"]),
        ("", "torch.compile(gelu, fullgraph=True, backend='eager')(x.half())", ["not torch.float16"]),
        ("", "gelu(x); gelu(x.bfloat16())", []),
        ("", "gelu(x.half().to('meta'))", []),
        ("chosen = use_backend('reference'); chosen.__enter__()", "gelu(x); gelu(x.half())", []),
    ],
    ids=["once", "once a reason", "compiled", "fast", "no data", "asked for"],
)
def test_nobody_runs_the_slow_path_without_being_told_once(before, run, expected):
    code = f"""
        import warnings, torch
        from fastgpt.kernels import gelu, layer_norm, use_backend
        x = torch.randn(4, 8)
        {before}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            {run}
        print("\\n".join(str(w.message) for w in caught if "fastgpt" in str(w.message)))
    """
    if dispatch.backends()["cpu"]["gelu"].startswith("reference"):
        pytest.skip("the C++ kernels are not built")
    lines = python(code)[0].splitlines()
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith("fastgpt runs on plain PyTorch, slower: ")
        assert part in line


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("isa", ISAS)
def test_a_narrower_instruction_set_keeps_the_error_rule_too(backend, isa):
    """PyTorch, oneDNN and MKL are held to it together: held alone, one asks the other for what it lacks.

    Each takes twenty seconds. So every day has one of them; ``FASTGPT_TEST_ALL=1`` takes all.
    """
    narrower = [name for name in ISAS if ORDER.index(name) < ORDER.index(hardware.isa())]
    if isa not in narrower:
        pytest.skip(f"the tests run on {hardware.isa()} already")
    if "FASTGPT_TEST_ALL" not in os.environ and isa != narrower[datetime.date.today().toordinal() % len(narrower)]:
        pytest.skip("another day's")
    code = """
        import sys, pytest, fastgpt.kernels
        print(fastgpt.kernels.backends()["cpu"]["gelu"])
        sys.exit(pytest.main(["-p", "no:cacheprovider", "-k",
                              "cpp and (as_accurate or any_strides or mask or sums_the_rows or lies_around)", *FILES]))
    """
    tested = (
        "layer_norm", "rms_norm", "gelu", "relu2", "glu", "attention", "rotary", "cross_entropy", "linear",
        "linear_cross_entropy", "loss_options", "surroundings",
    )  # fmt: skip
    code = code.replace("FILES", repr([str(Path(__file__).with_name(f"test_{name}.py")) for name in tested]))
    out, _ = python(code, **hardware.environment_for(isa))
    assert out.splitlines()[0] == f"cpp ({isa})"
    assert int(re.search(r"(\d+) passed", out)[1]) > 200


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_where_linux_refuses_the_registers_of_tiles_the_next_best_product_runs(backend, tmp_path):
    compiler = shutil.which("cc")
    if hardware.isa() != "amx" or compiler is None:
        pytest.skip("needs a CPU with AMX and a C compiler")
    refusal = """
        #include <errno.h>
        #include <stdarg.h>
        #include <dlfcn.h>
        long syscall(long number, ...) {
          long a[6];
          va_list rest;
          va_start(rest, number);
          for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
          va_end(rest);
          if (number == 158 && a[0] == 0x1023) { errno = EINVAL; return -1; }  /* arch_prctl, ARCH_REQ_XCOMP_PERM */
          long (*real)(long, ...) = dlsym(RTLD_NEXT, "syscall");
          return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
        }
    """
    source, library = tmp_path / "refusal.c", tmp_path / "refusal.so"
    source.write_text("#define _GNU_SOURCE\n" + textwrap.dedent(refusal))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    code = """
        import torch
        from fastgpt.kernels import dispatch, linear, ops
        print(dispatch.EXTENSION.products == dispatch.EXTENSION.products - {(torch.bfloat16, torch.bfloat16)})
        x, weight = torch.randn(40, 33).bfloat16(), torch.randn(20, 33).bfloat16()
        out = torch.zeros(40, 20)
        torch.ops.fastgpt.matmul_(out, x, weight.T, None, True, None)
        torch.testing.assert_close(out, x.float() @ weight.float().T)
        torch.testing.assert_close(linear(x, weight).float(), out, rtol=0.01, atol=0.01)
        print("right")
    """
    out, _ = python(code, LD_PRELOAD=str(library))
    assert out.split() == ["True", "right"]


# ---- these tests' own ground ----


def test_memory_is_handed_out_full_of_nan(memory_of_nan):
    """To ``torch.empty`` and, by the call that csrc/tensor.h makes, to the C++ kernels.

    Not the smallest pieces: glibc hands out those of up to 1032 bytes that a thread freed last as they are.
    """
    if not memory_of_nan:
        pytest.skip("no glibc")
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    for n in (1000, 100_000, 3_000_000):
        assert torch.empty(n).isnan().all()
        handle, address = ctypes.c_void_p(), ctypes.c_void_p()
        failed = library.aoti_torch_empty_strided(
            ctypes.c_int64(1), (ctypes.c_int64 * 1)(n), (ctypes.c_int64 * 1)(1), library.aoti_torch_dtype_float32(),
            library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
        )  # fmt: skip
        assert not failed
        library.aoti_torch_get_data_ptr(handle, ctypes.byref(address))
        memory = torch.frombuffer((ctypes.c_float * n).from_address(address.value), dtype=torch.float32)
        assert memory.isnan().all()
        library.aoti_torch_delete_tensor_object(handle)


@pytest.mark.parametrize("ours", [2.0, 0.5, torch.nan], ids=["too large", "too small", "NaN"])
def test_the_error_rule_can_be_broken(rule, ours):
    one = torch.ones(3)
    rule.error("right", one, [one], one.double(), torch.float32, rule.output)
    with pytest.raises(AssertionError, match=r"^wrong: error"):
        rule.error("wrong", one * ours, [one], one.double(), torch.float32, rule.output)
