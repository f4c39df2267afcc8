"""Wrong edits of nanogspo/runstate.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/runstate.py"
MUTANTS = {
    "tests/test_runstate.py": [
        ('    torch.set_rng_state(tensors["rng.cpu"])\n', "", "dropout goes on with other numbers"),
        ("[i >= start for i in", "[i > start for i in", "the first token of a saved answer is not scored"),
        (
            "kind != (wanted[name].dtype, tuple(wanted[name].shape))",
            "kind[1] != tuple(wanted[name].shape)",
            "fp32 weights resumed in bf16 without a word",
        ),
    ],
}
