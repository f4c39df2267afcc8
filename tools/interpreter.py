"""Makes Triton's CPU interpreter exact in bf16, so that kernels can be proved on machines without a GPU.

Triton 3.9's interpreter keeps bf16 as raw 16-bit integers. Left alone, tl.dot and arithmetic on them are garbage, and a
cast from fp32 truncates where every GPU rounds to nearest even: half of all values differ in the last bit. The four
functions below widen to fp32, compute, and round properly. Comparisons and negation are not covered: kernels
widen with .to(tl.float32) before anything but tl.dot, which is good style on a GPU as well.

The tests' conftest.py and the kernel lessons call exact_bf16() once, before the first kernel runs. It does nothing when
Triton is missing or kernels are compiled. It patches Triton in this process only; nanogspo and kernels never do.

What the interpreter still cannot show: races, missing barriers, shared-memory and register limits, tf32 in fp32 dots,
undefined values of masked loads without `other`. tools/compile_kernels.py and a GPU run look for those.
"""

import os

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> the same numbers in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers.astype(np.float32)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def exact_bf16() -> None:
    """Patch the interpreter of this process. Calling it twice is harmless."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("1", "true", "on", "yes", "y"):
        return
    try:
        import triton.language as tl
        import triton.runtime.interpreter as interpreter
    except ImportError:
        return
    builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "bf16_is_exact", False):
        return
    dot, cast, binary = builder.create_dot, builder.cast_impl, builder.binary_op

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        wide = [widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)]
        product = np.matmul(*(x.astype(d.data.dtype) for x in wide))
        return Handle(product + d.data, d.dtype.scalar)

    def cast_impl(self, x, to):
        pair = (x.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return Handle(narrow(x.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return Handle(widen(x.data), tl.float32)
        return cast(self, x, to)

    def binary_op(self, a, b, op):
        if a.dtype.scalar != tl.bfloat16:
            return binary(self, a, b, op)
        return Handle(narrow(op(widen(a.data), widen(b.data))), tl.bfloat16)

    builder.create_dot, builder.cast_impl, builder.binary_op = create_dot, cast_impl, binary_op
    builder.create_fp_trunc = builder.create_fp_ext = lambda self, x, to: self.cast_impl(x, to)
    builder.bf16_is_exact = True
