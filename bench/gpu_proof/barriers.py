"""Checks that no thread of a program overwrites what another thread of the program still has to read.

The interpreter runs a program as one thread. It only finds the loads of memory that a later store of the same program
overwrites (``Watch.overwritten``). This file compiles the kernels that have such pairs, and proves each pair safe for
one of three reasons:

- same thread: every element has the same position in both tiles, the tiles have the same layout, and the layout gives
  no element to two threads. So each thread overwrites only what it alone has read;
- same value: positions are the same, what is stored is computed from what was loaded, and the loaded value has no other
  use. So no element is overwritten before it is read. If several threads hold copies of an element, Triton lets one of
  them store, and nothing uses what the others have read;
- barrier: every path of the PTX from the load to the store crosses a ``bar.sync``.

This runs in its own process, because Triton decides at import whether it interprets. ``__main__.py`` passes the pairs
in a file and reads one outcome per line, as JSON, from the output.
"""

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from bench.ahead_of_time import _Driver
from bench.bounds import GPUS
from bench.gpu_proof.cases import IN_PLACE, OPS, Case, Ops, Outcome
from bench.gpu_proof.plants import BARRIER_PLANTS, CannotPlant, planted
from fastgpt.kernels.triton import launch

Pair = tuple[str, str, int, int, bool]  # file, kernel, lines of load and store; whether tiles and positions agree

# the operations of MLIR that keep every element of a tile at its position
ELEMENTWISE = re.compile(r" *(%\w+) = (?:arith\.|math\.|tt\.extern_elementwise |ttg\.convert_layout )")


# ---- reading compiled kernels ----


class Ttgir:
    """A kernel's TTGIR: its loads and stores, their lines in the source, and the layouts of what they move."""

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines()
        self.locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))
        layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.M))
        self.threads = 32 * int(re.findall(r'"ttg.num-warps" = (\d+)', text)[0])
        # kind and line of the source -> line of the TTGIR -> type of the tile, with its layout written out
        self.accesses: dict[tuple[str, int], dict[int, str]] = {}
        for i, line in enumerate(self.lines):
            if access := re.search(r"tt\.(load|store) %.*?: (.*) loc\((.*)\)$", line):
                tile = re.sub(r"#blocked\d*", lambda name: layouts[name[0]], access[2])
                self.accesses.setdefault((access[1], self._source_line(access[3])), {})[i] = tile

    def _source_line(self, location: str) -> int:
        """The source line of a location; the innermost one if functions are inlined."""
        while not (line := re.search(r'"[^"]*":(\d+):\d+', location)):
            location = self.locations[re.findall(r"#loc\d*", location)[0]]
        return int(line[1])

    def has(self, load: int, store: int) -> bool:
        """Whether this configuration of the kernel has both accesses."""
        return ("load", load) in self.accesses and ("store", store) in self.accesses

    def same_thread(self, load: int, store: int) -> bool:
        """Whether each thread stores only what it alone has loaded, given that positions are the same."""
        tiles = {*self.accesses["load", load].values(), *self.accesses["store", store].values()}
        return len(tiles) == 1 and self._each_element_once(*tiles)

    def _each_element_once(self, tile: str) -> bool:
        """Whether each element of a tile belongs to only one thread."""
        shape, per_thread = re.match(r"tensor<((?:\d+x)+)", tile), re.search(r"sizePerThread = \[([\d, ]+)\]", tile)
        if not shape or not per_thread or "slice" in tile:
            return False
        elements = prod(int(n) for n in shape[1].split("x")[:-1])
        return elements >= prod(int(n) for n in per_thread[1].split(",")) * self.threads

    def same_value(self, load: int, store: int) -> bool:
        """Whether all that is stored is computed element by element from what is loaded, which has no other use."""
        fed = [self._stores_fed_by(i) for i in self.accesses["load", load]]
        return set().union(*fed) == self.accesses["store", store].keys()

    def _stores_fed_by(self, load: int) -> set[int]:
        """The lines that store values computed from a load; none if the load has another use."""
        stores: set[int] = set()
        indent, name = re.findall(r"^( *)(%\w+) = ", self.lines[load])[0]
        values = {name}
        for i, line in enumerate(self.lines[load + 1 :], load + 1):
            if not line.startswith(indent):  # the end of the block, and of the name's scope
                break
            used = values.intersection(re.findall(r"%[\w-]+", line.partition(" = ")[2] or line))
            if used and (result := ELEMENTWISE.match(line)):
                values.add(result[1])
            elif used and used == set(re.findall(r"^ *tt\.store %[\w-]+, (%[\w-]+)", line)):
                stores.add(i)
            elif used:
                return set()
        return stores


class Ptx:
    """The control flow of a kernel's PTX, and the line of ``file`` that each instruction comes from, or 0."""

    def __init__(self, text: str, file: str) -> None:
        numbers = {number for number, name in re.findall(r'^\s*\.file\s+(\d+) "(.*?)"', text, re.M) if name == file}
        self.code: list[tuple[str, int]] = []
        labels: dict[str, int] = {}
        here, inside, begun = 0, False, False  # the source line; in inline assembly; past its first instruction
        for line in map(str.strip, text.partition(".entry")[2].splitlines()):
            if line.endswith("inline asm"):
                inside, begun = line.startswith("// begin"), False
            elif location := re.match(r"\.loc\s+(\d+) (\d+)", line):
                if not begun:  # within inline assembly, LLVM adds the lines of the assembly to the number
                    here = int(location[2]) if location[1] in numbers else 0
            elif label := re.match(r"(\$\w+):", line):
                labels[label[1]] = len(self.code)
            elif line == "}" or line.startswith("// -- End function"):
                break
            elif line and not line.startswith(("//", ".")):
                self.code.append((line, here))
                begun = inside
        self.following = [self._following(i, labels) for i in range(len(self.code))]

    def _following(self, i: int, labels: dict[str, int]) -> list[int]:
        line, _ = self.code[i]
        target = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        # a branch with a predicate, which precedes the opcode, also falls through
        falls_through = i + 1 < len(self.code) and not re.match(r"(bra|ret|exit)\b", line)
        return ([labels[target[1]]] if target else []) + ([i + 1] if falls_through else [])

    def _at(self, word: str, line: int) -> set[int]:
        return {i for i, (code, at) in enumerate(self.code) if at == line and word in code}

    def unguarded(self, load: int, store: int) -> bool:
        """Whether there is a path from a load of one line to a store of the other without a barrier.

        Raises:
            LookupError: there is no such load or store.
        """
        loads, stores = self._at("ld.global", load), self._at("st.global", store)
        if not loads or not stores:
            raise LookupError(f"no load of line {load} or no store of line {store} in the PTX")
        reached: set[int] = set()
        ahead = [following for i in loads for following in self.following[i]]
        while ahead:
            i = ahead.pop()
            if i not in reached and not re.match(r"(bar|barrier)\.sync\s+0;", self.code[i][0]):
                reached.add(i)
                ahead += self.following[i]
        return bool(reached & stores)


def how_safe(asm: dict[str, Any], pairs: list[Pair]) -> Iterator[tuple[Pair, str]]:
    """The reason why each pair in this compiled kernel is safe; "race" if there is none."""
    ttgir = Ttgir(asm["ttgir"])
    for pair in pairs:
        file, _, load, store, alike = pair
        if not ttgir.has(load, store):
            continue
        if alike and ttgir.same_thread(load, store):
            yield pair, "same thread"
        elif alike and ttgir.same_value(load, store):
            yield pair, "same value"
        else:
            yield pair, "race" if Ptx(asm["ptx"], file).unguarded(load, store) else "barrier"


# ---- the process that compiles ----


def _check(case: Case, ops: Ops, arch: int, pairs: list[Pair]) -> list[tuple[Pair, str]]:
    """Apply :func:`how_safe` to every kernel that a case launches."""
    gpu = GPUS[arch]
    driver.set_active(_Driver(arch))
    found: list[tuple[Pair, str]] = []

    def compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        code = kernel.fn.__code__
        mine = [pair for pair in pairs if pair[:2] == (code.co_filename, code.co_name)]
        if mine:
            found.extend(how_safe(kernel.warmup(*args, grid=grid, **options).asm, mine))

    with launch.ahead_of_time(launch.Device(gpu.name, arch, gpu.n_sm, gpu.shared_memory), compile):
        case(ops)
    return found


def _races(found: list[tuple[Pair, str]]) -> str:
    """The unsafe pairs as a message; empty if there are none."""
    pairs = dict.fromkeys(pair for pair, how in found if how == "race")
    lines = [f"{kernel}: line {load} reads what line {store} overwrites" for _, kernel, load, store, _ in pairs]
    return f"race: {'; '.join(lines)}" if lines else ""


def _plants(arch: int, pairs: list[Pair], folder: Path) -> Iterator[Outcome]:
    for plant in BARRIER_PLANTS:
        began = time.monotonic()
        try:
            path, ops = planted(plant, folder)
            moved = [(str(path), *pair[1:]) for pair in pairs if pair[0] == plant.module.__file__]
            found = _races(_check(plant.case, ops, arch, moved))
        except CannotPlant as error:
            found = str(error)
        yield Outcome(f"{plant.name}, sm_{arch}", plant.expected, found, "", time.monotonic() - began)


def _kernels(arch: int, pairs: list[Pair]) -> Iterator[Outcome]:
    """One outcome for all cases together, and one more for each unsafe case."""
    began, ways, seen = time.monotonic(), Counter[str](), set()
    for name, case in IN_PLACE.items():
        found = _check(case, OPS, arch, pairs)
        ways.update(how for _, how in found)
        seen |= {pair for pair, _ in found}
        if fault := _races(found) if found else "nothing in place was compiled":
            yield Outcome(f"{name} in place, sm_{arch}", "", fault, "", 0.0)
    unseen = [f"{Path(file).name}:{load} and {store}" for file, _, load, store, _ in sorted(set(pairs) - seen)]
    fault = f"no case compiles the pairs {', '.join(unseen)}" if unseen else ""
    note = f"{len(IN_PLACE)} cases: " + ", ".join(f"{n} {way}" for way, n in sorted(ways.items()))
    yield Outcome(f"in place, sm_{arch}", "", fault, note, time.monotonic() - began)


def main() -> None:
    """Check the pairs in the file that is the first argument; the second is the folder for planted copies."""
    path, folder = map(Path, sys.argv[1:])
    pairs: list[Pair] = [(*pair,) for pair in json.loads(path.read_text())]
    CUDABackend.make_cubin = lambda *args: b""  # skip ptxas, which takes most of the time; only the PTX is read
    for arch in sorted(GPUS):
        for outcome in _plants(arch, pairs, folder):
            print(json.dumps(asdict(outcome)), flush=True)
    for arch in sorted(GPUS):
        for outcome in _kernels(arch, pairs):
            print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
