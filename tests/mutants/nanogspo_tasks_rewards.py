"""Wrong edits of nanogspo/tasks/rewards.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/rewards.py"
MUTANTS = {
    "tests/test_rewards.py": [
        ('mean.count = sum(counts)', 'mean.count = len(counts)', 'a process with more answers counts as much as one with few'),
        ("        source, weight = text, 1.0\n", "        weight = 1.0\n", "a text without a weight loses what is before its equals sign"),
        ('if k not in ("prompt", "completion", "completion_ids")}', "}", "a prompt column reaches TRL's functions"),
        ("if takes_all or name in self.parameters}", "}", "a function without **kwargs gets what it does not name"),
        ('[{"role": "assistant", "content": text}] if chat else text', "text", "conversations arrive as text"),
        ("SimpleNamespace(**(STATE | state))", "SimpleNamespace(**state)", "trainer_state has only what the run says"),
        ("    if len(values) != len(group.answers):\n", "    if False:\n", "a list of another length is taken"),
        ("    if isinstance(value, str | dict | list | tuple):\n", "    if isinstance(value, dict):\n", "text is a number"),
        ("if isinstance(value, dict) and not part:", "if isinstance(value, dict):", "dicts in dicts end the run"),
        ("        except (Exception, SystemExit) as error:\n            return", "        except Exception as error:\n            return", "sys.exit() in a reward ends the process"),
        ("functools.cache(import_file)", "import_file", "a file is imported for each of its functions"),
        ("@functools.cache\ndef _new_loop", "def _new_loop", "each call has a loop of its own"),
        ("    with MAKING:\n        return _new_loop()", "    return _new_loop()", "the first calls, at once, have a loop each"),
        ("for name in ([column] if column else REFERENCES)", "for name in REFERENCES", "exact:COLUMN compares with another one"),
        ("2 - len(answer) / int(most)", "1 - len(answer) / int(most)", "length falls from the first character"),
        (r"(?:(?!</?{t}>).)*", ".*", "tags within tags pass"),
        (r"(?<!\w){re.escape(word)}(?!\w)", r"{re.escape(word)}", "cat is found in concatenate"),
        ('last_number(answer) or "nan"', 'last_number(answer) or "0"', "no number is 0"),
    ],
}  # fmt: skip
