"""Wrong edits of benchmarks/kernels.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "benchmarks/kernels.py"
MUTANTS = {
    "tests/test_benchmarks.py": [
        (
            'max(self.bytes / machine["bandwidth"], self.operations / machine["rate"])',
            'min(self.bytes / machine["bandwidth"], self.operations / machine["rate"])',
            "the floor is the faster of the two limits",
        ),
        (
            '    products, kind = (2, "forward + backward") if train else (1, "no gradient")',
            '    products, kind = (3, "forward + backward") if train else (1, "no gradient")',
            "the floor counts the product that G saves",
        ),
        (
            "    return N * K * (1 / 2 + 1 / 64 + 4 / (64 * 256))",
            "    return N * K * (1 / 2 + 4 / 64)",
            "NF4's floor reads fp32 scales",
        ),
        (
            "        except Exception as error:  # a peer that fails",
            "        except ImportError as error:  # a peer that fails",
            "a peer that runs out of memory takes the table with it",
        ),
        (
            'n: r["seconds"] for n, r in variants.items() if not n.startswith("ours") and',
            'n: r["seconds"] for n, r in variants.items() if n != "ours" and',
            "our own slower path counts as a rival",
        ),
        (
            "best = min(rivals.values(), default=None)",
            "best = max(rivals.values(), default=None)",
            "ours has only to beat the slowest",
        ),
        (
            "                finally:\n                    seq_logprob.EPILOGUE_BELOW = before",
            "                finally:\n                    pass",
            "a benchmark leaves its path switched on",
        ),
        (
            "extra = None if held is None else held - 2 * G",
            "extra = None if held is None else held - 3 * G",
            "17 MB of memory are not counted",
        ),
        (
            "    for compiling in (False, True)[: 1 + compiled]:",
            "    for compiling in (True, False)[: 1 + compiled]:",
            "torch.compile uses up the time of everything else",
        ),
        (
            "            z = z if softcap is None else softcap * torch.tanh(z / softcap)",
            "            z = z",
            "plain torch leaves out the soft-cap: another function, and faster",
        ),
        (
            "    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)",
            "    return 0.0",
            "variants that compute something else look equal",
        ),
    ],
}
