"""Planted faults and what they must be reported as: small kernels, and copies of our modules with lines changed.

Copies are written to a temporary folder. If the text to change is no longer in the source, that is a failure.
"""

import importlib.util
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from bench.gpu_proof.cases import IN_PLACE, LARGE, OPS, SMALL, Case, Ops
from fastgpt.kernels.triton import adamw, attention, columns, cross_entropy, embedding, gelu, layer_norm, linear

# ---- small kernels: x and y have n elements, one for each thread; the last program has a few threads too many ----


@triton.jit
def _sound(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + here, mask=here < n), mask=here < n)


@triton.jit
def _sum_by_atomics(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + here // 8, tl.load(x + here, mask=here < n), mask=here < n)


@triton.jit
def _load_without_mask(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + here), mask=here < n)


@triton.jit
def _overlapping_stores(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + here, mask=here < n), mask=here < n)


@triton.jit
def _load_of_what_a_neighbour_stores(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + here, tl.load(x + here + 1, mask=here + 1 < n), mask=here < n)


@triton.jit
def _load_of_what_it_stored(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + here, mask=here < n), mask=here < n)
    tl.store(x + here, tl.load(y + here // 2 * 2, mask=here < n), mask=here < n)


@triton.jit
def _load_of_what_a_neighbour_adds_to(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + here, tl.load(x + here, mask=here < n), mask=here < n)
    tl.store(x + here, tl.load(y + here + BLOCK, mask=here + BLOCK < n), mask=here < n)


@triton.jit
def _store_over_what_it_adds_to(x, y, n, BLOCK: tl.constexpr):
    here = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y + here // 8, tl.load(x + here, mask=here < n), mask=here < n)
    tl.store(y + here, 0.0, mask=here < n)


def _run(kernel: Any, ops: Ops) -> None:
    kernel[(4,)](torch.arange(100.0), torch.zeros(100), 100, BLOCK=32)


# What the kernel does, the start of the expected fault (empty: no fault), and the case that runs it.
KERNELS: list[tuple[str, str, Case]] = [
    (kernel.__name__.strip("_").replace("_", " "), expected, partial(_run, kernel))
    for expected, kernel in [
        ("", _sound),
        ("", _sum_by_atomics),
        ("bounds: reads", _load_without_mask),
        ("race: program 1 writes what program 0 writes", _overlapping_stores),
        ("race: program 1 writes what program 0 reads", _load_of_what_a_neighbour_stores),
        ("race: program 0 reads what it itself writes", _load_of_what_it_stored),
        ("race: program 1 adds to what program 0 reads", _load_of_what_a_neighbour_adds_to),
        ("race: program 0 writes what it itself adds to", _store_over_what_it_adds_to),
    ]
]


# ---- copies of our modules ----


@dataclass(frozen=True)
class Plant:
    """A fault in a copy of one of our modules.

    Attributes:
        name: of the fault.
        expected: the start of the message that must be reported.
        module: the module that is copied.
        case: the case that shows the fault.
        changes: texts of the source, and what replaces each of them, at every place.
    """

    name: str
    expected: str
    module: ModuleType
    case: Case
    changes: dict[str, str]


class CannotPlant(Exception):
    """The text to change is no longer in the source."""


def source_with(plant: Plant) -> str:
    """The changed source of the plant's module.

    Raises:
        CannotPlant: a text to change is not in the source.
    """
    source = Path(str(plant.module.__file__)).read_text()
    for old, new in plant.changes.items():
        if old not in source:
            raise CannotPlant(f"{plant.module.__name__} no longer has: {old}")
        source = source.replace(old, new)
    return source


def planted(plant: Plant, folder: Path) -> tuple[Path, Ops]:
    """Write the copy into a new folder under ``folder``. Returns its path, and all operators including the copy's."""
    source = source_with(plant)
    path = Path(tempfile.mkdtemp(prefix="planted_", dir=folder)) / Path(str(plant.module.__file__)).name
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return path, OPS | {op: getattr(copy, op) for op in OPS if hasattr(copy, op)}


SMALL_PLANTS = [
    Plant("layer_norm: rows stored one too far", "bounds: writes", layer_norm, SMALL["add_layer_norm C96"],
          {"here = rows[:, None] * C": "here = (rows[:, None] + 1) * C"}),
    Plant("attention: columns beyond D loaded", "bounds: reads", attention, SMALL["attention bf16 D48 full"],
          {"if CHECK and D < BLOCK_D:": "if False:"}),
    Plant("attention: rows beyond T loaded", "bounds: reads", attention, SMALL["attention bf16 D64"],
          {"n_query, True, D, BLOCK_M": "n_query, False, D, BLOCK_M"}),
    Plant("gelu: a mask one too long", "bounds: reads", gelu, SMALL["gelu"],
          {"tl.load(x + here, mask=here < n": "tl.load(x + here, mask=here <= n"}),
    Plant("adamw: a store without mask", "bounds: writes", adamw, SMALL["adamw"],
          {"v.to(M), mask=written": "v.to(M)"}),
    Plant("layer_norm: two programs, one share", "race", layer_norm, SMALL["add_layer_norm C96"],
          {"shares + program * C": "shares + program // 2 * C"}),
    Plant("cross_entropy: the gradient a row off", "race", cross_entropy, SMALL["cross_entropy V65"],
          {"row, row, target, maximum": "row, row + 1, target, maximum"}),
    Plant("cross_entropy: class weights beyond the last", "bounds: reads", cross_entropy,
          SMALL["cross_entropy options, weights"],
          {"w = tl.load(weight + start + lanes, mask=inside, other=0.0)": "w = tl.load(weight + start + lanes)"}),
    Plant("embedding: a run added by two programs", "race", embedding, SMALL["embedding"],
          {"if came_before & (run == begin):": "if False:", "elif next_token == token:": "elif False:"}),
    Plant("linear: two programs, one share", "race", linear, SMALL["linear bias"],
          {"shares + share * n_columns": "shares + share // 2 * n_columns"}),
    Plant("columns: the last columns left out", "unwritten", columns, SMALL["sum_of_shares"],
          {"(cdiv(C, config": "((C // config"}),
    Plant("attention: delta never stored", "unwritten", attention, SMALL["attention fp32 D32"],
          {"tl.store(delta + rows, row_delta, mask=rows < n_query)": "pass"}),
    Plant("attention: dq added to without atomics", "race", attention, SMALL["attention single pass"],
          {'tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")':
           "tl.store(pointers, tl.load(pointers, mask=inside) + tile, mask=inside)"}),
    Plant("attention: dq added to what was there", "unwritten", attention, SMALL["attention single pass"],
          {"_store_tile(dq_sums + head.to(tl.int64) * n_query * D, zeros, start_m, D, n_query, D, BLOCK_M, BLOCK_D)":
           "pass"}),
    Plant("adamw: twice the chunk promised", "hint", adamw, SMALL["adamw"],
          {"tl.multiple_of(tl.load(offsets + chunk), CHUNK)": "tl.multiple_of(tl.load(offsets + chunk), 2 * CHUNK)"}),
]  # fmt: skip

LARGE_PLANTS = [
    Plant("layer_norm: rows in int32", "overflow", layer_norm, LARGE["layer_norm, 2**31 elements"],
          {"rows = tl.program_id(0).to(tl.int64) * ROWS": "rows = tl.program_id(0) * ROWS"}),
    Plant("cross_entropy: rows in int32", "overflow", cross_entropy, LARGE["cross_entropy, 2**31 elements"],
          {"i = tl.program_id(0).to(tl.int64)": "i = tl.program_id(0)"}),
    Plant("gelu: elements in int32", "overflow", gelu, LARGE["gelu, 2**31 elements"],
          {"here = tl.program_id(0).to(tl.int64) * BLOCK": "here = tl.program_id(0) * BLOCK"}),
    Plant("attention: positions in int32", "overflow", attention, LARGE["attention, positions 2**23 - 16 apart"],
          {"tl.cast(start, tl.int64) * stride": "start * stride"}),
    Plant("attention: heads in int32", "overflow", attention, LARGE["attention, 2**31 elements"],
          {"(head // n_head).to(tl.int64)": "(head // n_head)"}),
    Plant("attention: dq's sums in int32", "overflow", attention, LARGE["attention, 2**31 elements"],
          {"head.to(tl.int64) * n_query * D": "head * n_query * D"}),
    Plant("embedding: tokens in int32", "overflow", embedding, LARGE["embedding, 2**31 elements"],
          {"token.to(tl.int64) * n_columns": "token * n_columns"}),
    Plant("gelu: rows on the grid's second axis", "grid", gelu, LARGE["gelu bias, 2**18 rows"],
          {"tl.program_id(0) % n_blocks * COLUMNS": "tl.program_id(0) * COLUMNS",
           "(tl.program_id(0) // n_blocks).to(tl.int64)": "tl.program_id(1).to(tl.int64)",
           'grid = (cdiv(n_rows, config["ROWS"]) * cdiv(n_columns, config["COLUMNS"]),)':
           'grid = (cdiv(n_columns, config["COLUMNS"]), cdiv(n_rows, config["ROWS"]))'}),
]  # fmt: skip

BARRIER_PLANTS = [
    Plant("cross_entropy: no barrier", "race", cross_entropy, IN_PLACE["cross_entropy 50304 bfloat16"],
          {"tl.debug_barrier()": "pass"}),
    Plant("adamw: no barrier", "race", adamw, IN_PLACE["adamw 4096 bfloat16 float32 False"],
          {"tl.debug_barrier()  # the zeros": "pass  # the zeros"}),
    Plant("adamw_8bit: no barrier", "race", adamw, IN_PLACE["adamw_8bit 4096 bfloat16 float32 bfloat16"],
          {"tl.debug_barrier()  # as above": "pass"}),
]  # fmt: skip
