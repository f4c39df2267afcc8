"""Makes Triton's CPU interpreter exact, so that kernels can be proved on machines without a GPU.

bf16: Triton 3.9's interpreter keeps it as raw 16-bit integers. Left alone, tl.dot and arithmetic on them are garbage,
and a cast from fp32 truncates where every GPU rounds to nearest even: half of all values differ in the last bit. The
functions below widen to fp32, compute, and round properly. Comparisons and negation are not covered: kernels
widen with .to(tl.float32) before anything but tl.dot, which is good style on a GPU as well.

tl.dot: the interpreter multiplies tiles with numpy's BLAS. Its kernels give a row of a tile other last bits in another
place of the tile on some CPUs (OpenBLAS on Haswell does), where a GPU's tensor cores treat every row alike. Here the
products of a row are added one after the other, so a row's bits depend on that row alone, on every CPU.

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


def matmul(a: np.ndarray, b: np.ndarray, d: np.ndarray) -> np.ndarray:
    """a @ b + d for a (..., M, K), b (..., K, N) and d (..., M, N), in d's dtype and without BLAS.

    K is summed from first to last, each product and each sum rounded by itself. Every entry is made by the same
    sequence of additions wherever it stands.
    """
    total = np.zeros(d.shape, d.dtype)  # (..., M, N)
    a, b, product = a.astype(d.dtype, copy=False), b.astype(d.dtype, copy=False), np.empty_like(total)
    for k in range(a.shape[-1]):
        np.multiply(a[..., :, k, None], b[..., k, None, :], out=product)
        total += product
    return total + d


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
        if 8 in (a.dtype.primitive_bitwidth, b.dtype.primitive_bitwidth):  # fp8: no kernel here multiplies it
            return dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        wide = [widen(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b)]
        return Handle(matmul(*wide, d.data), d.dtype.scalar)

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
    _keep_patches(interpreter, tl)


def _keep_patches(interpreter, tl) -> None:
    """Triton exchanges the functions of triton.language at every launch and every call of a @triton.jit function, and
    puts them back after it: a third of the time of a small kernel. Here they stay, because nothing compiles kernels in
    a process that interprets them."""
    patch, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_once(fn):
        languages = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
        if languages not in patched:
            patch(fn)
            patched.add(languages)
        return Kept()

    interpreter._patch_lang = patch_once
