"""Wrong edits of nanogspo/run/rewards.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/rewards.py"
MUTANTS = {
    "tests/test_rewards.py": [
        ('            tell(f"reward', '            print(f"reward', "of other processes than the first nobody hears"),
        ("isinstance(group.prompt, str)", "True", "completions that are messages are called text"),
        ('if "error" in done[job] and len(job.answers) > 1]', "if False]", "one bad answer costs its whole group"),
        ('f"{name}_{k + 1}"', "name", "two rewards under one name"),
        ("            if len(errors) == len(texts):", "            if errors:", "one failure of four ends the run"),
        ("            elif reward.waits:", "            elif False:", "async functions wait one after the other"),
        ("        if not self._quiet and", "        if", "a probe prints"),
        ("            self._told.add((k, kind))\n", "", "a warning in every step"),
        ("all(abs(x) < LARGEST for x in (total, *parts))", "math.isfinite(total)", "a value whose square is infinite in training"),
        ("if math.isfinite(value) else []", "", "an infinite metric"),
        ("[extra | note for", "[note | extra for", "a column of log_extra called rewards replaces ours"),
        ("[] if value is None else [value]", "[value]", "a part that is None is added to a mean"),
        ("i = first[g] + j", "i = j", "every group's values are the first one's"),
        ("                if kind != \"none\":\n", "                if True:\n", "None is told as a failure"),
        ('{"global_step": step}', "{}", "TRL's functions do not know the step"),
        ('    if not parts:\n        return math.nan, "none"\n', "", "a dict of None is 0"),
    ],
}  # fmt: skip
