"""Wrong edits of kernels/moe.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/moe.py"
MUTANTS = {
    "tests/test_moe_kernel.py": [
        (".sort(stable=True)", ".sort(stable=True, descending=True)", "rows of the last expert come first"),
        ("order // index.shape[1], place", "order, place", "a row takes the token of its pair's number"),
        (
            "torch.arange(experts + 1, device=order.device))  # (E + 1,)",
            "torch.arange(1, experts + 2, device=order.device))  # (E + 1,)",
            "an expert's rows begin where the next one's do",
        ),
        (
            "enumerate(zip(bounds, bounds[1:], strict=False)) if a < b]",
            "enumerate(zip(bounds, bounds[1:], strict=False)) if a + 1 < b]",
            "an expert with one row is left out",
        ),
        (
            "size = BLOCK_M if N > FEW_M * E else FEW_M",
            "size = BLOCK_M if N >= FEW_M * E else FEW_M",
            "large tiles already at 16 rows an expert",
        ),
        ("(self.start.diff() + size - 1) // size", "self.start.diff() // size", "a tile that is not full is left out"),
        ("(t - (end - count)[expert]) * size", "(t - end[expert]) * size", "tiles begin an expert too early"),
        (
            "torch.searchsorted(end, t, right=True)",
            "torch.searchsorted(end, t)",
            "the first tile of an expert takes the weight of the one before",
        ),
        (
            "torch.mm(x[rows], w if turned else w.T, out=y[rows])",
            "torch.mm(x[rows], (w if turned else w.T) * 2, out=y[rows])",
            "twice the product",
        ),
        (
            "    dw[groups.start.diff() == 0] = 0  # experts without rows\n",
            "",
            "weights of experts without rows get what was in memory",
        ),
        (
            "    stop = tl.load(start_ptr + e + 1)\n    n = row + tl.arange",
            "    stop = tl.load(start_ptr + e + 1) - 1\n    n = row + tl.arange",
            "the last row of an expert is left out",
        ),
        (
            "inside = (n < stop)[:, None] & (k < K)[None, :]  # (BLOCK_M, BLOCK_K)\n            x =",
            "inside = (n < stop)[:, None] & (k < K - 1)[None, :]  # (BLOCK_M, BLOCK_K)\n            x =",
            "the last number of a row is left out",
        ),
        (
            "                v = tl.load(v_ptr + e * v_e",
            "                v = tl.load(w_ptr + e * v_e",
            "up is multiplied with gate's weight",
        ),
        ("tl.load(w_ptr + e * w_e + f", "tl.load(w_ptr + f", "every expert is the first"),
        (
            "tl.load(start_ptr + e), stop, BLOCK_M):",
            "tl.load(start_ptr + e), stop - 1, BLOCK_M):",
            "a gradient without the last row of a block",
        ),
        (
            "inside = (n < stop)[None, :] & (f < F)[:, None]  # (BLOCK_N, BLOCK_M)",
            "inside = (n <= stop)[None, :] & (f < F)[:, None]  # (BLOCK_N, BLOCK_M)",
            "the next expert's first row counts in a gradient",
        ),
        ("weights = [w.mT if turned else w for w in weights]", "weights = [w for w in weights]", "dx = dy W^T"),
        (
            "functools.reduce(torch.add, (",
            "functools.reduce(lambda a, b: b, (",
            "of gate and up only one has a gradient in x",
        ),
        (
            "ctx.rows(dy, [w], groups, True)[0] for dy, w in parts",
            "ctx.rows(dy, [w], groups, True)[0] * 2 for dy, w in parts",
            "twice the gradient of x",
        ),
        (
            "zip(dys, weights, wanted[4:], strict=False)",
            "zip(dys[::-1], weights, wanted[4:], strict=False)",
            "gate's gradient goes to up",
        ),
        (
            "part = part if w is None else part * w[:, j, None]",
            "part = part if w is None else part * w[:, 0, None]",
            "all experts of a token count as the first",
        ),
        (
            "part = y[groups.place[:, j]].float()  # (T, C)",
            "part = y[groups.place[:, j]]  # (T, C)",
            "sums in the model's dtype",
        ),
        (
            "        dw = (rows.float() * y.float()).sum(-1)[groups.place]",
            "        dw = (rows.float() * y.float()).sum(-1).view(groups.place.shape)",
            "gradients of weights in the order of rows",
        ),
        (
            "return rows * w.flatten()[groups.order, None], dw, None",
            "return rows * w.flatten()[:, None], dw, None",
            "rows are weighed in the order of pairs",
        ),
        (
            "return _sum(drows, None, ctx.groups), None  # (T, C)",
            "return _sum(drows, None, ctx.groups) * 2, None  # (T, C)",
            "twice the gradient of x through spread",
        ),
        ("or len(shapes) > 2 or", "or", "three weights, of which one is left out"),
        ("    if any(w.dtype != x.dtype for w in weights):", "    if False:", "bf16 weights for fp32 rows"),
    ],
}
