"""Wrong edits of nanogspo/reference.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/reference.py"
MUTANTS = {
    "tests/test_train_objectives.py": [
        ("and not config.warm_steps", "", "a warmed-up adapter is switched off, not put back"),
        ("and not config.adapter", "", "an adapter that was given is switched off, not put back"),
        ("p.detach().clone()", "p.detach()", "a reference that moves with the policy"),
        ("        layer.scale = 0.0  #", "        pass  #", "a fresh adapter stays on in the reference"),
        (
            "            trained[name].data = tensor\n        for",
            "            pass\n        for",
            "the policy is left at its start",
        ),
        ("            layer.scale = scale\n", "            pass\n", "the adapter is left switched off"),
        ('config.algo != "sft" and config.beta > 0', "config.beta > 0", "SFT plans for a reference"),
    ],
}
