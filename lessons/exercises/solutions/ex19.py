import math


def pushing_fraction(rows: list[dict]) -> float:
    pushed = []
    for row in rows:
        if row.get("algo") in (None, "sft"):
            continue
        trained, *clipped = (row.get(key) for key in ("trained_frac", "clip_low_frac", "clip_high_frac"))
        pushed.append(0.0 if None in (trained, *clipped) else trained * (1 - sum(clipped)))
    return sum(pushed) / len(pushed) if pushed else math.nan
