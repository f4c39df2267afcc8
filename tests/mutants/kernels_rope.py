"""Wrong edits of kernels/rope.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/rope.py"
MUTANTS = {
    "tests/test_rope.py": [
        (
            "torch.cat((-second, first), dim=-1)",
            "torch.cat((second, -first), dim=-1)",
            "the reference turns the other way",
        ),
        (
            "    y_first = first * cos - second * sin",
            "    y_first = first * cos + second * sin",
            "a shear in place of a rotation",
        ),
        (
            "square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)  # (ROWS,)\n        if R < D:",
            "square = tl.sum(first * first, axis=1)  # (ROWS,)\n        if R < D:",
            "the mean square of half a head",
        ),
        (
            "        d_second = dy_second * cos - dy_first * sin",
            "        d_second = dy_second * cos + dy_first * sin",
            "backward turns one half forwards",
        ),
        (
            "            d_first = rstd * (d_first - first * along)",
            "            d_first = rstd * d_first",
            "rstd taken for a constant in half the head",
        ),
        (
            "                along += tl.sum(d_tail * tail, axis=1)",
            "                pass",
            "the part that is not turned is normed all the same",
        ),
        (
            "                dw_second += d_second * second",
            "                dw_second += d_second * first",
            "dweight of the second half from the first",
        ),
        (
            "                    dw_tail += d_tail * tail",
            "                    dw_tail = d_tail * tail",
            "only the last tile of a program reaches dweight",
        ),
        (
            "(row % heads).to(tl.int64), row < rows",
            "(row % heads).to(tl.int64), row < rows - 1",
            "the last head is left as it was in memory",
        ),
        (
            "_places(p * tiles + step, heads, T, rows, ROWS)",
            "_places(p + tiles * step, heads, T, rows, ROWS)",
            "programs take each other's heads",
        ),
        (
            "return self.cos.shape[1] if self.cos.shape[0] > 1 else 0",
            "return 0",
            "every row of the batch at the positions of the first",
        ),
        (
            "K, T, tokens * K, eps, NORM, PLUS, D, R, ROWS",
            "H, T, tokens * K, eps, NORM, PLUS, D, R, ROWS",
            "keys turned as if there were as many heads of them as of queries",
        ),
        ('"PLUS": float(self.plus_one)', '"PLUS": 0.0', "Gemma's qk-norm with the weight as stored"),
    ],
}
