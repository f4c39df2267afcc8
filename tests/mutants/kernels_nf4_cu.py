"""Wrong edits of kernels/nf4.cu, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/nf4.cu"
MUTANTS = {
    "tests/test_nf4.py": [
        ("(j % 2 ? 0 : 4)", "(j % 2 ? 4 : 0)", "the low half of a byte comes first"),
        ("word >> (q.log2_block - 3)", "word >> q.log2_block", "one scale for eight blocks"),
        ("q.absmax2[b >> 8]", "q.absmax2[b >> 7]", "absmax2 of the wrong group"),
        (
            "if (first + j < q.n) out[first + j]",
            "if (first + j <= q.n) out[first + j]",
            "writes one number beyond out",
        ),
        ("<< (8 * (i - first))", "<< (4 * (i - first))", "bytes of a last, short word overlap"),
        ("constexpr int PER_WORD = 8;", "constexpr int PER_WORD = 4;", "a word holds half as many weights"),
    ],
}
