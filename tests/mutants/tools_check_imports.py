"""Wrong edits of tools/check_imports.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "tools/check_imports.py"
MUTANTS = {
    "tests/test_check_imports.py": [
        (
            "or row_of(module) > row_of(name):",
            "or row_of(module) > row_of(name) + 1:",
            "a file may import the next one",
        ),
        ('if module.partition(".")[0] in OUTSIDE or row_of', "if row_of", "the product may import its tests"),
        ("    for cycle in cycles(graph):", "    for cycle in []:", "a new cycle passes"),
        ("lazy or isinstance(node,", "isinstance(node,", "an import deep inside a function counts as one at the top"),
        ("            elif lazy:", "            elif False:", "a cycle is hidden inside a function"),
        ("        if lines and row_of(name) < 0:", "        if False:", "a new file may import all there is"),
        ("    if total > budget:", "    if total > 2 * budget:", "twice the lines pass"),
        ("if lines > limits.get(place, budget):", "if False:", "a recipe of any length"),
        ("if n > longest:", "if n > 100 * longest:", "a function of any length"),
        ("- len(header)", "- 1", "a function at the top counts a line less"),
    ],
}
