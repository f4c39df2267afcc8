"""Solution of exercise 0."""


def gain(rows: list[dict]) -> float:
    rewards = [row["reward"] for row in rows if row.get("algo") in ("gspo", "grpo") and row["reward"] is not None]
    quarter = max(1, len(rewards) // 4)
    return (sum(rewards[-quarter:]) - sum(rewards[:quarter])) / quarter


def clearly_better(rows: list[dict], phase: str, than: str) -> bool:
    last = {
        row["phase"]: row for row in rows if "eval_exact" in row
    }  # a later evaluation takes the earlier one's place
    for name in (phase, than):
        if name not in last:
            raise ValueError(f"got no evaluation of phase {name!r}, want one of: {', '.join(last)}")
    return last[phase]["eval_low"] > last[than]["eval_high"]
