"""Wrong edits of nanogspo/chat.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/chat.py"
MUTANTS = {
    "tests/test_chat.py": [
        (
            'if problem.tools and not self.tokenizer.spells("tools"):',
            "if False:",
            "tools that no template reads are dropped",
        ),
        ('({"tools": problem.tools} if problem.tools else {})', "{}", "the tools of a row are dropped"),
        ('.rpartition("</think>")', '.rpartition("<think>")', "the chain of thought is rewarded"),
        ('.rpartition("</think>")', '.partition("</think>")', "an answer without a thought is empty"),
    ],
}
