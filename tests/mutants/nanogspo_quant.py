"""Wrong edits of nanogspo/quant.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/quant.py"
MUTANTS = {
    "tests/test_quant.py": [
        (
            "frozen_linear(x, self.q, self.bias)",
            "frozen_linear(x, self.q)",
            "a packed layer loses its bias",
        ),
        (
            "return fn(t.view(torch.int32)).view(torch.float32) if bits else fn(t)",
            "return fn(t)",
            "model.to(bf16) rounds the scales",
        ),
        ("        self.q = dataclasses.replace(self.q, **moved)\n", "", "the kernels read the old device's tensors"),
        (
            "linear.bias, kind))\n    model.requires_grad_(False)\n",
            "linear.bias, kind))\n",
            "norms and embeddings trained beside packed weights",
        ),
        (
            "    return packed + sum(p.numel()",
            "    return sum(p.numel()",
            "a packed model counts as a small one, and gets its learning rate",
        ),
    ],
    "tests/test_planner.py": [
        ('not stored.get("load_in_4bit")', "False", "a folder in 8 bits, or in 16, is planned in 4"),
        ("if isinstance(skip, list) else []", "if False else []", "layers that a 4-bit folder keeps in 16 bits"),
        ('bool(stored.get("bnb_4bit_use_double_quant"))', "True", "scales of a folder without double quantisation"),
        ("if double_quant else torch.float32", "if True else torch.float32", "scales counted in 8 bits"),
    ],
}
