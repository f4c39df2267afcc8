"""Wrong edits of nanogspo/distributed.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/distributed.py"
MUTANTS = {
    "tests/test_distributed.py": [
        ("file=sys.stderr if rank() else None", "file=None", "what process 1 alone knows goes to a closed stdout"),
        ('f"process {rank()}: " * (rank() > 0) + line', "line", "nobody knows whose reward it was"),
        (", or has kept this one waiting for {WAIT}", "", "a process that hangs is said to have ended"),
        ("    dist.all_reduce(flat)", "    pass", "every process trains on its own answers alone"),
        (
            "return range(rank(), count, world())",
            "return range(count)",
            "every process does all the work, and all of it counts",
        ),
        (
            "    except (dist.DistError, ValueError) as error:",
            "    except ZeroDivisionError as error:",
            "a port in use is a traceback",
        ),
        (
            'if world() > 1 else "python"',
            'if False else "python"',
            "one process cannot go on in the middle of a rollout of two",
        ),
        ("* (world() > local_world())", "* 0", "the half of the hosts cannot go on"),
        ("return total(int(bool(asked))) > 0", "return bool(asked)", "one process stops, the other waits for it"),
        ("    dist.all_reduce(added)", "    pass", "each process divides by its own answers"),
        ('to("cpu", copy=True)', 'to("cpu")', "the sum over all is written into the caller's own counts"),
        (".view(shape) if data", " if data", "a gathered matrix is a row"),
        ("torch.empty(shape, dtype=dtype)", "torch.empty(shape)", "gathered experts of no token are fp32"),
        ("dtype=dtype).view", "dtype=torch.float32).view", "gathered bf16 is read as fp32"),
        (
            "parts[i % len(parts)][i // len(parts)]",
            "[x for part in parts for x in part][i]",
            "answers of other prompts",
        ),
        ("values = [None if rank() else make()]", "values = [make()]", "every process writes"),
        (
            "    except RuntimeError as error:\n",
            "    except ZeroDivisionError as error:\n",
            "a process that ends is a traceback of the other",
        ),
        ("    if len(set(found)) > 1:", "    if False:", "processes begin with other weights"),
        ("        dist.destroy_process_group()", "        pass", "the program ends in an abort"),
        ("+ step) * world() + rank())", "+ step) * world())", "all processes drop the same inputs"),
        ("((run * 1_000_003 + step) * world()", "((run * 1_000_003) * world()", "every update drops the same inputs"),
        (
            'if not hasattr(p, "full_tensor")]',
            "if True]",
            "gradients of shards are added to those of other rows",
        ),
    ],
}
