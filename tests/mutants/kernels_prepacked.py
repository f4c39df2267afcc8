"""Wrong edits of kernels/prepacked.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/prepacked.py"
MUTANTS = {
    "tests/test_prepacked.py": [
        ("layer.B * layer.scale", "layer.B", "the adapter's scale is forgotten"),
        ("                    column += r\n", "", "adapters share the columns of the first"),
        (
            "                start += out\n",
            "                start += out if layer.A is not None else 0\n",
            "an adapter beside the layer before its own",
        ),
        ("zero if b is None else b", "zero", "biases are dropped"),
        (
            "weight.dtype == torch.float32 and weight.shape[1] >= FP32_FROM",
            "weight.shape[1] >= FP32_FROM",
            "prepacked fp16",
        ),
        ("weight.shape[1] >= FP32_FROM", "weight.shape[1] > FP32_FROM", "256 channels are not wide enough"),
        ('weight.device.type in ("cpu", "meta") and', "", "prepacked weights on a GPU"),
    ],
}
