"""Wrong edits of nanogspo/chat.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/chat.py"
MUTANTS = {
    "tests/test_chat.py": [
        ('.rpartition("</think>")', '.rpartition("<think>")', "the chain of thought is rewarded"),
        ('.rpartition("</think>")', '.partition("</think>")', "an answer without a thought is empty"),
    ],
}
