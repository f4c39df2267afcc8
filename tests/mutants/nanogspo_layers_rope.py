"""Wrong edits of nanogspo/layers/rope.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/layers/rope.py"
MUTANTS = {
    "tests/test_rope_frequencies.py": [
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
        ("positions[..., None].float() * f", "positions[..., None].to(dtype) * f", "angles rounded to bf16"),
        ("angle.cos() * magnitude", "angle.cos()", "yarn without its magnitude"),
    ],
}
