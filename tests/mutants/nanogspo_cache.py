"""Wrong edits of nanogspo/cache.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/cache.py"
MUTANTS = {
    "tests/test_cache.py": [
        (
            "if self.extent == self.capacity:",
            "if self.extent + 1 == self.capacity:",
            "the last slot cannot be used",
        ),
        ("self.prefix_lengths[self.prompt] + self.lengths", "self.lengths", "answers begin at position 0"),
        (
            "self.prompt, self.lengths, self.running = self.prompt[rows]",
            "self.prompt, self.lengths, self.running = self.prompt[: len(rows)]",
            "rows that stay read another prompt",
        ),
        (
            "self.extent, self._plans = self.extent + 1, {}",
            "self.extent += 1",
            "every step sees what the first one saw",
        ),
        ("self.k[layer][:, :, self.extent - 1] = k", "self.k[layer][:, :, 0] = k", "each key replaces the first"),
    ],
    "tests/test_recorded.py": [
        (
            "        self.lengths += self.running\n",
            "        self.lengths = self.lengths + self.running\n",
            "a graph in which no row grows",
        ),
        ("        self.lengths *= self.running\n", "", "finished rows are read to the end"),
        (
            "self.running.masked_fill_(ends, 0)",
            "self.running.masked_fill_(~ends, 0)",
            "only finished rows are read",
        ),
        (", self.running[rows]\n", ", self.running[: len(rows)]\n", "rows that go on read nothing"),
        ("        self.slot += 1\n", "        self.slot.fill_(self.extent - 1)\n", "a slot that Python counts"),
        (
            "self.v[layer].index_copy_(2, self.slot, v.unsqueeze(2))",
            "self.v[layer][:, :, self.extent - 1] = v",
            "a value's slot that Python counts",
        ),
    ],
}
