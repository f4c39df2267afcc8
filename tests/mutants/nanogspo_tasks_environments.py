"""Wrong edits of nanogspo/tasks/environments.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/tasks/environments.py"
MUTANTS = {
    "tests/test_environments.py": [
        ("steps != len(history) - 1", "False", "an object that has missed a turn goes on"),
        ("for message in history[:-1]:", "for message in history:", "the last step is made twice in a replay"),
        ("                del live[other]", "                pass", "objects of all rollouts are kept"),
        (
            '    if not reply["done"]:\n        live',
            "    if True:\n        live",
            "objects of finished episodes are kept",
        ),
        ("        live[episode] = environment, len(history)", "        pass", "every turn is replayed"),
        ('if not (hasattr(make, "reset") and hasattr(make, "step")):', "if False:", "any class is an environment"),
    ],
    "tests/test_conversation.py": [
        (
            "reward = sum(parts.values()) if isinstance(reward, dict)",
            "reward = None if isinstance(reward, dict)",
            "a dict is no reward",
        ),
    ],
    "tests/test_episodes.py": [
        ("if value is not None and not math.isfinite(value):", "if False:", "a reward of nan is taken"),
        ("    if not messages and not done:\n", "    if False:\n", "a turn without anything to answer"),
        ("(Exception, SystemExit)", "ValueError", "an environment that raises ends the run"),
        ('isinstance(m.get("content"), str) for m', "True for m", "messages without content"),
    ],
}
