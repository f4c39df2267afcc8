"""Wrong edits of nanogspo/device.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/device.py"
MUTANTS = {
    "tests/test_device.py": [
        (
            "units = units and (torch.cpu",
            "units = units or (torch.cpu",
            "bf16 on every CPU with AVX-512, which converts",
        ),
        ('.lower() in ("x86_64", "amd64")', ' in ("x86_64", "aarch64")', "Windows and ARM asked the wrong question"),
        ("not re.search(enough, cap, re.IGNORECASE)", "cap == enough", "a cap on instructions is not noticed"),
        (
            "    if stored != torch.bfloat16:\n",
            "    if stored == torch.float32:\n",
            "fp16 files computed in bf16, three bits lost",
        ),
        ('    if device == "cuda":\n        return "bf16"\n', "", "a GPU held to what the file holds"),
        ('return "fp32" if reason else "bf16"', 'return "bf16"', "the line is printed and bf16 used all the same"),
        ("torch.cuda.get_device_capability() < (8, 0)", "False", "bf16 emulated on a T4"),
        ('device == "cuda" and dtype != "fp32" and', 'device == "cuda" and', "an old card has no dtype at all"),
        (
            "allow_bf16_reduced_precision_reduction = False",
            "allow_bf16_reduced_precision_reduction = True",
            "cuBLAS may sum the parts of a product in bf16",
        ),
    ],
}
