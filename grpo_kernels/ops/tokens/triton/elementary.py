"""Functions of one number as Triton device functions, where the hardware's lose digits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """``e^x - 1``; near 0 a series, where the difference would lose its digits."""
    series = x * 0.0 + 1.0
    # below an ulp of fp32, or of fp64, for |x| < 0.35
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    for k in tl.static_range(TERMS, 1, -1):
        series = 1.0 + series * x * (1.0 / k)
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def log2(x):
    """``log2 x`` of a scalar, in fp64, to 2e-7: the hardware's logarithm errs in proportion, so it gets a mantissa."""
    if x.dtype == tl.float64:
        return tl.log2(x)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23  # of a mantissa in [0.75, 1.5)
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    is_number = (x > 0.0) & (x < float("inf"))
    log_mantissa = tl.log2(tl.where(is_number, mantissa, x)).to(tl.float64)
    return tl.where(is_number, exponent.to(tl.float64) + log_mantissa, log_mantissa)


@triton.jit
def log_near_one(x):
    """``log x`` of a normal number, near 1 without losing the digits of ``x - 1``, as the hardware's logarithm does."""
    if x.dtype == tl.float64:
        return tl.log(x)
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F400000) >> 23  # of a mantissa in [0.75, 1.5)
    y = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    t = y / (2.0 + y)  # log(1 + y) = 2 atanh t
    s = t * t
    series = (((s * (1.0 / 9) + 1.0 / 7) * s + 1.0 / 5) * s + 1.0 / 3) * s + 1.0
    return exponent.to(tl.float32) * 0.6931471805599453 + 2.0 * t * series


@triton.jit
def tanh(x):
    """To two ulps; near 0 by a polynomial, where the exponential would lose its digits."""
    if x.dtype == tl.float64:
        m = expm1(-2.0 * tl.abs(x))
        magnitude = -m / (m + 2.0)
        return tl.where(x < 0, -magnitude, magnitude)
    s = x * x  # (tanh(x) / x - 1) / x^2 at Chebyshev's nodes of |x| < 0.55
    series = (((-0.0066102277 * s + 0.021309389) * s - 0.05390943) * s + 0.13333113) * s - 0.3333333
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.885390081777927) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * s * series, tl.where(x < 0, -far, far))
