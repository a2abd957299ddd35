"""The memory and the threads that this process may use: limits of the machine, of its cgroups and of ulimit.

A container is a control group (cgroup). It sees all memory and cores of the machine, but may use only a part. If it
takes more memory, the kernel kills it. If it runs more threads than its CPU quota allows, they wait for each other.

Everything is read from Linux's files, under a ``root`` that tests can replace. A missing file means no limit.
Sources: proc(5), the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

import errno
import math
import os
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import truediv
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SYSTEM = Path("/")


class Bound(NamedTuple):
    """An amount, and the source of that limit.

    Attributes:
        amount: bytes or threads.
        source: ``RAM``, ``cores``, a cgroup's file, …
    """

    amount: int
    source: str


def least(bounds: Iterable[Bound]) -> Bound:
    """The smallest bound; the first of equal ones."""
    return min(bounds, key=lambda bound: bound.amount)


def memory(root: Path = SYSTEM) -> tuple[Bound, Bound]:
    """Bytes that this process can still take, and that it could take if nothing were in use.

    Swap does not count, because a training step touches all of its memory every time.
    """
    free, total = zip(_ram(root), *_memory_of_cgroups(root), *_ulimits(root), strict=True)
    return least(free), least(total)


def held(root: Path = SYSTEM) -> int:
    """Bytes of RAM that this process holds, with libraries; 0 if unknown."""
    return _fields(root / "proc/self/status").get("VmRSS", 0)


def threads(root: Path = SYSTEM) -> Bound:
    """Threads that can run at once, at least 1: the minimum of cores, affinity and CPU quotas."""
    found = [Bound(os.cpu_count() or 1, "cores")]
    if hasattr(os, "sched_getaffinity"):  # Linux
        found.append(Bound(len(os.sched_getaffinity(0)), "affinity"))
    for folder in _cgroups(root, "cpu"):
        v1, v2 = folder / "cpu.cfs_quota_us", folder / "cpu.max"
        quotas = {v1: f"{_read(v1)} {_read(folder / 'cpu.cfs_period_us')}", v2: _read(v2)}
        for path, text in quotas.items():
            limited = re.match(r"(\d+)\s+([1-9]\d*)", text)  # CPU time in a period, microseconds; unlimited: max or -1
            if limited:  # rounded up: two threads use 1.5 cores, one does not
                found.append(Bound(max(1, math.ceil(int(limited[1]) / int(limited[2]))), _named(path, root)))
    return least(found)


# What an exception says if memory ran out. The stable ABI of PyTorch, which our C++ kernels use, gives no reason, but
# these two of its calls fail only then.
_RAN_OUT = re.compile(
    r"""can't[ ]allocate[ ]memory | bad_alloc                                # PyTorch on a CPU, C++
    | Cannot[ ]allocate[ ]memory | failed[ ]to[ ]map[ ]segment               # Linux, and its loader of libraries
    | (empty_strided | aten::contiguous) .* API[ ]call[ ]failed
    | could[ ]not[ ]create[ ]a[ ]primitive                                   # oneDNN
    | out[ ]of[ ]memory | CUBLAS_STATUS_ALLOC_FAILED                         # PyTorch, CUDA, Triton; cuBLAS
    | Storage[ ]size[ ]calculation[ ]overflowed                              # more than 2**63 bytes
    """,
    re.VERBOSE | re.DOTALL,
)


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, of a CPU or of a GPU.

    PyTorch has a class for that, but raises it only where its own GPU allocator fails.
    """
    if isinstance(error, OSError):  # of mapping a file, say
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return True
    return _RAN_OUT.search(str(error)) is not None


def exhausted(error: BaseException) -> str | None:
    """A sentence about what this process has run out of; ``None`` if the exception means something else."""
    if "can't start new thread" in str(error):
        return "no thread can be started: raise ulimit -u (processes) or ulimit -v (memory)"
    if not ran_out(error):
        return None
    if "CUDA" in str(error) or "CUBLAS" in str(error):
        return "out of memory on the GPU; nvidia-smi shows which programs use it"
    try:
        _, total = memory()
    except MemoryError:  # the exception still holds its frames
        return "out of memory"
    return f"out of memory: this process may take {total.amount / 2**30:.1f} GiB, limited by {total.source}"


# ---- memory ----


def _pair(limit: int, used: int, source: str) -> tuple[Bound, Bound]:
    return Bound(max(0, limit - used), source), Bound(limit, source)


def _ram(root: Path) -> tuple[Bound, Bound]:
    fields = _fields(root / "proc/meminfo")
    if "MemTotal" not in fields:  # not Linux: the used part is unknown
        return _pair(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0, "RAM")
    return Bound(fields["MemAvailable"], "RAM"), Bound(fields["MemTotal"], "RAM")


def _ulimits(root: Path) -> Iterator[tuple[Bound, Bound]]:
    limits, status = _read(root / "proc/self/limits"), _fields(root / "proc/self/status")
    for name, used, command in (("address space", "VmSize", "ulimit -v"), ("data size", "VmData", "ulimit -d")):
        limited = re.search(rf"^Max {name}\s+(\d+)", limits, re.MULTILINE)  # the soft limit, unless unlimited
        if limited:
            yield _pair(int(limited[1]), status.get(used, 0), command)


def _memory_of_cgroups(root: Path) -> Iterator[tuple[Bound, Bound]]:
    """Every memory limit of every cgroup that this process is in. (v1's "unlimited" is more than any machine has.)"""
    for folder in _cgroups(root, "memory"):
        stat = _fields(folder / "memory.stat")
        # of the cgroup and all below it; in v1 the name without "total_" is the cgroup's own figure
        inactive = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        for limit_name, usage_name in (
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # v1
            ("memory.max", "memory.current"),  # v2: beyond it the kernel kills
            ("memory.high", "memory.current"),  # v2: beyond it the kernel slows the process down to reclaim
        ):
            limit = _number(folder / limit_name)
            if limit is not None:
                # v1 also states the least limit of the cgroups above, which a container may not see
                limit = min(limit, stat.get("hierarchical_memory_limit", limit))
                # Cached files that have not been used for a while are dropped before a process is killed. The rest is
                # the working set, as the kubelet calls it.
                used = max(0, (_number(folder / usage_name) or 0) - inactive)
                yield _pair(limit, used, _named(folder / limit_name, root))


# ---- control groups ----


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's cgroup and of those above it, in v1's hierarchy of ``controller`` and in v2's.

    The mount may show only a part of the hierarchy. In a container that is usually its own cgroup, at the root of the
    mount, while /proc/self/cgroup has the host's path, or a path that does not exist in the mount. Not every folder
    that is returned exists.
    """
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        version = "cgroup" if controllers else "cgroup2"
        if version == "cgroup2" or controller in controllers.split(","):
            mounts = list(_mounts(root, version, controller))
            below = [(at, point) for at, point in mounts if PurePosixPath(path).is_relative_to(at)]
            for at, point in below:
                folders += accumulate(PurePosixPath(path).relative_to(at).parts, truediv, initial=point)
            if not below:
                folders += [point for _, point in mounts[:1]]
    return folders


def _mounts(root: Path, version: str, controller: str) -> Iterator[tuple[str, Path]]:
    """For each mount of a hierarchy: the cgroup at its root, and the mount point."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        # number, parent, device, root, mount point, options, … - type, source, options of the file system
        left, _, right = line.partition(" - ")
        kind, *_, options = right.split()
        if kind == version and (version == "cgroup2" or controller in options.split(",")):
            at, point = left.split()[3:5]
            yield at, root / point.lstrip("/")


# ---- files ----


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` for ``max`` or if there is no file."""
    text = _read(path)
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    """The amounts in a file with lines ``NAME 1`` or ``NAME: 1 kB``, the latter in bytes."""
    found = re.findall(r"^(\w+):?\s+(\d+)( kB)?$", _read(path), re.MULTILINE)
    return {name: int(number) << (10 if unit else 0) for name, number, unit in found}


def _named(path: Path, root: Path) -> str:
    return f"cgroup limit /{path.relative_to(root)}"
