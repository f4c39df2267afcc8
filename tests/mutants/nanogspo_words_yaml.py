"""Wrong edits of nanogspo/words.yaml, one at a time: see tools/mutate.py."""

FILE = "nanogspo/words.yaml"
MUTANTS = {
    "tests/test_words.py": [
        (
            'num_generations: [T, "--group-size {}", ""]',
            'num_generations: [T, "--groupsize {}", ""]',
            "a line names a flag that does not exist",
        ),
        ('{"4": --quant nf4', '{"4": --quant int4', "a line names a value that is refused"),
        ("cutoff_len: [L", "cutoff_len: [TL", "a name is said to be TRL's and is not"),
        ("optim.lr: [O", "optim.lr: [L", "the README says something else"),
    ],
}
