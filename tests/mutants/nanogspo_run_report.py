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
        ("len(groups) * SAMPLES // max(size, 1)", "len(groups)", "a page of any size"),
    ],
}
