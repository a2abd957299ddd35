"""Activations and their derivatives, for the kernels that apply them: GELU, alone and in gated units, and SiLU.

tanh is never computed: (1 + tanh(u)) / 2 is the sigmoid of 2u, one exponential and one division.
"""

import triton
import triton.language as tl

TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi), so that 2u needs no product of its own
CUBIC = tl.constexpr(0.044715)  # the coefficient of the approximation, from the paper
SQRT_HALF = tl.constexpr(0.7071067811865476)  # 1 / sqrt(2)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)  # phi(0)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x log2(e))


@triton.jit
def _exponential(x):
    """exp(-2u), because (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))."""
    return tl.exp2(x * (-TWO_SQRT_2_OVER_PI * LOG2E) * (x * x * CUBIC + 1.0))


@triton.jit
def gelu_and_derivative(x, TANH: tl.constexpr):
    """GELU and its derivative at x, fp32. They share the expensive part; the compiler drops an unused result."""
    if TANH:
        e = _exponential(x)
        sigmoid = 1.0 / (1.0 + e)
        value = x * sigmoid
        slope = (x * x * (3.0 * CUBIC) + 1.0) * TWO_SQRT_2_OVER_PI  # d(2u)/dx
        # sigmoid' = sigmoid**2 * e; sigmoid * (1 - sigmoid) would cancel. Far out e is 0 or infinite (or its square
        # overflows, from 1e37 on) while the slope grows without bound, and the true product is 0.
        x_times_slope = tl.where((e > 0.0) & (e < 1e37), x * slope * (sigmoid * sigmoid * e), 0.0)
        derivative = sigmoid + x_times_slope
    else:
        twice_phi = 1.0 + tl.erf(x * SQRT_HALF)
        value = x * (0.5 * twice_phi)
        density = x * INVERSE_SQRT_2_PI * tl.exp2(x * x * (-0.5 * LOG2E))
        # An explicit FMA: otherwise the compiler chooses which product to fuse, depending on whether the value is used,
        # and the backward with the value would differ from the one without in the last bit.
        derivative = tl.fma(0.5, twice_phi, density)
    return value, derivative


@triton.jit
def silu_and_derivative(x):
    """SiLU, x sigmoid(x), and its derivative at x, fp32. Elfwing, Uchibe and Doya, 2017."""
    e = tl.exp2(x * -LOG2E)
    sigmoid = 1.0 / (1.0 + e)
    value = x * sigmoid
    # sigmoid' = sigmoid**2 * e, as above; where e is infinite (or its square overflows) the true product is 0
    derivative = sigmoid + tl.where(e < 1e37, x * (sigmoid * sigmoid * e), 0.0)
    return value, derivative
