"""Wrong edits of sample.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "sample.py"
MUTANTS = {
    "tests/test_sample.py": [
        ("yield from made", "yield from made[:1]", "an answer of each batch"),
        ('"first_prompt": first, ', "", "every batch draws the same numbers"),
        ("flush=True)\n            else", "flush=False)\n            else", "a killed run has written nothing"),
        (r're.split(r"\r\n?|\n", text)', 'text.split("\\n")', "prompts of a Windows file end in a carriage return"),
        (
            "    if config.adapter:  # named wrongly",
            "    if False:  # named wrongly",
            "hours of download before a mistyped adapter is said",
        ),
        ('if not text.endswith("\\ufffd"):', "if True:", "half a character on the screen"),
        (
            '        messages.append({"role": "assistant", "content": answer})',
            "        messages.clear()",
            "a chat that forgets",
        ),
    ],
    "tests/test_quant.py": [
        ("dtype=dtype, quant=quant)", "dtype=dtype)", "--quant is ignored"),
    ],
    "tests/test_planner.py": [
        ("if refused and not config.ignore_memory_plan:", "if refused:", "--ignore-memory-plan does not"),
        ("    if refused and", "    if False and", "more than the memory holds is loaded"),
    ],
}
