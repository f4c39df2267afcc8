"""Wrong edits of nanogspo/tasks/conversation.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/conversation.py"
MUTANTS = {
    "tests/test_conversation.py": [
        ("len(openings) // 10", "len(rows) // 10", "openings with several values fill the held-out side"),
        ("if len(openings) < 2:", "if False:", "the message is about an --eval-size that nobody gave"),
        ("(yaml.BaseLoader)", "(yaml.SafeLoader)", "a pattern of yes is True, and an order 010 is 8"),
        ("if names.count(key.value) > 1:", "if False:", "of two scenarios with one name the first is lost"),
        ("[1-9][0-9]{0,8}", "[0-9]+", "a customer without patience"),
        ("return value != [] and all(", "return all(", "no value, and so no problem"),
        ("not fits(value, forms[key]) or", "", "a list is a pattern: any of its letters"),
        ("if both := ", "if both := set() and ", "a goal that is reached hides a fault"),
        ("> MOST:", "> MOST * MOST:", "a file of a few lines fills the memory"),
        ("if wrong := ", "if wrong := [] and ", "a value that no text can name"),
        ("(re.error, OverflowError, RecursionError)", "re.error", "a number in a pattern ends in a traceback"),
        (
            "exactly = {key: re.escape(value) for",
            "exactly = {key: value for",
            "a plus in a value is an operator of the pattern",
        ),
        ('r"[^\\W\\d]\\w*"', 'r"\\w+"', "{4} in a pattern is the name of a value"),
        ("known[found[1]]", "known.get(found[1], found[0])", "a name that is mistyped stays in the text"),
        ("if name not in self.found and seen(p, text)}", "if seen(p, text)}", "a goal counts at every turn"),
        ("for name in scenario[kind]}", "for name in new}", "what nobody did any more keeps its last number"),
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
        ('.rpartition("</think>")[2]', "", "the agent reads the customer's thoughts"),
        ('fill(scenario.get("wants", opening), known)', '"help"', "a played customer does not know what it wants"),
        ("re.IGNORECASE | re.DOTALL", "re.DOTALL", "capital letters are not heard"),
        ('if "scenario" not in row:', "if False:", "a row of another task is a KeyError"),
        ('    customer([{"role": "user", "content": "Hello"}])\n', "", "a run without its customer, to the last step"),
        ("@functools.cache\ndef remote", "def remote", "a client for every episode"),
    ],
}
