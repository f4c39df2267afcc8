"""Wrong edits of nanogspo/storage/interleaved.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/interleaved.py"
MUTANTS = {
    "tests/test_delta_net.py": [
        ("return super().read()[self.index]", "return super().read()[: len(self.index)]", "rows in the file's order"),
        ("[self.index][rows or slice(None)]", "[self.index]", "a part of a projection is read as the whole"),
        ("parts(dk, dk, r * dv, r * dv)", "parts(dk, r * dv, dk, r * dv)", "values stand before keys"),
        (".view(H, -1)  # (H, rows of a key head)", ".view(-1, H).T", "key heads take turns row by row"),
        (
            '"in_proj_ba": {"in_proj_b": b, "in_proj_a": a}',
            '"in_proj_ba": {"in_proj_b": a, "in_proj_a": b}',
            "beta and decay change places",
        ),
        (
            "torch.cat(list(order.values())).argsort()",
            "torch.cat(list(order.values()))",
            "rows are put in order a second time when they are written",
        ),
        ("lambda gets=gets, back=back:", "lambda back=back:", "every layer writes the last one's rows"),
        ("(sum(sizes), make)", "(sizes[0], make)", "a shard is filled beyond its limit"),
        (
            "if sum(map(len, order.values())) != (stored.shape or (0,))[0]:",
            "if not order:",
            "a matrix with too few rows is taken apart",
        ),
    ]
}
