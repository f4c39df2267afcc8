"""Wrong edits of nanogspo/layers/delta_net.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/layers/delta_net.py"
MUTANTS = {
    "tests/test_delta_net.py": [
        ("zeros if parent < 0 else tails[parent]", "zeros", "an answer's convolution does not see its prompt"),
        (
            "torch.arange(starts[i], starts[i + 1]) + i * count)",
            "torch.arange(starts[i], starts[i + 1]))",
            "results of the convolution are taken from the wrong places",
        ),
        ("tail.copy_(window[..., 1:])", "tail.copy_(window[..., :-1])", "a step's convolution never moves on"),
        ("return F.silu(y[kept])", "return y[kept]", "no activation behind the convolution"),
        (
            "(x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()",
            "(x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()",
            "keys of length sqrt(dk)",
        ),
        ("q * self.key_dim**-0.5", "q * self.value_dim**-0.5", "queries scaled by the width of values"),
        ("-self.A_log.float().exp()", "-self.A_log.float()", "A instead of exp(A_log)"),
        ("F.softplus(a.float() + self.dt_bias)", "F.softplus(a.float())", "no dt_bias"),
        ("k, v, g, b.sigmoid())", "k, v, g, b.sigmoid() * 2)", "beta up to 2"),
        ("(out * F.silu(z.float()))", "(out * z.float().sigmoid())", "another gate"),
        (
            "self.norm.weight, eps=self.norm.eps, plus_one=False",
            "self.norm.weight, eps=self.norm.eps, plus_one=True",
            "1 + w in the inner norm",
        ),
        (
            "_, _, tails = _with_history(segments.lengths, segments.parents, count, x.device)\n    return _rows(x, tails)",
            "_, _, tails = _with_history(segments.lengths, segments.parents, count, x.device)\n    return _rows(x, tails.flip(1))",
            "the tail's inputs in reverse order",
        ),
    ]
}
