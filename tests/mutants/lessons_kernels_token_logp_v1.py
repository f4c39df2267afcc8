"""Wrong edits of lessons/kernels/token_logp_v1.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "lessons/kernels/token_logp_v1.py"
MUTANTS = {
    "tests/test_lesson_kernels_token_logp.py": [
        (
            "    lse = m + tl.log(tl.sum(tl.exp(x - m), axis=0))",
            "    lse = tl.log(tl.sum(tl.exp(x), axis=0))",
            "no maximum: exp overflows",
        ),
        (
            '    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)\n    m =',
            "    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=0.0).to(tl.float32)  # (BLOCK_V,)\n    m =",
            "what lies behind the row's end counts as logits of 0",
        ),
        ("    if logits.shape[1] > MAX_V:", "    if False:", "rows that do not fit spill in silence"),
        (
            "    chosen = logits.gather(1, targets[:, None]).squeeze(1)  # (N,)",
            "    chosen = logits.amax(1)  # (N,)",
            "the reference scores the likeliest token",
        ),
    ],
}
