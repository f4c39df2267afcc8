"""Wrong edits of nanogspo/model.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/model.py"
MUTANTS = {
    "tests/test_recorded.py": [
        (
            "x.new_full((), config.hidden_size**0.5)",
            "torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)",
            "a number that Python sends at every step",
        ),
    ],
    "tests/test_model.py": [
        (
            "        if not self.config.qk_norm:\n",
            "        if True:\n",
            "heads are not normalised",
        ),
        (
            "h, x = self.post_attention_layernorm.add(x, mixed)",
            "h, _ = self.post_attention_layernorm.add(x, mixed)",
            "the attention's output never reaches the residual stream",
        ),
        (
            "(key > query - window))[:, None]",
            "(key >= query - window))[:, None]",
            "a sliding window one key too wide",
        ),
        (
            "if not window or order.shape[1] <= window:",
            "if not window or order.shape[1] <= window + 1:",
            "the shortcut skips a window that already bites",
        ),
        (
            "x = x * x.new_full((), config.hidden_size**0.5)",
            "x = x * config.hidden_size**0.5",
            "embedding scale not rounded to the weight dtype",
        ),
        (
            "scores = torch.tanh(scores / softcap) * softcap",
            "scores = torch.tanh(scores / softcap)",
            "soft-cap does not scale back",
        ),
        (
            "k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
            "k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)",
            "query heads paired with the wrong kv heads",
        ),
        (
            "keep = ((turns - low) / (high - low)).clamp(0, 1)",
            "keep = ((turns - low) / (high - low)).clamp(0, 1).round()",
            "llama3 RoPE without its ramp",
        ),
        (
            "first, last = math.floor(first), math.ceil(last)",
            "first, last = math.ceil(first), math.floor(last)",
            "yarn ramp rounded inwards",
        ),
        (
            "if self.gradient_checkpointing and torch.is_grad_enabled():",
            "if False:",
            "gradient checkpointing does nothing",
        ),
        (
            "return x + self.post_feedforward_layernorm(self.mlp(h))",
            "return x + self.mlp(h)",
            "the last sandwich norm left out",
        ),
        (
            "with bf16_products(weight.dtype == hidden.dtype == torch.bfloat16):",
            "with bf16_products(True):",
            "fp16 heads and fp32 hidden states rounded to bf16",
        ),
        (
            "                module.part()\n",
            "                pass\n",
            "sampling goes on with the weights of the last rollout",
        ),
        (
            "            self._blocked_head = None\n\n",
            "\n",
            "sampling goes on with the head of the last rollout",
        ),
        (
            "if names in self._together and not torch.is_grad_enabled():",
            "if names in self._together:",
            "training reads the copies that carry no gradient",
        ),
        (
            "order = segments.positions[None]  # (1, T)",
            "order = torch.arange(T, device=tokens.device)[None]  # (1, T)",
            "an answer stands behind the answers before it, not behind its prompt",
        ),
        (
            '"softcap": config.attn_softcap or None, "window": self.window}',
            '"softcap": config.attn_softcap or None, "window": 0}',
            "no window in a packed row",
        ),
    ],
}
