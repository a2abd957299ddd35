"""The gradient of an embedding: row i of dy is added to row index[i] of a matrix.

Rows are sorted by token, stably, so that the rows of one token lie together and keep their order. A program takes a
block of sorted rows. It sums each run of equal tokens, and adds the sum to a row of the matrix that no other program
touches. A run that crosses blocks goes through a buffer, ``parts``, with two rows for each block: the sums of the
block's first and last run. A second kernel adds up the parts of such a run, in order, in the program of the block where
the run begins. So the rows of the most frequent token are shared among programs, and every sum is taken in an order
that depends on the tokens only.

Bytes moved, with N rows of C elements of s bytes: C s read for each row, 8 C read and written for each distinct token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.triton.columns import check_main_grad
from fastgpt.kernels.triton.launch import cdiv, configuration, device_of, kernel, launch, rows_of


@triton.jit
def _add_to_row(main_grad, token, columns, in_columns, total, n_columns):
    """main_grad[token, columns] += total, without atomics."""
    here = main_grad + token.to(tl.int64) * n_columns + columns
    tl.store(here, tl.load(here, mask=in_columns, other=0.0) + total, mask=in_columns)


@kernel
def _runs_kernel(
    dy,  # (N, C), rows contiguous, dy_stride elements apart, in their original order
    tokens,  # (N,) int32, sorted
    order,  # (N,) int64, the row of dy that each sorted token belongs to
    main_grad,  # (V, C) fp32, contiguous, added to
    parts,  # (n_blocks, 2, C) fp32, written: sums of a block's first and last run, where they cross its ends
    dy_stride, n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS sorted rows, COLUMNS columns. Grid: (cdiv(N, ROWS), cdiv(C, COLUMNS))."""
    block = tl.program_id(0)
    begin = block * ROWS
    end = tl.minimum(begin + ROWS, n_rows)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    part = parts + 2 * block.to(tl.int64) * n_columns + columns

    token = tl.load(tokens + begin)
    came_before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1) == token
    run = begin
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    ahead = tl.load(dy + tl.load(order + begin) * dy_stride + columns, mask=in_columns, other=0.0)
    for i in range(begin, end):
        value = ahead
        row = tl.load(order + tl.minimum(i + 1, end - 1))  # loads the next row while this one is added
        ahead = tl.load(dy + row * dy_stride + columns, mask=in_columns, other=0.0)
        next_token = tl.load(tokens + i + 1, mask=i + 1 < n_rows, other=-1)
        total += value.to(tl.float32)
        if (next_token != token) | (i + 1 == end):  # the run ends, or the block does
            if came_before & (run == begin):  # it began in an earlier block, and may go on behind this one
                tl.store(part, total, mask=in_columns)
            elif next_token == token:  # it begins here and goes on in the next block
                tl.store(part + n_columns, total, mask=in_columns)
            else:
                _add_to_row(main_grad, token, columns, in_columns, total, n_columns)
            run = i + 1
            total = tl.zeros((COLUMNS,), dtype=tl.float32)
        token = next_token


@kernel
def _crossing_kernel(
    tokens,  # (N,) int32, sorted
    parts,  # (n_blocks, 2, C) fp32, from _runs_kernel
    main_grad,  # (V, C) fp32, contiguous, added to
    n_rows, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: the run that begins in a block and crosses its end, if there is one.

    Grid: (n_blocks - 1, cdiv(C, COLUMNS)); no run crosses the end of the last block. Parts are added BLOCKS at a time.
    """
    block = tl.program_id(0)
    begin = block * ROWS
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < n_columns
    token = tl.load(tokens + begin + ROWS - 1)
    came_before = tl.load(tokens + begin - 1, mask=begin > 0, other=-1) == token
    if (tl.load(tokens + begin + ROWS) == token) & (came_before == 0):
        total = tl.load(parts + (2 * block.to(tl.int64) + 1) * n_columns + columns, mask=in_columns, other=0.0)
        first, n_mine = block + 1, BLOCKS
        while n_mine == BLOCKS:  # until a block that does not begin with the token
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
    tokens, order = torch.sort(index.to(torch.int32), stable=True)  # sorting int32 takes half the passes of int64
    config = configuration(device_of(dy), "embedding_backward", "any")
    n_parts = config.pop("BLOCKS")
    n_blocks, across = cdiv(n_rows, config["ROWS"]), cdiv(n_columns, config["COLUMNS"])
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
