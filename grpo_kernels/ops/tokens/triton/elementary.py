"""Elementary functions for Triton kernels, more accurate than the hardware's."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """``e^x - 1``; a series near 0, where the difference cancels."""
    series = x * 0.0 + 1.0
    # truncation error below one ulp of the type for |x| < 0.35
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    for k in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def log2(x):
    """``log2 x`` of a scalar, as fp64, with an error of 2e-7. The hardware's logarithm is applied to the mantissa only,
    because its error grows with the result."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23  # for a mantissa in [0.75, 1.5)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    is_number = (x > 0.0) & (x < float("inf"))
    log_mantissa = tl.log2(tl.where(is_number, mantissa, x)).to(tl.float64)
    return tl.where(is_number, exponent.to(tl.float64) + log_mantissa, log_mantissa)


@triton.jit
def log_near_one(x):
    """``log x`` of a normal number. Accurate near 1, where the hardware's logarithm is not."""
    if x.dtype == tl.float64:
        return tl.log(x)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23  # for a mantissa in [0.75, 1.5)
    y = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    t = y / (2.0 + y)  # log(1 + y) = 2 atanh t
    s = t * t
    series = (((s * (1.0 / 9) + 1.0 / 7) * s + 1.0 / 5) * s + 1.0 / 3) * s + 1.0
    return exponent.to(tl.float32) * 0.6931471805599453 + 2.0 * t * series


@triton.jit
def tanh(x):
    """Error at most 2 ulp. A polynomial near 0, where the exponential form cancels."""
    if x.dtype == tl.float64:
        m = expm1(-2.0 * tl.abs(x))
        magnitude = -m / (m + 2.0)
        return tl.where(x < 0, -magnitude, magnitude)
    s = x * x  # (tanh(x) / x - 1) / x^2 at Chebyshev's nodes of |x| < 0.55
    series = (((-0.0066102277 * s + 0.021309389) * s - 0.05390943) * s + 0.13333113) * s - 0.3333333
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.885390081777927) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * s * series, tl.where(x < 0, -far, far))
