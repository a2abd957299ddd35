"""Reads a compiled kernel: registers, spills, and what its inner loops ask of each part of the chip."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"  # Triton's package carries NVIDIA's

TENSOR = ("HMMA", "HGMMA", "IMMA", "QMMA", "OMMA", "UTCHMMA", "UTCQMMA")
SPECIAL = ("MUFU",)
MEMORY = (
    "LDG", "LDS", "LDSM", "LDGSTS", "LDL", "LD", "STG", "STS", "STSM", "STL", "ST", "ATOM", "ATOMG", "RED", "REDG",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: the opcode with its modifiers, and the label it jumps to, if any."""

    opcode: str
    target: str | None

    @property
    def pipe(self) -> str:
        """The part of the chip that limits such instructions."""
        name = self.opcode.partition(".")[0]
        if name in TENSOR:
            return "tensor"
        if name in SPECIAL:
            return "special"
        return "memory" if name in MEMORY else "other"


@dataclass(frozen=True)
class Machine:
    """What the assembler made of a kernel.

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
        """Whether Hopper's asynchronous products are waited for one by one: ptxas then found no way to overlap them."""
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
        raise RuntimeError(f"cuobjdump says nothing of registers: {usage.strip()[:200]}")
    code, labels = _parse(listing)
    return Machine(int(found[1]), int(found[2]), code, _innermost_loops(code, labels))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and for each label the index of the instruction after it."""
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
    spans = {(labels[i.target], at + 1) for at, i in enumerate(code) if i.target and labels[i.target] < at}
    # the assembler ends a kernel with an endless jump to itself, which is no loop, and may jump back for waits
    spans = {(a, b) for a, b in spans if b - a > 8}
    inner = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [code[a:b] for a, b in sorted(inner)]


def pipes(instructions: list[Instruction]) -> Counter[str]:
    """How many of them each pipe gets."""
    return Counter(i.pipe for i in instructions)
