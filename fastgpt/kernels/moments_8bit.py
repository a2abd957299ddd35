"""The 8-bit format of AdamW's and Muon's moments: constants of every backend, encoding and decoding in plain PyTorch.

256 consecutive elements of a flattened moment form a block with one fp32 scale, the power of two above the largest
magnitude in it. An element is one byte: a floating-point number with three bits of fraction, stored as its distance
from the scale. Code c, without its sign, stands for the fp32 whose upper twelve bits (sign, exponent, three bits of
fraction) are those of the scale, plus c, minus the largest code; 0 stands for zero.

    exp_avg      sign in the highest bit, 127 magnitudes: 16 binades, 4.8 decades below the scale
    exp_avg_sq   255 magnitudes: 32 binades, 9.6 decades, so that its square root reaches as far down as exp_avg

Muon's momentum_buffer is stored as exp_avg is.

Codes are rounded up or down at random so that the mean is the value itself. With beta2 = 0.999 a moment moves by less
than half the distance of two codes, and rounding to the nearest would never move it.

The scale is a power of two. Encoding is then exact arithmetic on bit patterns, the same on every backend, and a code
keeps its value when the scale changes.

Below the smallest magnitude exp_avg is rounded to it or to zero, also without bias. exp_avg_sq is rounded up to it,
because a zero there would make a step of exp_avg / eps.

One scale for each block is the idea of Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021. Their
codes come from a table; these are computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENT_BLOCK = 256  # elements that share a scale; 4 bytes for 256 add 0.016 bytes an element
MOMENT_SHIFT = 20  # an fp32 has 23 bits of fraction; shifted by 20, three of them remain
LEAST_MOMENT_SCALE = 33  # biased exponent; below it the smallest of 255 codes, 32 binades down, is not a normal fp32


def in_blocks(flat: Tensor) -> Tensor:
    """``flat``, one-dimensional, as (n, 256), the last row padded with zeros."""
    return F.pad(flat, (0, -len(flat) % MOMENT_BLOCK)).view(-1, MOMENT_BLOCK)


def encode_moment(x: Tensor, random: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (n, 256), uint8, and scales (n, 1), fp32, of ``x`` (n, 256), fp32.

    Args:
        x: a moment, one block a row.
        random: numbers in [0, 2**16), int32, in the shape of ``x``.
        signed: whether it is ``exp_avg``; ``exp_avg_sq`` has no sign.
    """
    largest = 127 if signed else 255
    bits = x.view(torch.int32) & 0x7FFFFFFF  # of |x|; they sort as the magnitudes do
    # the next power of two above the largest magnitude; 254 is the largest exponent of a finite number
    scale = ((bits.amax(-1, keepdim=True) >> 23) + 1).clamp(LEAST_MOMENT_SCALE, 254) << 23
    bits = bits.minimum(scale)  # a moment that is not finite gets the largest code
    zero = (scale >> MOMENT_SHIFT) - largest  # the upper twelve bits that code 0 would stand for
    # 16 random bits against the upper 16 of the 20 that are dropped: a carry out of them rounds up
    codes = ((bits + (random << 4)) >> MOMENT_SHIFT) - zero
    if signed:
        smallest = (zero + 1) << MOMENT_SHIFT
        up = random * (smallest.view(torch.float32) * 2.0**-16) < x.abs()  # with probability |x| / smallest
        codes = torch.where(bits < smallest, up.int(), codes)
        codes = torch.where((codes > 0) & (x < 0), codes + 128, codes)
    else:
        codes = torch.where(bits > 0, codes.clamp(min=1), 0)
    return codes.to(torch.uint8), scale.view(torch.float32)


def decode_moment(codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """Return the moment, (n, 256) fp32, that codes (n, 256) and scales (n, 1) stand for."""
    largest = 127 if signed else 255
    magnitude = codes.int() & largest
    bits = ((scale.view(torch.int32) >> MOMENT_SHIFT) - largest + magnitude) << MOMENT_SHIFT
    values = torch.where(magnitude > 0, bits.view(torch.float32), 0.0)
    return torch.where(codes > 127, -values, values) if signed else values
