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
        (
            "        self.q = dataclasses.replace(self.q, **moved)\n",
            "",
            "the kernels read the old device's tensors",
        ),
        (
            "linear.bias, kind))\n    model.requires_grad_(False)\n",
            "linear.bias, kind))\n",
            "norms and embeddings trained beside packed weights",
        ),
        (
            "self.record = nf4_record(q) if record is None else record",
            "self.record = nf4_record(q)",
            "a file's own record is not written back",
        ),
        (
            "    return packed + sum(p.numel()",
            "    return sum(p.numel()",
            "a packed model counts as a small one, and gets its learning rate",
        ),
        (
            '["lm_head", *(f"model.{name}" for name in plain)]',
            '["lm_head"]',
            "transformers looks for packed weights where there are none",
        ),
        (
            '"nested_offset": q.offset.item()',
            '"nested_offset": round(q.offset.item(), 6)',
            "an offset of 6 digits: other scales",
        ),
        ("if offset is not None and absmax.dtype != torch.uint8:", "if False:", "fp32 scales read as 8-bit codes"),
        (
            'if kind != "nf4" or nested != NESTED:',
            'if kind != "nf4":',
            "scales in blocks of 128 read as blocks of 256",
        ),
        (
            'for name, t in layer._buffers.items() if name not in ("weight", "nested_offset")',
            'for name, t in layer._buffers.items() if name != "weight"',
            "a tensor in the file that bitsandbytes does not know",
        ),
    ],
    "tests/test_planner.py": [
        ('not stored.get("load_in_4bit")', "False", "a folder in 8 bits, or in 16, is planned in 4"),
        ("if isinstance(skip, list) else []", "if False else []", "layers that a 4-bit folder keeps in 16 bits"),
        ('bool(stored.get("bnb_4bit_use_double_quant"))', "True", "scales of a folder without double quantisation"),
        ("if double_quant else torch.float32", "if True else torch.float32", "scales counted in 8 bits"),
    ],
}
