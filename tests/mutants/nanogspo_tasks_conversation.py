"""Wrong edits of nanogspo/tasks/conversation.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/conversation.py"
MUTANTS = {
    "tests/test_conversation.py": [
        ("held_out=max(1, len(rows) // 10)", "held_out=0", "no scenario is held out"),
        ("or (kinds[key] is int and value < 1)", "", "a customer of endless patience"),
        (
            "exactly = {key: re.escape(value) for",
            "exactly = {key: value for",
            "a plus in a value is an operator of the pattern",
        ),
        ("known.get(found[1], found[0])", 'known.get(found[1], "")', "other braces of a pattern are lost"),
        ("if name not in self.found and seen(p, text)]", "if seen(p, text)]", "a goal counts at every turn"),
        ('sign / len(scenario["goals"])', "sign", "every goal is worth 1"),
        ('"faults": -1.0', '"faults": 1.0', "faults are rewarded"),
        ('or self.turns == scenario["turns"]', "", "patience has no end"),
        ('scenario["goals"].keys() <= self.found or', "", "the conversation goes on when all is reached"),
        ("fitting[0] if fitting else", "fitting[-1] if fitting else", "the last fitting reply, not the first"),
        (
            'min(self.turns, len(scenario["otherwise"])) - 1',
            '(self.turns - 1) % len(scenario["otherwise"])',
            "the customer begins again",
        ),
        (
            'roles = {"assistant": "user", "user": "assistant"}',
            'roles = {"assistant": "assistant", "user": "user"}',
            "the customer hears itself",
        ),
        ('fill(scenario.get("wants", opening), known)', '"help"', "a played customer does not know what it wants"),
        ("re.IGNORECASE | re.DOTALL", "re.DOTALL", "capital letters are not heard"),
        ('if "scenario" not in row:', "if False:", "a row of another task is a KeyError"),
        ("@functools.cache\ndef remote", "def remote", "a client for every episode"),
    ],
}
