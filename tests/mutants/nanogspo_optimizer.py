"""Wrong edits of nanogspo/optimizer.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/optimizer.py"
MUTANTS = {
    "tests/test_optimizer.py": [
        (
            "nn.Parameter(p.detach().float())",
            "nn.Parameter(p.detach().clone())",
            "masters in bf16: a policy that never moves",
        ),
        (
            "master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)",
            "master.grad = p.grad.float()",
            "only the last micro-batch counts",
        ),
        ("                p.copy_(master)", "                pass", "the model never sees its masters"),
        ("if not torch.isfinite(norm):", "if torch.isnan(norm):", "an infinite gradient is stepped on"),
        (
            'for key in ("step", "exp_avg", "exp_avg_sq")',
            'for key in ("step", "exp_avg")',
            "the second moment is lost on resume",
        ),
        ("peak * (step + 1) / (warmup + 1)", "peak * step / (warmup + 1)", "a first update of learning rate 0"),
    ],
}
