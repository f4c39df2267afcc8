"""Wrong edits of kernels/blocked.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/blocked.py"
MUTANTS = {
    "tests/test_blocked.py": [
        ("layer.B * layer.scale", "layer.B", "the adapter's scale is forgotten"),
        ("                    column += r\n", "", "adapters share the columns of the first"),
        (
            "                start += out\n",
            "                start += out if layer.A is not None else 0\n",
            "an adapter beside the layer before its own",
        ),
        ("zero if b is None else b", "zero", "biases are dropped"),
        ("weight.dtype == torch.bfloat16 and", "weight.dtype.is_floating_point and", "blocks of fp16"),
        ('weight.device.type in ("cpu", "meta") and', "", "blocks of weights on a GPU"),
    ],
}
