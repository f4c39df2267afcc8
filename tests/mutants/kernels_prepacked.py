"""Wrong edits of kernels/prepacked.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/prepacked.py"
MUTANTS = {
    "tests/test_prepacked.py": [
        (
            "weight.dtype == torch.float32 and weight.shape[1] >= FP32_FROM",
            "weight.shape[1] >= FP32_FROM",
            "prepacked fp16",
        ),
        ("weight.shape[1] >= FP32_FROM", "weight.shape[1] > FP32_FROM", "512 channels are not wide enough"),
        ("FP32_FROM = 512", "FP32_FROM = 256", "the tiny model is prepacked"),
        ("if more := padded_rows(n) - n:", "if more := 0:", "a matmul is compiled for every number of rows"),
        (
            "_linear(padded, blocks, bias)[:n]",
            "_linear(padded, blocks, bias)[-n:]",
            "the rows of the padding are returned",
        ),
        ("(n - 1).bit_length() - 4", "(n - 1).bit_length() - 3", "rows are padded by a quarter"),
        ('weight.device.type in ("cpu", "meta") and', "", "prepacked weights on a GPU"),
        ("else m.B * m.scale for m in layers]", "else m.B for m in layers]", "the adapter's scale is forgotten"),
        (
            "B = [A.new_zeros(len(m.weight), 0) if m.A is None else",
            "B = [A.new_zeros(0, 0) if m.A is None else",
            "an adapter beside the layer before its own",
        ),
        (
            "torch.block_diag(*B).to(dtype)",
            "torch.block_diag(*B).flip(1).to(dtype)",
            "an adapter that reads the A of another",
        ),
        (
            "torch.cat([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in layers])",
            "torch.cat([m.weight.new_zeros(len(m.weight)) for m in layers])",
            "biases are dropped",
        ),
    ],
    "tests/test_fused_linear.py": [
        (
            "else m.B * m.scale for m in layers]",
            "else m.B for m in layers]",
            "concatenated adapters without their scale",
        ),
        (
            "torch.cat([m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in layers])",
            "torch.cat([m.weight.new_zeros(len(m.weight)) for m in layers])",
            "concatenated biases are dropped",
        ),
    ],
}
