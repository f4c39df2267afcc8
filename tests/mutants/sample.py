"""Wrong edits of sample.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "sample.py"
MUTANTS = {
    "tests/test_sample.py": [
        ('if not text.endswith("\\ufffd"):', "if True:", "half a character on the screen"),
        (
            '        messages.append({"role": "assistant", "content": answer})',
            "        messages.clear()",
            "a chat that forgets",
        ),
    ],
    "tests/test_quant.py": [
        (', quant=None if config.quant == "none" else config.quant)', ")", "--quant is ignored"),
    ],
}
