"""Wrong edits of nanogspo/fast/fused_linear.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/fast/fused_linear.py"
MUTANTS = {
    "tests/test_fused_linear.py": [
        ("    if prepack and all(", "    if all(", "copies that do not fit are made all the same"),
        (
            "if model.prepack and can_prepack_head(head)",
            "if can_prepack_head(head)",
            "a copy of the head that does not fit",
        ),
        ("layer.lora_B.weight, layer.scale)", "layer.lora_B.weight, 0.0)", "sampled without the adapter"),
        ("    if base is layer or layer.merged:\n", "    if base is layer:\n", "a merged adapter is sampled twice"),
        ("(m.lora_B.weight * m.scale).to(dtype)", "m.lora_B.weight.to(dtype)", "sampling forgets the scale"),
        (
            ".to(dtype).T if m in adapted else None",
            ".to(dtype).T if isinstance(m, LoRALinear) else None",
            "a merged adapter is added once more",
        ),
        ("        return self.model.cap(z)\n", "        return z\n", "logits without their soft-cap"),
        ("    if same:\n", "    if False:\n", "weights are moved at every rollout"),
        ("        w.data = part\n", "        pass\n", "weights are stored twice, and updates reach one of them"),
        (
            "w.storage_offset() == first.storage_offset() + stops",
            "True",
            "weights of one tensor in another order, taken as they are",
        ),
        (
            "            yield module, module.OUTPUT\n",
            "            yield module, module.INPUTS\n",
            "output projections are left out",
        ),
    ],
    "tests/test_distributed.py": [
        ("    if move and all(", "    if all(", "a sharded model on a GPU keeps the weights of its first rollout"),
    ],
}
