"""Wrong edits of nanogspo/cache.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/cache.py"
MUTANTS = {
    "tests/test_cache.py": [
        ("if self.extent == self.capacity:", "if self.extent + 1 == self.capacity:", "the last slot cannot be used"),
        ("self.prefix_lengths[self.prompt] + self.lengths", "self.lengths", "answers begin at position 0"),
        (
            "self.prompt, self.lengths, self.active = self.prompt[rows]",
            "self.prompt, self.lengths, self.active = self.prompt[: len(rows)]",
            "rows that stay read another prompt",
        ),
        (
            "self.extent, self._plans = self.extent + 1, {}",
            "self.extent += 1",
            "every step sees what the first one saw",
        ),
        (
            "                storage[:, :, slot] = x\n",
            "                storage[:, :, 0] = x\n",
            "each key replaces the first",
        ),
    ],
    "tests/test_delta_net.py": [
        (
            "self.tail[rows], self.state[rows]",
            "self.tail[: len(rows)], self.state[rows]",
            "rows that stay go on with another row's convolution",
        ),
        (
            "self.tail[rows], self.state[rows]",
            "self.tail[rows], self.state[: len(rows)]",
            "rows that stay go on with another row's memory",
        ),
    ],
    "tests/test_cuda_graph.py": [
        (
            "        self.lengths += self.active\n",
            "        self.lengths = self.lengths + self.active\n",
            "a graph in which no row grows",
        ),
        ("        self.lengths *= self.active\n", "", "finished rows are read to the end"),
        ("self.active.masked_fill_(ends, 0)", "self.active.masked_fill_(~ends, 0)", "only finished rows are read"),
        (", self.active[rows]\n", ", self.active[: len(rows)]\n", "rows that go on read nothing"),
        ("        self.slot += 1\n", "        self.slot.fill_(self.extent - 1)\n", "a slot that Python counts"),
        (
            "                storage.index_copy_(2, slot, x.unsqueeze(2))",
            "                storage[:, :, int(slot)] = x",
            "a value's slot that Python counts",
        ),
    ],
}
