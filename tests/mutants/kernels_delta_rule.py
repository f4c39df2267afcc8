"""Wrong edits of kernels/delta_rule.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/delta_rule.py"
MUTANTS = {
    "tests/test_delta_rule.py": [
        (
            "before, root = ends[parent] if parent >= 0 else (None, i)",
            "before, root = None, i",
            "an answer starts from nothing",
        ),
        (
            "offset, befores = sum(map(len, rounds[:-1])),",
            "offset, befores = 0,",
            "a round reads the wrong chunks of the round before",
        ),
        (
            "len(chunks) + root if end is None else rank[end]",
            "len(chunks) + root if end is None else end",
            "final states in the order of sequences, not of rounds",
        ),
        (
            "return dx.flatten(0, 1)[ctx.saved_tensors[0]], None, None",
            "return dx.flatten(0, 1)[: len(ctx.saved_tensors[0])], None, None",
            "gradients stay in the order of chunks",
        ),
        (
            "A = _heads(k @ k.mT, V) * D * beta[..., None]",
            "A = _heads(k @ k.mT, V) * beta[..., None]",
            "what was written does not fade within a chunk",
        ),
        (
            "unitriangular=True) * beta[..., None, :]",
            "unitriangular=True) * beta[..., None]",
            "beta scales rows of the inverse instead of columns",
        ),
        ("corrections, read = T @ v, (T * c.mT) @ k", "corrections, read = T @ v, T @ k", "the memory is read unfaded"),
        (
            "(D[..., -1, :, None] * k).mT, c[..., -1:, :]",
            "(D[..., -1, :, None] * k).mT, c[..., :1, :]",
            "the memory fades by the first token alone",
        ),
        ("(D[..., -1, :, None] * k).mT,", "k.mT,", "what was written does not fade up to the chunk's end"),
        (
            "out = c * (q @ torch.cat(starts)) + attend",
            "out = q @ torch.cat(starts) + attend",
            "queries read an unfaded memory",
        ),
        (
            "(g[..., None] * strict).cumsum(-2)",
            "(g.cumsum(-1)[..., None] - g.cumsum(-1)[..., None, :])",
            "decays from differences of sums",
        ),
        (
            "x.repeat_interleave(V // x.shape[1], dim=1)",
            "x.repeat(1, V // x.shape[1], *[1] * (x.ndim - 2))",
            "key heads are dealt to the wrong value heads",
        ),
        (
            "return found + (q * k).sum(-1, keepdim=True) * u",
            "return found",
            "a step's query does not see its own token",
        ),
        ("state.mul_(fade[..., None]).addcmul_", "state.addcmul_", "a step does not fade the memory"),
        ("for r in range(1, C):", "for r in range(1, C - 1):", "the last row of the inverse is not made"),
        ("tl.where(below | equal, tl.dot(q", "tl.where(below, tl.dot(q", "a query does not see its own token (Triton)"),
        (
            "mask=(t + 1 < end) & (i + 1 < C), other=0.0)",
            "mask=t + 1 < end, other=0.0)",
            "a chunk's last token fades by the next chunk's first gate",
        ),
        ("S = S * tl.exp(tl.sum(g, axis=0)) +", "S = S +", "the memory does not fade between chunks (Triton)"),
        (
            "key_row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), row // V * (V // REPEAT) + row % V // REPEAT",
            "key_row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), row // V * (V // REPEAT)",
            "all value heads of a step read the first key head",
        ),
        ("rows = [(i, p if answers else i)", "rows = [(i, i)", "an answer starts from itself (Triton)"),
    ]
}
