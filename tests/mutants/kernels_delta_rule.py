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
        (
            "tl.where(i[:, None] >= i[None, :], tl.dot(q",
            "tl.where(i[:, None] > i[None, :], tl.dot(q",
            "a query does not see its own token (Triton)",
        ),
        (
            "mask=(t + 1 < end) & (i + 1 < C), other=0.0)",
            "mask=t + 1 < end, other=0.0)",
            "a chunk's last token fades by the next chunk's first gate",
        ),
        ("S = S * whole +", "S = S +", "the memory does not fade between chunks (Triton)"),
        (
            "key_row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), row // V * (V // REPEAT) + row % V // REPEAT",
            "key_row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V), row // V * (V // REPEAT)",
            "all value heads of a step read the first key head",
        ),
        ("parent if parent >= 0 else i, len(chunks)", "i, len(chunks)", "an answer starts from itself (Triton)"),
        ("n + 1 + tl.load(walk + 3)):", "n + 1):", "a prompt's gradient lacks its answers'"),
        (
            "(i, parent if parent >= 0 else i, len(chunks), parents.count(i))",
            "(i, parent if parent >= 0 else i, len(chunks), min(1, parents.count(i)))",
            "a prompt's gradient has its first answer's alone",
        ),
        ("for walk in reversed(walks):", "for walk in walks:", "prompts go back before their answers"),
        ("first = start + (chunks - 1 - done) * C", "first = start + done * C", "backward walks forward"),
        (
            "state = (chunk + chunks - 1 - done)",
            "state = (chunk + done)",
            "gradients of memories in the order of the walk",
        ),
        ("dS = dS * whole +", "dS = dS +", "the memory's gradient does not fade between chunks"),
        (
            "q = _tile(q_ptr, key_row, d, dk, inside) * c[:, None]",
            "q = _tile(q_ptr, key_row, d, dk, inside)",
            "the memory's gradient takes queries unfaded",
        ),
        ("dS -= tl.dot(tl.trans(_tile(w_ptr", "dS += tl.dot(tl.trans(_tile(w_ptr", "what is read under keys is added"),
        ("            _put(u, u_ptr, row, e, dv, inside)\n", "", "backward reads T v for the corrections"),
        (
            "inverse = tl.trans(_tile(inverse_ptr, row, i, C, inside))",
            "inverse = _tile(inverse_ptr, row, i, C, inside)",
            "the system is not transposed",
        ),
        ("_put(beta[:, None] * x, dv_ptr", "_put(x, dv_ptr", "values get the gradient of a full correction"),
        ("x_v - x_kS - tl.sum(alike * x_u, axis=1)", "x_v - x_kS", "beta sees the memory of the chunk's start alone"),
        ("reverse=True) + whole * kept", "reverse=True)", "no gate sees what crosses its whole chunk"),
        ("(fade * tl.sum(k * u_dS, axis=1))", "tl.sum(k * u_dS, axis=1)", "gates see what was written unfaded"),
        ("dL = tl.where(below, beta[:, None] * x_u * D", "dL = tl.where(below, x_u * D", "keys see a full correction"),
        ("tl.dot(dL + tl.trans(dL), k", "tl.dot(dL, k", "a key does not see those that come after it"),
        ("tl.dot(tl.trans(dG), q", "tl.dot(dG, q", "keys see the queries before them"),
        (
            "heads = min(V, R * max(1, SCRATCH // (8 * R *",
            "heads = min(V, max(1, SCRATCH // (8 *",
            "the value heads of a key head are torn apart",
        ),
        (".unflatten(2, (H, R)).sum(3)", ".unflatten(2, (R, H)).sum(2)", "gradients go to the wrong key heads"),
        (".expand(n, V, dk, dv)", ".repeat(n, V, dk, dv)", "zeros that nobody gave are kept for backward"),
        ("min(SCRATCH, 8 * V * dk", "min(SCRATCH, 4 * V * dk", "one memory a chunk is planned, there are two"),
        (
            "dstart.masked_fill_((segments.prefix >= 0)[:, None, None, None], 0.0)",
            "dstart",
            "an answer has a gradient in an initial state that it does not read",
        ),
    ]
}
