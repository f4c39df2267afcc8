"""Wrong edits of kernels/glu.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/glu.py"
MUTANTS = {
    "tests/test_glu.py": [
        (
            "    return act * up  # (..., F)",
            "    return (act.float() * up.float()).to(gate.dtype) + 0.0 * up  # (..., F)",
            "the reference no longer gives the bits and gradients it gave",
        ),
        (
            "1.5957691216057308 * c * (1.0 + 0.044715 * c * c)",
            "0.7978845608028654 * c * (1.0 + 0.044715 * c * c)",
            "the argument of tanh, not twice it",
        ),
        ("(1.0 + 0.134145 * c * c)", "(1.0 + 0.044715 * c * c)", "the derivative of g^3 without its 3"),
        ("c = tl.minimum(tl.maximum(g, -12.0), 12.0)", "c = g", "inf * 0 in the gradient of a gate of 1e20"),
        (
            "    e = tl.exp(-tl.abs(v))",
            "    e = tl.exp(-v)",
            "overflow where the gate is shut, and the two sigmoids swapped",
        ),
        (
            "p, q, slope = _sigmoids(g, GELU)",
            "p, q, slope = _sigmoids(g.to(gate_ptr.dtype.element_ty).to(tl.float32) * 1.001, GELU)",
            "a gradient a thousandth off",
        ),
        (
            "near, far = 1.0 / (1.0 + e), e / (1.0 + e)",
            "near, far = 1.0 / (1.0 + e), 1.0 - 1.0 / (1.0 + e)",
            "1 - sigmoid as a subtraction: no digits left in the tail",
        ),
        ("dgate = dy * u * (p + g * p * q * slope)", "dgate = dy * u * p", "the gate's own slope forgotten"),
        ("dup = dy * (g * p)", "dup = dy * p", "dup is the sigmoid, not the activation"),
        (
            "tl.store(y_ptr + n * F + f, (g * p * u)",
            "tl.store(y_ptr + n * F + f, ((g * p).to(y_ptr.dtype.element_ty).to(tl.float32) * u)",
            "rounded twice, as torch does",
        ),
        (
            "u = tl.load(up_ptr + n * stride_up + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)\n    p, _, _",
            "u = tl.load(up_ptr + n * stride_gate + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)\n    p, _, _",
            "one stride for two tensors",
        ),
    ],
}
