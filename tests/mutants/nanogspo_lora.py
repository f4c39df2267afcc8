"""Wrong edits of nanogspo/lora.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/lora.py"
MUTANTS = {
    "tests/test_lora.py": [
        (
            "(x, weight, self.base.bias",
            "(x, weight, None",
            "an adapter that loses its base's bias",
        ),
        ("F.dropout(x, self.dropout)", "F.dropout(x, 1 - self.dropout)", "what should be dropped is kept"),
        ("if self.dropout and self.training:", "if self.dropout:", "dropout while sampling and scoring"),
        (
            "bound = 1 / math.sqrt(base.in_features)",
            "bound = 1 / math.sqrt(base.out_features)",
            "A drawn for another width",
        ),
        ("    model.requires_grad_(False)\n", "", "the base is trained as well"),
        (
            "nn.init.zeros_(self.lora_B.weight)",
            "nn.init.normal_(self.lora_B.weight, std=1e-3)",
            "a fresh adapter that changes the model",
        ),
        (
            '{"device": base.weight.device, "dtype": torch.float32}',
            '{"device": base.weight.device, "dtype": base.weight.dtype}',
            "bf16 adapters, which round GSPO's updates away",
        ),
        (
            "draw = torch.rand(layer.lora_A.weight.shape, generator=generator) * (2 * bound) - bound",
            "draw = torch.zeros(layer.lora_A.weight.shape)",
            "A and B both zero: no gradient ever",
        ),
        (
            "return (weight.float() + update * self.scale).to(weight.dtype)",
            "return weight + (update * self.scale).to(weight.dtype)",
            "merging rounds twice",
        ),
    ],
    "tests/test_quant.py": [
        (
            "        weight = dense_weight(self.base, dtype, expert)  # (out, in)\n",
            "        weight = dense_weight(self.base, torch.float32, expert)  # (out, in)\n",
            "another base than the one that was trained over",
        ),
        ("    if packed:\n", "    if False:\n", "merging writes into a packed weight"),
        (
            "    total = weight_count(model)\n",
            "    total = sum(p.numel() for p in model.parameters())\n",
            "trained 30 % of all parameters",
        ),
    ],
}
