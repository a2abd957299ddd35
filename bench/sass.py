"""Reads a compiled kernel: registers, spills, and the instructions of its inner loops by pipe."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # NVIDIA's tools are in Triton's package

TENSOR = ("HMMA", "HGMMA", "IMMA", "QMMA", "OMMA", "UTCHMMA", "UTCQMMA")
SPECIAL = ("MUFU",)
MEMORY = (
    "LDG", "LDS", "LDSM", "LDGSTS", "LDL", "LD", "STG", "STS", "STSM", "STL", "ST", "ATOM", "ATOMG", "RED", "REDG",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: the opcode with its modifiers, and the label that it jumps to, if any."""

    opcode: str
    target: str | None

    @property
    def pipe(self) -> str:
        """The part of the SM that executes the instruction."""
        name = self.opcode.partition(".")[0]
        if name in TENSOR:
            return "tensor"
        if name in SPECIAL:
            return "special"
        return "memory" if name in MEMORY else "other"


@dataclass(frozen=True)
class Machine:
    """The machine code of a kernel.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread; more than 0 means spills.
        code: the instructions in order.
        loops: the innermost loops, as slices of ``code``.
    """

    registers: int
    stack: int
    code: list[Instruction]
    loops: list[list[Instruction]]

    def count(self, pipe: str) -> int:
        """Instructions of the whole kernel on one pipe."""
        return sum(i.pipe == pipe for i in self.code)

    @property
    def serialised(self) -> bool:
        """Whether the kernel waits for each of Hopper's asynchronous products, as ptxas could not overlap them."""
        names = [i.opcode for i in self.code]
        products = sum(name.startswith("HGMMA") for name in names)
        return 0 < products <= sum(name.startswith("WARPGROUP.DEPBAR") for name in names)


def read(cubin: bytes) -> Machine:
    """Disassemble a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        listing = _output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump did not report registers: {usage.strip()[:200]}")
    code, labels = _parse(listing)
    return Machine(int(found[1]), int(found[2]), code, _innermost_loops(code, labels))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and the index of the instruction after each label."""
    code: list[Instruction] = []
    labels = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"\((\.L_\w+)\)", instruction[2]) if instruction[1].startswith("BRA") else None
            code.append(Instruction(instruction[1], target[1] if target else None))
    return code, labels


def _innermost_loops(code: list[Instruction], labels: dict[str, int]) -> list[list[Instruction]]:
    # a jump backwards closes a loop
    spans = {(labels[i.target], at + 1) for at, i in enumerate(code) if i.target and labels[i.target] < at}
    # not a loop: the jump to itself at the end of a kernel, and short jumps back that wait
    spans = {(a, b) for a, b in spans if b - a > 8}
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [code[a:b] for a, b in sorted(inner)]


def pipes(instructions: list[Instruction]) -> Counter[str]:
    """The number of instructions on each pipe."""
    return Counter(i.pipe for i in instructions)
