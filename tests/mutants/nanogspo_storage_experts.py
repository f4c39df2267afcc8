"""Wrong edits of nanogspo/storage/experts.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/experts.py"
MUTANTS = {
    "tests/test_moe_storage.py": [
        ("(matrix.mT if self.turned else matrix)", "matrix", "a turned stack is read as it lies"),
        ("rows=slice(i * size, (i + 1) * size)", "rows=slice(0, size)", "up is gate"),
        ("stored.shape[1] != rows == stored.shape[2]", "stored.shape[1] == rows", "fused and turned change places"),
        (
            "        layer[e] = quantize_linear(read(), None, quant)\n",
            "        layer[0] = quantize_linear(read(), None, quant)\n",
            "the first expert is the last, and the others have no numbers",
        ),
        (
            "    sharding.local(layer.weight)[e - own.start] = weight\n",
            "    sharding.local(layer.weight)[e - own.start - 1] = weight\n",
            "experts are shifted by one",
        ),
        ("if adapter and (merge or", "if False and (merge or", "a merged folder without the adapter"),
        ("(merge or adapter.merged)", "merge", "a weight with its adapter in it saved as the base"),
        ("for key in sorted(matrices)]", "for key in sorted(matrices, reverse=True)]", "stacks are written backwards"),
        ("return stack.mT.contiguous() if turned else stack", "return stack", "a turned stack is written as fused"),
    ],
}
