"""Wrong edits of nanogspo/fast/cuda_graph.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/fast/cuda_graph.py"
MUTANTS = {
    "tests/test_cuda_graph.py": [
        (
            "                        capture(torch.zeros(1, device=self._cache.slot.device).zero_)\n",
            "                        pass\n",
            "generators that capture for ever: dropout raises",
        ),
        (
            "                    raise error.__context__ from None\n",
            "                    pass\n",
            "Ctrl-C taken for a failed capture",
        ),
        ("            self._cache.advance_host()\n", "", "a cache that leaves no trace of replayed steps to copy"),
        (
            "                self._cache.extent = extent  # capturing ran nothing but Python\n",
            "                pass\n",
            "a slot counted and never filled",
        ),
        ("self.enabled and self._warm and left", "self.enabled and left", "captured before its kernels are compiled"),
        ("left >= CAPTURE_FROM", "left > CAPTURE_FROM", "captured one step too late"),
        ("                    self.enabled = False", "                    pass", "a refusal at every step"),
        (
            "                    while error.__context__ is not None:",
            "                    while False:",
            "the last error in place of the first",
        ),
        (
            "                    torch.cuda.empty_cache()",
            "                    pass",
            "no memory is given back before the second try",
        ),
        ("        for last in (False, True):", "        for last in (True,):", "out of memory is final at once"),
        (
            "torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool.id)",
            "pass",
            "an allocator that is left in its capture mode",
        ),
        ("@functools.cache\ndef _memory_pool", "def _memory_pool", "a memory pool for each capture"),
        (
            "        finally:\n            try:\n                graph.capture_end()",
            "        except ZeroDivisionError:\n            try:\n                graph.capture_end()",
            "a capture that never ends",
        ),
    ],
}
