"""Wrong edits of nanogspo/sharding.py, one at a time: see tools/mutate.py."""

FILE = "nanogspo/sharding.py"
MUTANTS = {
    "tests/test_distributed.py": [
        ("        part.set_gradient_divide_factor(1.0)", "        pass", "gradients are averaged over the processes"),
        (
            "torch.float32 if full else dtype",
            "dtype",
            "weights are trained in bf16: small steps round to nothing",
        ),
        ("missing = max(distributed.gather(passes)) - passes", "missing = 0 * passes", "processes wait for each other"),
        (" @ model.head_weight.T", "", "an untied head has a gradient in some processes only"),
        ("-(-len(t) // distributed.world())", "len(t) // distributed.world()", "the last row of 31 is nobody's"),
        (
            "    return model.computes_in if is_sharded(p) else p.dtype",
            "    return p.dtype",
            "a sharded state cannot be read by one process",
        ),
        ("    if own.numel():", "    if True:", "a gate of one row cannot be read by the second process"),
        ("read(rows(into) if is_sharded(into) else None)", "read(None)[rows(into)]", "every process reads all"),
        (
            "        part.reshard()\n\n\n@contextlib",
            "        pass\n\n\n@contextlib",
            "the old head scores",
        ),
    ],
}
