"""The gradient of an embedding: rows of dy added to the rows of a matrix that their tokens name.

Rows are sorted by token, stably, so that those of one token lie together, in their order. A program adds up the runs
of equal tokens in a block of sorted rows and adds each to the matrix, which nobody else touches there. The parts of a
run that crosses blocks go through a buffer of two rows a block, and the program of the block where such a run begins
adds them up, in their order. So no token, however frequent, keeps one program busy, and every sum is taken in an order
that depends on the tokens alone.

Bytes moved for each of N rows of C elements of s bytes: C s read, and for each token among them 8 C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.columns import check_main_grad
from fastgpt.kernels.triton.launch import configuration, device_of, kernel, launch, rows_of


@triton.jit
def _add_to_row(main_grad, token, columns, in_columns, total, n_columns):
    here = main_grad + token.to(tl.int64) * n_columns + columns
    tl.store(here, tl.load(here, mask=in_columns, other=0.0) + total, mask=in_columns)


@kernel
def _runs_kernel(
    dy, tokens, order, main_grad, parts, dy_stride, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    block = tl.program_id(0)
    begin = block * ROWS
    end = tl.minimum(begin + ROWS, n_rows)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    part = parts + 2 * block.to(tl.int64) * n_columns + columns  # (n_blocks, 2, C): of the first run, of the last

    token = tl.load(tokens + begin)
    came_before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1) == token
    run = begin
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    ahead = tl.load(dy + tl.load(order + begin) * dy_stride + columns, mask=in_columns, other=0.0)
    for i in range(begin, end):
        value = ahead
        row = tl.load(order + tl.minimum(i + 1, end - 1))  # the next one is on its way while this one is added
        ahead = tl.load(dy + row * dy_stride + columns, mask=in_columns, other=0.0)
        next_token = tl.load(tokens + i + 1, mask=i + 1 < n_rows, other=-1)
        total += value.to(tl.float32)
        if (next_token != token) | (i + 1 == end):
            if came_before & (run == begin):
                tl.store(part, total, mask=in_columns)
            elif next_token == token:
                tl.store(part + n_columns, total, mask=in_columns)
            else:
                _add_to_row(main_grad, token, columns, in_columns, total, n_columns)
            run = i + 1
            total = tl.zeros((COLUMNS,), dtype=tl.float32)
        token = next_token


@kernel
def _crossing_kernel(
    tokens, parts, main_grad, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0)  # not the last one
    begin = block * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    token = tl.load(tokens + begin + ROWS - 1)
    came_before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1) == token
    if (tl.load(tokens + begin + ROWS) == token) & (came_before == 0):
        total = tl.load(parts + (2 * block.to(tl.int64) + 1) * n_columns + columns, mask=in_columns, other=0.0)
        first, n_mine = block + 1, BLOCKS
        while n_mine == BLOCKS:  # the blocks that begin with the token are those that follow
            blocks = first + tl.arange(0, BLOCKS)
            starts = blocks * ROWS
            mine = (starts < n_rows) & (tl.load(tokens + starts, mask=starts < n_rows, other=-1) == token)
            here = parts + 2 * blocks.to(tl.int64)[:, None] * n_columns + columns[None, :]
            total += tl.sum(tl.load(here, mask=mine[:, None] & in_columns[None, :], other=0.0), axis=0)
            first += BLOCKS
            n_mine = tl.sum(mine.to(tl.int32), axis=0)
        _add_to_row(main_grad, token, columns, in_columns, total, n_columns)


def embedding_backward_(main_grad: Tensor, dy: Tensor, index: Tensor) -> None:
    check_main_grad(main_grad, main_grad.numel())
    if dy.numel() == 0:
        return
    rows = rows_of(dy)
    n_rows, n_columns = rows.shape
    tokens, order = torch.sort(index.to(torch.int32), stable=True)  # half the passes of int64
    config = configuration(device_of(dy), "embedding_backward", "any")
    n_parts = config.pop("BLOCKS")
    n_blocks, across = triton.cdiv(n_rows, config["ROWS"]), triton.cdiv(n_columns, config["COLUMNS"])
    parts = dy.new_empty((n_blocks, 2, n_columns), dtype=torch.float32)
    launch(
        _runs_kernel, (n_blocks, across),
        rows, tokens, order, main_grad, parts, rows.stride(0), n_rows, n_columns, **config,
    )  # fmt: skip
    if n_blocks > 1:
        launch(
            _crossing_kernel, (n_blocks - 1, across),
            tokens, parts, main_grad, n_rows, n_columns, BLOCKS=n_parts, **config,
        )  # fmt: skip
