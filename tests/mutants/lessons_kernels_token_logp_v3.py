"""Wrong edits of lessons/kernels/token_logp_v3.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "lessons/kernels/token_logp_v3.py"
MUTANTS = {
    "tests/test_lesson_kernels_token_logp.py": [
        (
            "        s = s * tl.exp(m - m_new) + tl.sum",
            "        s = s + tl.sum",
            "the sum is not rescaled when the maximum rises",
        ),
        ("        m = m_new\n", "        m = tl.max(x, axis=0)\n", "the maximum of the last tile only"),
        ("    m = -3.4028234663852886e38  #", '    m = -float("inf")  #', "a first tile of banned tokens is nan"),
        (
            "    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)",
            "    v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)",
            "backward writes only the first tile",
        ),
        ("dlogp.contiguous()", "dlogp", "a gradient with stride 0 is read as if it were dense"),
    ],
}
