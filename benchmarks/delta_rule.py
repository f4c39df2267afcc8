"""The chunked delta rule against transformers' torch path: CPU seconds of one thread, forward, and forward + backward.

Run: python benchmarks/delta_rule.py [--rows 2] [--length 2048] [--heads 8] [--width 64]
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule  # noqa: E402

from kernels.attention import Segments  # noqa: E402
from kernels.delta_rule import delta_rule  # noqa: E402


def seconds(step, repeats: int = 5) -> float:
    """The least of some repeats, of this process alone: other work on the machine counts little."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 2), ("length", 2048), ("heads", 8), ("width", 64)):
        p.add_argument(f"--{name}", type=int, default=default)
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    B, T, V, D = a.rows, a.length, a.heads, a.width
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, V // 2, D), dim=-1) for _ in range(2))
    g, beta = -torch.nn.functional.softplus(torch.randn(B, T, V)), torch.rand(B, T, V)
    inputs = [x.requires_grad_() for x in (q, k, torch.randn(B, T, V, D), g, beta)]
    segments, dout = Segments.build([T] * B), torch.randn(B, T, V, D)

    def theirs():
        return torch_chunk_gated_delta_rule(*inputs)[0]

    def ours():
        q, *rest = (x.flatten(0, 1) for x in inputs)
        return delta_rule(q * D**-0.5, *rest, segments, backend="torch")[0].view(B, T, V, D)

    a, b = theirs(), ours()
    print(f"{B} x {T} tokens, {V // 2} key and {V} value heads of {D}; largest difference {(a - b).abs().max():.1e}")
    results = {}
    for name, rule in (("transformers", theirs), ("ours", ours)):
        with torch.no_grad():
            forward = seconds(rule)
        results[name] = forward, seconds(lambda rule=rule: torch.autograd.grad(rule(), inputs, dout))
        print(f"{name:>12}: forward {results[name][0]:.3f} s, forward and backward {results[name][1]:.3f} s")
    ratios = [x / y for x, y in zip(results["transformers"], results["ours"], strict=True)]
    print(f"{'times':>12}: {ratios[0]:.2f}, {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
