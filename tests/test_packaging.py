"""The source distribution and the wheel: what they hold, and that the kernels need nothing but torch.

Both are built once from the files at hand, offline, with the versions that run these tests.
"""

import inspect
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fastgpt import __version__, hardware

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")
X86 = platform.machine().lower() in {"x86_64", "amd64"}
LIBRARIES = [f"_cpu_{name}.abi3.so" for name in (["avx2", "avx512", "avx512_bf16", "default"] if X86 else ["default"])]
PURE = "py3-none-any.whl"
COMPILED = f"cp310-abi3-{re.sub('[-.]', '_', sysconfig.get_platform())}.whl"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the names and tools are Linux's")


def files_at_hand(*options):
    """What git knows of, as it is in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git repository, so no telling the sources from what else lies here")
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


def copy_to(folder):
    for name in files_at_hand("--cached", "--others", "--exclude-standard"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


def build(folder, *command, **environment):
    """Run ``python COMMAND`` in ``folder``, with the tools beside this interpreter (ninja) in reach."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    inherited = {name: value for name, value in os.environ.items() if name != "FASTGPT_REQUIRE_BUILD"}
    command = [sys.executable, *command]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**inherited, "PATH": path, **environment}
    )


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    done = build(copy_to(folder / "tree"), "setup.py", "-q", "sdist", "-d", str(folder))
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel, as pip builds it from the unpacked source distribution."""
    if not shutil.which(COMPILER):
        pytest.skip(f"no C++ compiler: {COMPILER} is not found")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--no-index", "-w", str(folder)]
    done = build(sdist, "-m", "pip", "wheel", ".", *options, FASTGPT_REQUIRE_BUILD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's content and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


# ---- what they hold ----


def test_the_wheel_tells_its_version_and_that_it_has_types(installed):
    (about,) = installed.glob("*.dist-info")
    assert about.name == f"fastgpt-{__version__}.dist-info"
    assert (installed / "fastgpt" / "py.typed").exists()


def test_the_source_distribution_holds_every_file_of_the_repository(sdist):
    held = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert files_at_hand() - held == set()
    assert {"setup.py", "csrc/simd.h", "constraints.txt", "tests/conftest.py", "LICENSE"} <= held


def test_the_wheel_is_one_file_for_every_python_from_3_10_on(wheel):
    assert re.fullmatch(rf"fastgpt-[\d.]+-{re.escape(COMPILED)}", wheel.name)


def test_the_wheel_holds_the_package_its_libraries_and_its_licence_and_nothing_else(wheel):
    sources = {name for name in files_at_hand("--cached", "--others", "--exclude-standard") if name[:8] == "fastgpt/"}
    assert {"fastgpt/__init__.py", "fastgpt/kernels/triton/configs/any.json"} <= sources
    about = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    described = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    libraries = {f"fastgpt/kernels/{name}" for name in LIBRARIES}
    assert names_in(wheel) == sources | libraries | {f"{about}/{name}" for name in described}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_needs_the_stable_abi_of_torch_and_no_other_symbol_of_torch_or_python(installed, library):
    if not shutil.which("nm"):
        pytest.skip("no nm")
    nm = ["nm", "-D", "--undefined-only", installed / "fastgpt" / "kernels" / library]
    symbols = [line.split()[-2:] for line in subprocess.run(nm, capture_output=True, text=True).stdout.splitlines()]
    strong = {name for kind, name in symbols if kind == "U"}
    assert "torch_library_impl" in strong
    stable = r"(aoti_)?torch_\w+"
    system = r"\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+"
    standard = r"_ZN?K?(St|So)\w+"  # inlined in some version of libstdc++, in torch's libraries too; no version then
    assert {name for name in strong if not re.fullmatch(f"{stable}|{system}|{standard}", name)} == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_knows_nothing_of_the_machine_it_was_built_on(installed, sdist, library):
    library = installed / "fastgpt" / "kernels" / library
    content = library.read_bytes()
    assert b"csrc/" in content  # as error messages name it
    folders = (sdist, Path(torch.__file__).parent, Path.home())
    assert [folder for folder in folders if os.fsencode(f"{folder}/") in content] == []
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    assert "libtorch_cpu" in needed
    assert needed <= {"libtorch", "libtorch_cpu", "libc10", "libstdc++", "libm", "libgcc_s", "libc"} | {
        name for name in needed if name.startswith("ld-linux")
    }
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


# ---- the kernels where nothing but torch is installed ----


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """A folder of links to torch and to what torch itself requires."""
    folder = tmp_path_factory.mktemp("site-packages")
    wanted, seen = ["torch"], {"triton"}  # builds for CUDA require it, and do without
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        package = distribution(name)
        for top in {path.parts[0] for path in package.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():  # several packages may share a namespace
                link.symlink_to(package.locate_file(top))
        requirements = map(Requirement, package.requires or ())
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return folder


def report():
    """Runs by itself in a bare interpreter: the kernels against plain PyTorch; what was loaded; what was said."""
    import json
    import sys
    import warnings

    sys.path += sys.argv[1:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        from torch.nn import functional as F

        torchs_own = len(caught)
        from fastgpt import kernels as ours

        torch.manual_seed(1)
        targets = torch.tensor([1, -1, 4, 0, 6])

        def plain_qkv(qkv):
            q, k, v = (t.unflatten(2, (3, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

        cos, sin = ours.rotary_tables(70, 24)
        documents = ours.document_bounds(ours.document_starts(torch.arange(140).view(2, 70) % 31, 30))
        positions = torch.arange(70)
        seen = (positions[:, None] >= positions) & (documents[:, 0, :, None] <= positions)  # (2, 70, 70)

        def turned(x):  # (2, 70, heads, 24)
            a, b = x.chunk(2, 3)
            c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
            return torch.cat((a * c - b * s, b * c + a * s), 3)

        def plain_rotary_qkv(qkv):
            heads = qkv.unflatten(2, (4, 24))  # two of q, one of k, one of v
            return torch.cat((turned(heads[:, :, :3]), heads[:, :, 3:]), 2).flatten(2)

        cases = {
            "layer_norm": (ours.layer_norm, lambda x, w, b: F.layer_norm(x, w.shape, w, b), [(3, 5, 33), (33,), (33,)]),
            "add_layer_norm": (
                lambda *t: torch.stack(ours.add_layer_norm(*t)),
                lambda x, r, w, b: torch.stack([F.layer_norm(x + r, w.shape, w, b), x + r]),
                [(3, 5, 33), (3, 5, 33), (33,), (33,)],
            ),
            "rms_norm": (ours.rms_norm, lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), [(3, 5, 33), (33,)]),
            "add_rms_norm": (
                lambda *t: torch.stack(ours.add_rms_norm(*t)),
                lambda x, r: torch.stack([F.rms_norm(x + r, x.shape[-1:], None, 1e-6), x + r]),
                [(3, 5, 33), (3, 5, 33)],
            ),
            "rotary": (lambda x: ours.rotary(x, cos, sin), turned, [(2, 70, 3, 24)]),
            "rms_norm_rotary": (
                lambda x, w: ours.rms_norm_rotary(x, cos, sin, w),
                lambda x, w: turned(F.rms_norm(x, w.shape, w, 1e-6)),
                [(2, 70, 3, 24), (24,)],
            ),
            "rotary_qkv": (
                lambda t: ours.rotary_qkv(t, 2, cos, sin, n_kv_head=1),
                plain_rotary_qkv,
                [(2, 70, 4 * 24)],
            ),
            "relu2": (ours.relu2, lambda x: F.relu(x).square(), [(7, 33)]),
            "swiglu": (ours.swiglu, lambda gate, up: F.silu(gate) * up, [(7, 33), (7, 33)]),
            "geglu, packed": (
                ours.geglu,
                lambda x: F.gelu(x[:, :33], approximate="tanh") * x[:, 33:],
                [(7, 66)],
            ),
            "gelu": (ours.gelu, lambda x: F.gelu(x, approximate="tanh"), [(7, 33)]),
            "gelu, of a sum, exact": (
                lambda x, b: ours.gelu(x, "none", bias=b),
                lambda x, b: F.gelu(x + b),
                [(7, 33), (33,)],
            ),
            "attention": (
                ours.attention,
                lambda *t: F.scaled_dot_product_attention(*t, is_causal=True),
                [(2, 3, 70, 24)] * 3,
            ),
            "attention, full": (
                lambda *t: ours.attention(*t, causal=False),
                F.scaled_dot_product_attention,
                [(2, 3, 70, 24), (2, 3, 50, 24), (2, 3, 50, 24)],
            ),
            "attention, of documents": (
                lambda q, k, v: ours.attention(q, k, v, documents=documents),
                lambda *t: F.scaled_dot_product_attention(*t, attn_mask=seen[:, None], enable_gqa=True),
                [(2, 4, 70, 24), (2, 2, 70, 24), (2, 2, 70, 24)],
            ),
            "attention_qkv": (lambda t: ours.attention_qkv(t, 3), plain_qkv, [(2, 70, 3 * 24)]),
            "cross_entropy": (
                lambda x: ours.cross_entropy(x, targets),
                lambda x: F.cross_entropy(x, targets, ignore_index=-1),
                [(5, 7)],
            ),
            "linear": (ours.linear, F.linear, [(3, 5, 33), (17, 33), (17,)]),
            "embedding": (
                lambda w: ours.embedding(targets.abs(), w),
                lambda w: F.embedding(targets.abs(), w),
                [(7, 33)],
            ),
            "linear_cross_entropy": (
                lambda x, w: ours.linear_cross_entropy(x, w, targets),
                lambda x, w: F.cross_entropy(x @ w.T, targets, ignore_index=-1),
                [(5, 33), (7, 33)],
            ),
        }
        errors = {}

        def compare(what, got, truth, dtype):
            """In units of the dtype's precision, relative to the largest true value."""
            assert got.shape == truth.shape, what
            scale = truth.abs().max() * torch.finfo(dtype).eps
            errors[f"{what}, {dtype}"] = ((got.double() - truth).abs().max() / scale).item()

        for dtype in (torch.float32, torch.bfloat16):
            for name, (function, plain, shapes) in cases.items():
                inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
                wide = [t.detach().double().requires_grad_() for t in inputs]
                got, truth = function(*inputs), plain(*wide)
                dout = torch.randn(truth.shape).to(dtype)
                compare(name, got, truth, dtype)
                got.backward(dout.to(got.dtype))
                truth.backward(dout.double())
                for i, (leaf, other) in enumerate(zip(inputs, wide, strict=True)):
                    compare(f"{name}, gradient {i}", leaf.grad, other.grad, dtype)

            params = [torch.randn(shape).to(dtype).requires_grad_() for shape in [(7, 5), (300,)]]
            wide = [p.detach().double().requires_grad_() for p in params]
            fused = ours.FusedAdamW(params, lr=1e-2, max_grad_norm=1.0)
            unfused = torch.optim.AdamW(wide, lr=1e-2)
            for _ in range(3):
                for p, other in zip(params, wide, strict=True):
                    p.grad = torch.randn_like(p)
                    other.grad = p.grad.double()
                fused.step()
                torch.nn.utils.clip_grad_norm_(wide, 1.0)
                unfused.step()
            for i, (p, other) in enumerate(zip(params, wide, strict=True)):
                compare(f"FusedAdamW, parameter {i}", p, other, dtype)

            param = torch.randn(5, 33).to(dtype).requires_grad_()
            param.grad = torch.randn_like(param)
            truth, x = param.detach().double(), torch.nn.functional.normalize(param.grad.double(), dim=(0, 1))
            for _ in range(5):  # Newton-Schulz
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            ours.FusedMuon([param], lr=1e-2, weight_decay=0.0).step()
            compare("FusedMuon", param, truth - 1e-2 * x, dtype)

    found = {
        "public": [name for name in ours.__all__ if not hasattr(getattr(ours, name), "forward")],  # modules wrap these
        "where": ours.__file__,
        "answers": sorted(set(ours.backends()["cpu"].values())),
        "errors": errors,
        "said": [str(warning.message) for warning in caught[torchs_own:]],
        "modules": [*sys.modules],
    }
    print(json.dumps(found))


def run_alone(installed, torch_alone, **environment):
    """What ``report`` finds where there is only the standard library, torch and what is ``installed``."""
    code = f"{inspect.getsource(report)}\nreport()\n"
    command = [sys.executable, "-I", "-S", "-c", code, str(installed), str(torch_alone)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("FASTGPT_")}
    done = subprocess.run(command, capture_output=True, text=True, env={**variables, **environment}, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["where"] == str(installed / "fastgpt" / "kernels" / "__init__.py")
    return found


def check(found):
    """The kernels are right, and came alone."""
    others = {"backends", "use_backend"} | {
        name for name in found["public"] if name.startswith(("document_", "rotary_t"))
    }
    assert {name.split(",")[0] for name in found["errors"]} == set(found["public"]) - others
    allowed = {"torch.float32": 8, "torch.bfloat16": 2}  # fp32 adds up roundings; bf16 rounds once, at the end
    wrong = {what: error for what, error in found["errors"].items() if not error <= allowed[what.split(", ")[-1]]}
    assert wrong == {}
    foreign = re.compile(r"(numpy|triton|tiktoken|safetensors|rich|matplotlib|fastgpt\.(?!kernels\b))")
    assert [name for name in found["modules"] if foreign.match(name)] == []
    assert [name for name in found["modules"] if name.startswith("fastgpt.kernels.triton")] == []


def test_torch_itself_brings_neither_numpy_nor_triton(torch_alone):
    assert {"torch", "sympy"} <= set(os.listdir(torch_alone))
    assert {"numpy", "triton", "fastgpt"} & set(os.listdir(torch_alone)) == set()


def test_the_kernels_of_the_wheel_are_right_where_nothing_but_torch_is_installed(installed, torch_alone):
    found = run_alone(installed, torch_alone)
    check(found)
    assert found["said"] == []
    widest = {"amx": "avx512_bf16"}.get(hardware.isa(), hardware.isa()) if X86 else "default"
    assert f"cpp ({widest})" in found["answers"]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="for a CPU with AVX-512")
def test_the_wheel_has_a_library_for_a_cpu_without_avx512(installed, torch_alone):
    found = run_alone(installed, torch_alone, ATEN_CPU_CAPABILITY="avx2")
    check(found)
    assert found["said"] == []
    assert "cpp (avx2)" in found["answers"]


def test_without_its_libraries_the_wheel_runs_on_the_reference_and_says_so_once(installed, torch_alone, tmp_path):
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))
    found = run_alone(tmp_path, torch_alone)
    check(found)
    (message,) = found["said"]
    assert message.startswith("fastgpt runs on plain PyTorch, slower: the C++ kernels are not built")
    assert found["answers"] == ["reference (the C++ kernels are not built)"]


# ---- a build that fails ----


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The sources, and a compiler that writes a few letters for each file and can be made to fail on a flag."""
    compiler = tmp_path / "bin" / "compiler"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/sh\n"
        "for word; do\n"
        '    case "$before $word" in "-o "*) echo compiled > "$word" ;; esac\n'
        '    [ "$word" != "$FAILS_ON" ] || exit 1\n'
        '    before="$word"\n'
        "done\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FAILS_ON", "")
    return copy_to(tmp_path / "tree")


@pytest.mark.skipif(not X86, reason="one library alone cannot be built by half")
@pytest.mark.parametrize("flag", ["-mavx2", "-mavx512f"])
def test_a_build_that_fails_by_half_leaves_a_pure_wheel_without_libraries_and_says_so(tree, flag):
    done = build(tree, "setup.py", "-q", "bdist_wheel", FAILS_ON=flag)
    assert done.returncode == 0, done.stderr
    assert "warning: fastgpt's C++ kernels were not built" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith(f"-{PURE}")
    assert [name for name in names_in(wheel) if name.endswith(".so")] == []
    assert "fastgpt/kernels/cpp.py" in names_in(wheel)


def test_a_build_that_is_required_and_fails_leaves_no_wheel(tree):
    done = build(tree, "setup.py", "-q", "bdist_wheel", FAILS_ON="-O3", FASTGPT_REQUIRE_BUILD="1")
    assert done.returncode != 0
    assert list(tree.glob("dist/*")) == []


def test_what_an_earlier_build_left_does_not_reach_the_wheel(tree):
    assert build(tree, "setup.py", "-q", "build").returncode == 0
    (kept,) = tree.glob("build/lib*/fastgpt/kernels")
    assert sorted(path.name for path in kept.glob("*.so")) == LIBRARIES
    (kept / "gone.py").touch()
    (kept / "_cpu_gone.abi3.so").touch()
    done = build(tree, "setup.py", "-q", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name.endswith(f"-{COMPILED}")
    assert [name for name in names_in(wheel) if "gone" in name] == []
    assert sorted(Path(name).name for name in names_in(wheel) if name.endswith(".so")) == LIBRARIES
