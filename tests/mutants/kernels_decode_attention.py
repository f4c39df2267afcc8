"""Wrong edits of kernels/decode_attention.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "kernels/decode_attention.py"
MUTANTS = {
    "tests/test_decode_attention.py": [
        (
            "s = s * shrink + tl.sum(e, axis=1)",
            "s = s + tl.sum(e, axis=1)",
            "sums are not rescaled to a new maximum",
        ),
        (
            "acc = acc * shrink[:, None] + tl.dot(",
            "acc = acc + tl.dot(",
            "values are not rescaled to a new maximum",
        ),
        (
            "alive = valid & (prompt == p) & (length > 0)",
            "alive = valid & (prompt >= p) & (length > 0)",
            "rows see the prompts before theirs as well",
        ),
        ("alive = valid & (prompt == p) & (length > 0)", "alive = valid & (prompt == p)", "the dead read prompts"),
        (
            "oldest = tl.maximum(end + length - window, 0)",
            "oldest = tl.maximum(end + length - window - 1, 0)",
            "prefix: one key too many (triton)",
        ),
        (
            "oldest += tl.maximum(length - window, 0)",
            "oldest += tl.maximum(length - window - 1, 0)",
            "suffix: one key too many (triton)",
        ),
        (
            "weight = tl.where(full, tl.exp(m - tl.max(m, axis=0)), 0.0)",
            "weight = tl.where(full, 1.0, 0.0)",
            "parts are merged without their maxima",
        ),
        ("inside = slot < stop", "inside = slot < stop + 1", "a slot behind the end is read"),
        (
            "- split * chunk, 0) // BLOCK_S * BLOCK_S  # tiles",
            "- split * chunk, 0)  # tiles",
            "where tiles begin depends on the neighbours' window",
        ),
        ("full = valid & (s > 0)", "full = valid & (s > 1)", "parts of a single key are lost"),
        ("busy = i < tl.where(start < stop, G, 0)", "busy = valid", "an empty split of a row's own slots reads q"),
        ("busy = ends > split * chunk", "busy = ends >= 0", "an empty split of the prefixes reads q"),
        (
            "busy = busy & (ends + length - window < split * chunk + chunk)",
            "busy = busy & (ends + length - window < split * chunk)",
            "the oldest keys of a window are not seen",
        ),
        (
            "at, mask=full[:, None] & (d < D)[None, :]",
            "at, mask=(part < parts)[:, None] & (d < D)[None, :]",
            "unwritten parts are read: 0 * nan",
        ),
        ("scores.add_(plan.hidden)", "scores.add_(0)", "torch: nothing is hidden"),
        (").mul_(scale)", ")", "torch: the scale is forgotten"),
        (
            ".baddbmm_(share, prefix_values)",
            ".baddbmm_(share, prefix_values, beta=0)",
            "torch: the row's own part is overwritten",
        ),
        (
            "oldest = [max(0, prefix[p] + n - window) if window",
            "oldest = [max(0, prefix[p] + n - window - 1) if window",
            "torch: one key too many in the window",
        ),
        (
            "x.view(K, N, -1, D).masked_fill(plan.unused, 0.0).view_as(x)",
            "x.view_as(x)",
            "torch: unused slots reach a product",
        ),
        ("x = tl.where(x < 0, -softcap, softcap) *", "x = softcap *", "triton: softcap loses the sign"),
        (
            "out[:, rows] += torch.bmm",
            "out[:, rows] = torch.bmm",
            "torch: the row's own part is overwritten, prompts apart",
        ),
        (
            "unused, width = torch.cat((slot >= end, unused), dim=1), 0",
            "unused, width = torch.cat((slot > end, unused), dim=1), 0",
            "torch: the slot behind a copied prefix reaches a product",
        ),
        (
            "(prompt, slice(start, stop)), []",
            "(prompt, slice(0, stop - start)), []",
            "torch: copies begin at slot 0",
        ),
        (
            "one_block=len(blocks) == 1 and blocks[0][0] == slice(0, P)",
            "one_block=len(blocks) == 1",
            "torch: rows share in the prompts of others",
        ),
    ],
    "tests/test_compile_kernels.py": [
        (
            '@triton.jit(do_not_specialize=["parts"])\ndef _merge_kernel',
            "@triton.jit\ndef _merge_kernel",
            "16 parts are another kernel than 15",
        ),
        (
            "most = 1 << (2 * MAX_SPLITS - 1).bit_length()",
            "most = 1 << (parts - 1).bit_length()",
            "a longer cache compiles another merge in the middle of a rollout",
        ),
    ],
}
