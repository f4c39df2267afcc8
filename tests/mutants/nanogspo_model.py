"""Wrong edits of nanogspo/model.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/model.py"
MUTANTS = {
    "tests/test_cuda_graph.py": [
        (
            "x.new_full((), config.hidden_size**0.5)",
            "torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)",
            "a number that Python sends at every step",
        ),
    ],
    "tests/test_model.py": [
        ("        if not self.qk_norm:\n", "        if True:\n", "heads are not normalised"),
        (
            "h, x = self.post_attention_layernorm.add(x, mixed)",
            "h, _ = self.post_attention_layernorm.add(x, mixed)",
            "the attention's output never reaches the residual stream",
        ),
        (
            "x = x * x.new_full((), config.hidden_size**0.5)",
            "x = x * config.hidden_size**0.5",
            "embedding scale not rounded to the weight dtype",
        ),
        (
            "if self.gradient_checkpointing and torch.is_grad_enabled():",
            "if False:",
            "gradient checkpointing does nothing",
        ),
        (
            "return x + self.post_feedforward_layernorm(self.mlp(h, linear))",
            "return x + self.mlp(h, linear)",
            "the last sandwich norm left out",
        ),
        (
            "with bf16_products(weight.dtype == hidden.dtype == torch.bfloat16):",
            "with bf16_products(True):",
            "fp16 heads and fp32 hidden states rounded to bf16",
        ),
        (
            '"softcap": config.attn_softcap or None, "window": window}',
            '"softcap": config.attn_softcap or None, "window": 0}',
            "no window anywhere",
        ),
    ],
}
