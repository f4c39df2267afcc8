"""Wrong edits of nanogspo/run/environments.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/environments.py"
MUTANTS = {
    "tests/test_environments.py": [
        (
            '            tell(f"the environment',
            '            print(f"the environment',
            "of other processes than the first nobody hears",
        ),
        ("if episode in self._known[k] else", "if False else", "every step may take as long as a replay"),
        ('1 + len(request["history"])  #', "1  #", "a replay of many steps is killed"),
        ("if other[0] == episode[0]} |", "} |", "episodes of all rollouts are remembered"),
        (
            "            self._known[k] = set()\n",
            "",
            "a new process is thought to know its episodes",
        ),
        (
            'shares[sum(request["id"][1:]) % len(shares)]',
            'shares[len(request["history"]) % len(shares)]',
            "an episode changes its process",
        ),
        ("else lambda: copy.deepcopy(given)", "else lambda: given", "all episodes share one object"),
        (
            "play(self._make, self._live, copy.deepcopy(request))",
            "play(self._make, self._live, request)",
            "an environment changes its row for the others",
        ),
        ("            self._told = True\n", "", "a warning at every turn"),
        (
            "return [replies[n] for n in range(len(requests))]",
            "return list(replies.values())",
            "replies in another order",
        ),
    ],
}
