"""Wrong edits of nanogspo/storage/bitsandbytes.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/bitsandbytes.py"
MUTANTS = {
    "tests/test_quant.py": [
        (
            '["lm_head", *(f"model.{name.removesuffix(\'.base\')}" for name in plain)]',
            '["lm_head"]',
            "transformers looks for packed weights where there are none",
        ),
        (
            '"nested_offset": q.offset.item()',
            '"nested_offset": round(q.offset.item(), 6)',
            "an offset of 6 digits: other scales",
        ),
        ("if offset is not None and absmax.dtype != torch.uint8:", "if False:", "fp32 scales read as 8-bit codes"),
        ('if kind != "nf4" or nested != NESTED:', 'if kind != "nf4":', "scales in blocks of 128 read as blocks of 256"),
        (
            'for name, t in layer._buffers.items() if name not in ("weight", "nested_offset")',
            'for name, t in layer._buffers.items() if name != "weight"',
            "a tensor in the file that bitsandbytes does not know",
        ),
        (
            "quant_state(layer.q) if layer.quant_state is None else layer.quant_state",
            "quant_state(layer.q)",
            "a file's own quant state is not written back",
        ),
    ],
}
