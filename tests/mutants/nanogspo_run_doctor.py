"""Wrong edits of nanogspo/run/doctor.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/doctor.py"
MUTANTS = {
    "tests/test_router_replay.py": [
        (
            "largest(one, ways[replay]), *quantiles[replay]",
            "largest(one, ways[0]), *quantiles[0]",
            "the noise of the run that does not replay",
        ),
        ("if fills else None, replay=True)", "if fills else None)", "replay leaves all of the noise"),
        ("(0, 0, 0, 0, 0, T - len(x))", "(0, 0, 0, 0, T - len(x), 0)", "replayed to the wrong tokens"),
        (
            "x[e.loss_mask[1:]] for x, e",
            "x[e.loss_mask[:-1]] for x, e",
            "the experts of the drawn token, not of the one before",
        ),
        (
            "experts |= dict(zip(index, whole",
            "experts |= dict(zip(sorted(index), whole",
            "answers of a prompt change places",
        ),
    ],
    "tests/test_doctor.py": [
        ("(a - b).mean().abs()", "(a - b).abs().mean()", "a noise that does not average out"),
        ("for p in (0.5, 0.99)]", "for p in (0.5, 0.5)]", "half of the answers are noisier than the range"),
        ("low = max(CLIP_LOW, K * p99)", "low = max(CLIP_LOW, p99)", "one answer in a hundred is clipped by rounding"),
        ("return low, low * 4 / 3", "return low, low", "the paper's range is wider above"),
        ("and not self.progress.clip", "and True", "another range after a resume"),
        ("* 4 / 3) if low else", "* 4 / 3) if False else", "the measured range is not used"),
        ("if not auto and seconds > SECONDS:", "if False:", "minutes before the first update of a slow model"),
        (
            "hidden = model(tokens, linear=routing)[:, :-1][scored[:, 1:]]",
            "hidden = model(tokens)[:, 1:][scored[:, 1:]]",
            "the hidden state of the token itself",
        ),
        ("c.lora_r and c.lr < usual_lr / 5", "c.lr < usual_lr / 5", "full fine-tuning is told to take LoRA's rate"),
        ('mean("exact") > 0.9', 'mean("exact") > 2', "a solved task looks like one without a spread"),
        ('(1e-3 if c.dtype == "fp32" else 0.1)', "0.1", "fp32 is allowed bf16's gap"),
        ("max(moves[-6:]) < 1e-6", "max(moves[-6:]) < 1e-2", "a ratio that moves as the paper's"),
        ("begin + part + end if scored else part", "part", "a sample without its mask"),
        ("talks = bool(c.environment)", "talks = False", "customers get an advice that is refused"),
        ('starts[-1].get("zero_spread_frac") == 1.0', "False", "a rollout without a gradient passes in silence"),
        ('"loss": rows and equal < 1', '"loss": rows', "a loss of 0 is called healthy where nothing is learned"),
        ("self.rows.append(row)", "self.rows = [row]", "three rollouts are never seen"),
    ],
}
