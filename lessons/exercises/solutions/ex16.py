from torch import Tensor


def mixture(x: Tensor, experts, index: Tensor, weights: Tensor) -> tuple[Tensor, list[int]]:
    k, pair = index.shape[1], index.flatten().argsort(stable=True)  # (T k,)
    load = index.flatten().bincount(minlength=len(experts)).tolist()
    out, start = None, 0
    for e, count in enumerate(load):
        if not count:
            continue
        mine = pair[start : start + count]  # (count,)
        start += count
        rows = x[mine // k] @ experts[e].T * weights.flatten()[mine, None]  # (count, F)
        out = rows.new_zeros(len(x), rows.shape[1]) if out is None else out
        out.index_add_(0, mine // k, rows)
    return out, load
