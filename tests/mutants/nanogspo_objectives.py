"""Wrong edits of nanogspo/objectives.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/objectives.py"
MUTANTS = {
    "tests/test_objectives.py": [
        ("for e in reversed(EDGES)]", "for e in EDGES]", "edges out of order"),
        (".bincount(minlength=len(edges) + 1)", ".bincount()", "a histogram that ends with its last ratio"),
        ("(1, 5, 50, 95, 99)", "(5, 50, 95)", "no tails"),
        ("torch.cat(log_ratios).exp()", "log_ratios[-1].exp()", "quantiles of one micro-batch"),
        (
            "rewards.mean(dim=1, keepdim=True)",
            "rewards.mean(dim=0, keepdim=True)",
            "centred down the columns: groups leak",
        ),
        ("rewards.std(dim=1, keepdim=True)", "rewards.std()", "one std for the batch"),
        (
            "rewards.std(dim=1, keepdim=True)",
            "rewards.std(dim=1, correction=0, keepdim=True)",
            "std over G, not over G - 1",
        ),
        ("keepdim=True) + 1e-4)", "keepdim=True) + 1e-8)", "another epsilon than TRL's"),
        (
            "centred = centred.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)",
            "pass",
            "float noise of equal rewards",
        ),
        ("rewards.shape[1] < 2", "rewards.shape[1] < 1", "G = 1 is let through"),
        (
            "- old_seq_logp.detach()) / lengths",
            "- old_seq_logp.detach()) / lengths.max()",
            "padded length in the ratio",
        ),
        ("- old_seq_logp.detach()) / lengths", "- old_seq_logp.detach())", "ratio of the whole sequence"),
        ("- old_seq_logp.detach()) / lengths", "- old_seq_logp) / lengths", "gradient into the old policy"),
        ("torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages", "max for min"),
        ("ratio.clamp(low, high) * advantages", "ratio.clamp(low, low) * advantages", "high bound lost"),
        (
            "torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)",
            "ratio.clamp(low, high) * advantages",
            "clipped whatever the sign of A",
        ),
        ("return -objective.mean(), metrics", "return objective.mean(), metrics", "sign of the loss"),
        (
            "return -objective.mean(), metrics",
            "return -(objective * lengths).sum() / lengths.sum(), metrics",
            "mean over tokens, not sequences",
        ),
        ("-(sequence_sums(objective, cu_seqlens) / lengths).mean()", "-objective.mean()", "long answers count more"),
        ("((ratio < low) & (advantages < 0))", "(ratio < low)", "clip_low_frac counts answers that still learn"),
        (
            "((ratio > high) & (advantages > 0))",
            "((ratio > high) & (advantages < 0))",
            "clip_high_frac of the wrong sign",
        ),
        ("ratio.std(correction=0)", "ratio.std()", "nan for one answer"),
        ("torch.promote_types(x.dtype, torch.float32)", "x.dtype", "ratios in bf16"),
        ("(lengths < 1).any()", "(lengths < 0).any()", "an empty answer is let through"),
        ("or any(t.shape != first.shape for t in others.values())", "", "shapes broadcast in silence"),
        ("loss = -_at_least_float32(logp).mean()", "loss = -_at_least_float32(logp).sum()", "sum for mean in SFT"),
        ('(min if key.endswith("_min") else max)(', "max(", "the smallest of a minimum's micro-batches is lost"),
        (
            "sum(weight * facts[key] for weight, facts in rows)",
            "sum(facts[key] for weight, facts in rows) / len(rows)",
            "micro-batches weigh alike",
        ),
        ('        if rows and "ratio_std" in rows[0][1]:', "        if False:", "a mean of standard deviations"),
        ('out["perplexity"] = math.exp(min(out["loss"], 700.0))', "pass", "a mean of exponentials"),
        ("lengths.sum() != total", "False", "a GPU's check is all that a CPU has"),
        ("    if not lengths.is_cpu:\n        return\n", "", "every loss waits for the GPU"),
    ],
    "tests/test_policy_loss.py": [
        (
            "log_ratio = (seq_logp.detach() - old_seq_logp) / lengths",
            "log_ratio = seq_logp.detach() - old_seq_logp",
            "quantiles of ratios that are not per token",
        ),
        (
            "per_token = log_ratio + (logp - logp.detach())",
            "per_token = log_ratio + (logp - old_logp)",
            "GSPO-token whose value is not GSPO's",
        ),
        (
            "return -(advantages.detach() * means).mean(), metrics",
            "return -(advantages.detach() * means * lengths).mean(), metrics",
            "REINFORCE sums over tokens",
        ),
        ("d.expm1() - d, cu_seqlens", "d.exp() - d - 1, cu_seqlens", "a KL of close policies that is rounding"),
        ("d.expm1() - d, cu_seqlens", "(-d).expm1() + d, cu_seqlens", "the KL the wrong way round"),
        ("(weights * sequence_sums(d", "(sequence_sums(d", "the KL averaged otherwise than the loss"),
        (
            "lengths * counts.sum() / (lengths * counts).sum().clamp(min=1)",
            "lengths * len(counts) / lengths.sum()",
            "tokens that are left out count in DAPO's divisor",
        ),
        (
            "lengths / max_new_tokens * counts.sum() / len(counts)",
            "lengths / max_new_tokens",
            "Dr. GRPO's divisor depends on how many were cut off",
        ),
        ("return weights * counts  # (N,)", "return weights  # (N,)", "what is left out is trained on"),
    ],
}
