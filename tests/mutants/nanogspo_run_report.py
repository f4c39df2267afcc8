"""Wrong edits of nanogspo/run/report.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/report.py"
MUTANTS = {
    "tests/test_report.py": [
        ("if math.gcd(k, cycle) == 1)", ")", "only first updates are drawn"),
        ('return re.sub("[<>&\\u2028\\u2029]"', 'return re.sub("[>&]"', "an answer ends the script"),
        ('html.escape(facts["name"])', 'facts["name"]', "a folder's name is markup"),
        (" and len(v) > LONGEST}", " and False}", "a page as long as its longest answer"),
        ("every_group > 1)", "False)", "a reader takes a part for the whole"),
        ("        while size > SAMPLES and", "        while False and", "a page of any size"),
        ("        if n % every == 0:", "        if True:", "early groups are thinned twice, late ones never"),
        ("kept, every = kept[::2], 2 * every", "kept = kept[::2]", "a reader takes a half for the whole"),
        (
            "in enumerate(itertools.groupby(rows,",
            "in enumerate(itertools.groupby([*rows],",
            "all answers of a run in memory",
        ),
        ("        sys.exit(2)", "        sys.exit(0)", "a folder of nothing is a success"),
    ],
}
