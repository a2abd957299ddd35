"""What limits a process, read from trees of files such as Linux shows, and from a real cgroup where one can be made."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt import limits
from fastgpt.data.__main__ import main as data_main
from fastgpt.train.__main__ import main as train_main
from fastgpt.train.step import RecordingOutOfMemory

GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"

V1 = """\
24 18 0:20 / /sys rw - sysfs sysfs rw
32 31 0:29 {at} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 {at} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2 = "30 23 0:26 {at} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MEMORY, CPU = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A machine of 64 cores with 100 GiB, of which 80 are free; more files by their paths."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f"{text}\n")
        return tmp_path

    kib = GIB >> 10
    write({"proc/meminfo": f"MemTotal: {100 * kib} kB\nMemFree: 1 kB\nMemAvailable: {80 * kib} kB\nHugePages_Total: 0"})
    return write


def v1(limit, usage=0, stat="", folder=MEMORY):
    return {
        f"{folder}/memory.limit_in_bytes": limit, f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": stat,
    }  # fmt: skip


def v2(most, current=0, inactive=0, folder="sys/fs/cgroup", high="max"):
    return {
        f"{folder}/memory.max": most, f"{folder}/memory.high": high, f"{folder}/memory.current": current,
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\nactive_file 7",
    }  # fmt: skip


def own(mounts, path, at="/"):
    number = "4:memory:" if mounts is V1 else "0::"
    lines = [f"{number}{path}", *([f"3:cpu,cpuacct:{path}", "2:name=systemd:/"] if mounts is V1 else [])]
    return {"proc/self/cgroup": "\n".join(lines), "proc/self/mountinfo": mounts.format(at=at)}


def gib(pair):
    free, total = pair
    return free.amount / GIB, total.amount / GIB


# ---- memory ----


def test_without_limits_it_is_what_the_machine_has(tree):
    free, total = limits.memory(tree({}))
    assert (free, total) == ((80 * GIB, "RAM"), (100 * GIB, "RAM"))


@pytest.mark.parametrize("mounts", [V1, V2])
def test_the_limit_of_the_own_cgroup_counts_and_files_read_once_are_free(tree, mounts):
    folder = f"{MEMORY if mounts is V1 else 'sys/fs/cgroup'}/box"
    if mounts is V1:  # the cgroup's own inactive_file is not that of all below it
        files = v1(4 * GIB, 3 * GIB, f"inactive_file 5\ntotal_inactive_file {GIB}", folder)
    else:
        files = v2(4 * GIB, 3 * GIB, GIB, folder)
    free, total = limits.memory(tree({**own(mounts, "/box"), **files}))
    assert gib((free, total)) == (2, 4)
    name = "memory.limit_in_bytes" if mounts is V1 else "memory.max"
    assert free.source == total.source == f"cgroup limit /{folder}/{name}"


@pytest.mark.parametrize("mounts", [V1, V2])
def test_unlimited_is_no_limit(tree, mounts):
    files = v1(UNLIMITED_V1, GIB) if mounts is V1 else v2("max", GIB)
    free, total = limits.memory(tree({**own(mounts, "/"), **files}))
    assert (free, total) == ((80 * GIB, "RAM"), (100 * GIB, "RAM"))


@pytest.mark.parametrize("mounts", [V1, V2])
def test_the_tightest_of_the_cgroups_above_counts(tree, mounts):
    make, top = (v1, MEMORY) if mounts is V1 else (v2, "sys/fs/cgroup")
    root = tree(
        {
            **own(mounts, "/a/b/c"),
            **make(UNLIMITED_V1 if mounts is V1 else "max", folder=f"{top}/a/b/c"),
            **make(8 * GIB, 7 * GIB, folder=f"{top}/a/b"),
            **make(6 * GIB, 2 * GIB, folder=f"{top}/a"),
            **make(GIB, folder=f"{top}/a/b/other"),  # not above
        }
    )
    free, total = limits.memory(root)
    assert gib((free, total)) == (1, 6)
    assert f"/{top}/a/b/memory" in free.source
    assert f"/{top}/a/memory" in total.source


def test_a_limit_that_slows_down_counts_like_one_that_kills(tree):
    free, total = limits.memory(tree({**own(V2, "/"), **v2(8 * GIB, GIB, high=3 * GIB)}))
    assert gib((free, total)) == (2, 3)
    assert free.source == "cgroup limit /sys/fs/cgroup/memory.high"


@pytest.mark.parametrize("mounts", [V1, V2])
@pytest.mark.parametrize(
    ("path", "at"),
    [
        ("/", "/"),  # a cgroup namespace
        ("/docker/abc", "/docker/abc"),  # none: the host's path, mounted from there
        ("/docker/abc", "/"),  # the mount does not have the path
        ("/kubepods/pod1/abc", "/kubepods/other"),
        ("/", "/.."),
        ("/../abc", "/"),
    ],
)
def test_a_container_sees_its_own_cgroup_as_the_root_of_the_mount(tree, mounts, path, at):
    files = v1(2 * GIB, GIB) if mounts is V1 else v2(2 * GIB, GIB)
    assert gib(limits.memory(tree({**own(mounts, path, at), **files}))) == (1, 2)


def test_a_cgroup_inside_a_container_is_found_below_the_mount(tree):
    files = {**v1(4 * GIB), **v1(2 * GIB, GIB, folder=f"{MEMORY}/inner")}
    assert gib(limits.memory(tree({**own(V1, "/docker/abc/inner", "/docker/abc"), **files}))) == (1, 2)


def test_v1_tells_of_a_limit_above_that_the_container_does_not_see(tree):
    files = v1(UNLIMITED_V1, GIB, f"hierarchical_memory_limit {3 * GIB}")
    assert gib(limits.memory(tree({**own(V1, "/pod/abc", "/pod/abc"), **files}))) == (2, 3)


def test_the_mount_of_another_containers_cgroup_is_not_ours(tree):
    files = {**own(V2, "/mine"), **v2(2 * GIB, folder="sys/fs/cgroup/mine"), **v2(GIB, folder="mnt/other")}
    files["proc/self/mountinfo"] += "40 23 0:26 /theirs /mnt/other rw - cgroup2 cgroup2 rw\n"
    assert gib(limits.memory(tree(files))) == (2, 2)


def test_both_versions_may_be_mounted_at_once(tree):
    files = {**own(V1, "/box"), **v1(2 * GIB, folder=f"{MEMORY}/box")}
    files["proc/self/cgroup"] += "\n0::/unit"
    files["proc/self/mountinfo"] += V2.format(at="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    assert gib(limits.memory(tree(files))) == (2, 2)


def test_more_in_use_than_allowed_leaves_nothing(tree):
    assert gib(limits.memory(tree({**own(V2, "/"), **v2(GIB, 2 * GIB)}))) == (0, 1)


def test_a_machine_with_less_free_than_the_limit_allows_says_so(tree):
    free, total = limits.memory(tree({**own(V2, "/"), **v2(90 * GIB)}))
    assert free == (80 * GIB, "RAM")
    assert total.amount == 90 * GIB


@pytest.mark.parametrize(
    ("name", "used", "command"), [("address space", "VmSize", "ulimit -v"), ("data size", "VmData", "ulimit -d")]
)
def test_ulimits_count_less_what_the_process_has(tree, name, used, command):
    rows = {"data size": "unlimited", "address space": "unlimited", name: 3 * GIB}
    table = "\n".join(f"Max {row:<22}{soft!s:<21}unlimited            bytes     " for row, soft in rows.items())
    status = f"Name:\tpython\nVmRSS:\t 1 kB\n{used}:\t {2 * GIB >> 10} kB"
    free, total = limits.memory(tree({"proc/self/limits": table, "proc/self/status": status}))
    assert gib((free, total)) == (1, 3)
    assert free.source == total.source == command


def test_a_machine_without_any_of_these_files_has_its_memory_and_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 1000}.__getitem__)
    free, total = limits.memory(tmp_path)
    assert free == total == (16384 * 1000, "RAM")
    assert limits.threads(tmp_path) == (10, "cores")
    assert limits.held(tmp_path) == 0


# ---- threads ----


def quota(mounts, microseconds, period=100_000, folder=""):
    if mounts is V2:
        return {f"sys/fs/cgroup/{folder}/cpu.max": f"{microseconds} {period}"}
    return {f"{CPU}/{folder}/cpu.cfs_quota_us": microseconds, f"{CPU}/{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize("mounts", [V1, V2])
@pytest.mark.parametrize(
    ("microseconds", "period", "expected"),
    [(200_000, 100_000, 2), (150_000, 100_000, 2), (10_000, 100_000, 1), (50_000, 10_000, 5), (9_900_000, 100_000, 64)],
)
def test_a_cpu_quota_is_rounded_up_and_never_less_than_one(tree, mounts, microseconds, period, expected):
    found = limits.threads(tree({**own(mounts, "/box"), **quota(mounts, microseconds, period, "box")}))
    assert found.amount == expected
    assert (found.source == "cores") == (expected == 64)


@pytest.mark.parametrize("mounts", [V1, V2])
def test_no_quota_is_no_limit(tree, mounts):
    assert limits.threads(tree({**own(mounts, "/"), **quota(mounts, -1 if mounts is V1 else "max")})) == (64, "cores")


@pytest.mark.parametrize("mounts", [V1, V2])
def test_the_tightest_quota_of_the_cgroups_above_counts(tree, mounts):
    files = {**quota(mounts, 800_000, folder="a/b"), **quota(mounts, 300_000, folder="a")}
    found = limits.threads(tree({**own(mounts, "/a/b"), **files}))
    assert found.amount == 3
    assert found.source.endswith("/a/cpu.max" if mounts is V2 else "/a/cpu.cfs_quota_us")


def test_cores_that_the_process_may_not_use_do_not_count(tree, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert limits.threads(tree({})) == (2, "affinity")


# ---- memory that ran out ----


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RecordingOutOfMemory("no more"),
        torch.OutOfMemoryError("no more"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: …"),
        RuntimeError("unable to mmap 101774432 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("aoti_torch_empty_strided( sizes.size(), sizes.data()) API call failed at ops.h, line 1"),
        RuntimeError(
            'torch_call_dispatcher( "aten::contiguous", "", stack.data(),\n 2) API call failed at ops.h, line 903'
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("Storage size calculation overflowed with sizes=[3298534883328, 1099511627776]"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ImportError("numpy.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_ran_out_is_told_in_a_sentence(error):
    assert limits.ran_out(error)
    assert limits.exhausted(error).startswith("out of memory")


def test_it_is_told_which_memory_ran_out():
    assert "the GPU" in limits.exhausted(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."))
    assert "limited by" in limits.exhausted(MemoryError())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes do not fit"), RuntimeError("torch_get_device( ) API call failed at ops.h, line 1"),
     OSError(errno.ENOENT, "No such file"), ValueError("1")],
)  # fmt: skip
def test_other_failures_are_not_taken_for_it(error):
    assert not limits.ran_out(error)
    assert limits.exhausted(error) is None


def test_threads_that_cannot_be_started_are_not_taken_for_memory():
    error = RuntimeError("can't start new thread")
    assert not limits.ran_out(error)  # a smaller micro-batch would not help
    assert "ulimit -u" in limits.exhausted(error)


# Runs sys.argv[1] with sys.argv[2] bytes of address space beside what is taken already.
LIMITED = r"""
import re, resource, sys
from importlib import import_module
from pathlib import Path
from fastgpt.cli import run
main = import_module(sys.argv[1]).main
taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[2]), -1))
run(main, sys.argv[3:])
"""
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux obeys ulimit -v")


@ONLY_LINUX
def test_sample_and_plan_and_train_tell_in_a_line_that_memory_ran_out(tmp_path):
    (tmp_path / "words.txt").write_text("to be or not to be\n" * 400)
    assert data_main(["prepare", "text", f"{tmp_path}/words.txt", f"--data_dir={tmp_path}"]) == 0
    flags = ["--n_layer=1", "--n_head=8", "--n_embd=1024", "--block_size=16", "--dtype=float32", "--device=cpu"]
    flags += ["--max_iters=1", "--warmup_iters=0", "--lr_decay_iters=1", "--eval_iters=1", "--batch_size=1"]
    flags += ["--dataset=words", f"--data_dir={tmp_path}"]
    assert train_main([*flags, f"--out_dir={tmp_path}/run"]) == 0
    for module, mebibytes, status, argv in (
        ("fastgpt.sample", 8, 1, [f"{tmp_path}/run"]),
        ("fastgpt.plan", 8, 1, flags),
        ("fastgpt.train.__main__", 30, 2, [*flags, f"--out_dir={tmp_path}/another"]),
    ):
        done = python("-c", LIMITED, module, f"{mebibytes << 20}", *argv)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert done.stderr.startswith("error: out of memory"), done.stderr


OUT_OF_MEMORY_IN_CPP = r"""
import re, resource
from pathlib import Path
import torch
from fastgpt import kernels, limits
x = torch.randn(4, 1024, 512).transpose(1, 2)  # a copy of 8 MiB is made first
taken = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (taken + (4 << 20), -1))
try:
    kernels.gelu(x)
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(limits.ran_out(error), error)
"""


@ONLY_LINUX
def test_cpp_kernels_that_find_no_memory_are_understood():
    """The message is PyTorch's, so a new version may have another."""
    done = python("-c", OUT_OF_MEMORY_IN_CPP)
    assert done.stdout.startswith("True "), (done.stdout, done.stderr)


# ---- this machine ----


def test_this_process_holds_less_than_there_is():
    free, total = limits.memory()
    assert 0 < free.amount <= total.amount
    assert 0 <= limits.held() < total.amount


@ONLY_LINUX
def test_ulimit_v_is_told_by_the_process_that_it_limits():
    code = "import json; from fastgpt import limits; print(json.dumps(limits.memory()))"
    command = f"ulimit -v {4 << 20} && exec '{sys.executable}' -c '{code}'"
    free, total = json.loads(subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout)
    if total[1] == "ulimit -v":  # and not a machine of less than 4 GiB
        assert total[0] == 4 * GIB
    assert 3 * GIB < free[0] < 4 * GIB or free[1] != "ulimit -v"


def python(*argv, before=()):
    """Python in a process of its own, started by what is ``before`` it."""
    return subprocess.run([*before, sys.executable, "-W", "ignore", *argv], capture_output=True, text=True, check=False)


@pytest.fixture
def cgroup():
    """Runs Python in a real cgroup of a GiB: version 1 or 2, wherever the one that is mounted can be written to."""
    for parent, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        folder = Path(parent, f"fastgpt-test-{os.getpid()}")
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / limit).write_text(str(GIB))
        except OSError:
            folder.rmdir()
            continue

        def run(*argv, folder=folder):
            join = f"echo $$ > '{folder}/cgroup.procs' && exec \"$@\""
            return python(*argv, before=["sh", "-c", join, "sh"])

        yield run
        folder.rmdir()
        return
    pytest.skip("no cgroup with a limit can be made here")


def test_a_process_in_a_real_cgroup_tells_its_limit_and_doctor_too(cgroup):
    done = cgroup("-m", "fastgpt.doctor", "--quick", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["limits"]["total"]["amount"] == GIB
    assert found["limits"]["total"]["source"].startswith("cgroup limit /sys/fs/cgroup/")
    assert "of 1.0 GiB free" in found["devices"]["RAM"]
    assert found["limits"]["free"]["amount"] < GIB


def test_an_automatic_micro_batch_trains_in_a_real_cgroup_that_the_best_one_does_not_fit(cgroup, tmp_path):
    (tmp_path / "words.txt").write_text("to be or not to be\n" * 4000)
    assert data_main(["prepare", "text", f"{tmp_path}/words.txt", f"--data_dir={tmp_path}"]) == 0
    model = ["--n_layer=64", "--n_head=1", "--n_embd=64", "--block_size=16", "--dtype=float32", "--device=cpu"]
    length = ["--max_iters=2", "--warmup_iters=0", "--lr_decay_iters=2", "--eval_iters=1"]
    flags = ["--dataset=words", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/run", *model, *length]
    flags += ["--batch_size=auto", f"--total_batch_size={128 * 16}"]
    best = json.loads(python("-m", "fastgpt.plan", *flags, "--json").stdout)
    if best["memory"] < 2 * GIB:
        pytest.skip("this machine has less than 2 GiB free")
    done = cgroup("-m", "fastgpt.train", *flags)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)  # -9: killed by the kernel
    config = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert config["batch_size"] < best["batch_size"]
    assert best["peak"] > GIB
    assert config["batch_size"] * config["gradient_accumulation_steps"] == 128
