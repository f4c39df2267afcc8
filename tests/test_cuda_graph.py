"""nanogspo/fast/cuda_graph.py: a decode step as a CUDA graph, without a GPU: tools/recorder.py plays the graph.

Captured and replayed, with the Triton kernels in the interpreter, against the same kernels launched step by step: the
same bits, because they are the same calls. That those are right is tests/test_rollout.py's business.

Run: python -m pytest tests/test_cuda_graph.py
"""

import contextlib
import itertools
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from recorder import record

import kernels.decode_attention
import kernels.glu
import kernels.lora
import kernels.packed
import kernels.rms_norm
import kernels.rope
import kernels.sample
from kernels.backend import INTERPRETED
from nanogspo import rollout
from nanogspo.fast import cuda_graph, fused_linear
from nanogspo.lora import add_lora, lora_layers
from nanogspo.model import Transformer
from nanogspo.quant import quantize_model
from nanogspo.rollout import generate
from tests import test_rollout
from tests.test_rollout import FAMILIES, PROMPTS

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="wants Triton's interpreter, which plays the GPU here")
# One row, of a prompt longer than the windows; four steps, the first of which runs by itself. The interpreter takes 0.1
# s a row, layer and step; several rows are in the test of rows that leave
SETTINGS = {"group_size": 1, "max_new_tokens": 5, "seed": 0}
LEAVING = {"group_size": 4, "max_new_tokens": 8, "eos_ids": [1, 4, 9], "seed": 6098}  # answers of 6, 3, 8 and 2 tokens


@contextlib.contextmanager
def like_a_gpu(recorder=record):
    """Triton for all that a step launches, fused layers as on a GPU, captures allowed. Gives the captures made."""
    replays, launched = [], [kernels.decode_attention, kernels.glu, kernels.rms_norm, kernels.rope]
    launched += [kernels.packed, kernels.lora, kernels.sample]

    def kept(step):
        replay = recorder(step)
        replays.append(replay)
        replay.calls = 0

        def counted():
            replay.calls += 1
            replay()

        return counted

    with contextlib.ExitStack() as stack:
        for module in launched:
            stack.enter_context(patch.object(module, "choose", lambda backend, x: backend or "triton"))
        stack.enter_context(patch.object(rollout, "can_capture", lambda cache: recorder is not None))
        stack.enter_context(patch.object(cuda_graph, "capture", kept))
        stack.enter_context(patch.object(fused_linear, "can_prepack", lambda weight: False))
        stack.enter_context(patch.object(fused_linear, "can_prepack_head", lambda weight: False))
        stack.enter_context(patch.object(fused_linear, "can_concatenate", lambda weight: True))
        yield replays


def tiny(family="qwen3", layers=2):
    return test_rollout.tiny(family, num_hidden_layers=layers, sliding_window_pattern=2)


def eager_and_captured(model, prompts=PROMPTS[1:2], capture_from=1, **settings):
    settings = SETTINGS | settings
    with (
        like_a_gpu(None),
        patch.object(rollout, "COMPACT_BELOW", rollout.COMPACT_CAPTURED_BELOW),
    ):  # batches of equal sizes
        eager = generate(model, prompts, **settings)
    with like_a_gpu() as replays, patch.object(cuda_graph, "CAPTURE_FROM", capture_from):
        captured = generate(model, prompts, **settings)
    assert captured == eager  # tokens, log-probs and ends
    return eager, replays


@needs_interpreter
def test_rows_that_leave_mean_a_new_capture():
    answers, replays = eager_and_captured(tiny(), PROMPTS[2:3], **LEAVING)
    assert [len(a.tokens) for a in answers] == [6, 3, 8, 2]  # so half of the batch has left after 3 and 6
    assert [replay.calls for replay in replays] == [1, 2, 1]  # of 2, 3 and 2 steps: the first of each runs by itself


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "settings"),
    list(zip(FAMILIES, [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {}], strict=True)),
)
def test_a_replayed_step_is_the_step(family, settings):
    """Every family, and every way to sample."""
    _, [replay] = eager_and_captured(tiny(family), **settings)
    assert replay.calls == 3


@needs_interpreter
@pytest.mark.parametrize(("packed", "small"), [("nf4", 16), ("int8", 16), ("nf4", 0)])
def test_with_adapters_on_packed_weights(packed, small, monkeypatch):
    """Few rows multiply straight from the packed weights; more than `small` of them from weights that are unpacked."""
    monkeypatch.setattr(kernels.lora, "SMALL", small)
    model = tiny()
    quantize_model(model, packed)
    add_lora(model, r=3, alpha=6.0)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    from triton.runtime.interpreter import GridExecutor

    run, launched = GridExecutor.__call__, set()

    def spy(executor, *args, **kwargs):
        launched.add(executor.fn.__name__)
        return run(executor, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", spy):
        eager_and_captured(model)
    assert [name for name in launched if packed in name or "dequantize" in name or "matmul" in name], launched


@needs_interpreter
def test_finished_rows_read_nothing_while_they_wait_to_be_dropped():
    """The slots that attention is told of; what it makes of 0 is tests/test_decode_attention.py's business."""
    told, attend = [], rollout.KVCache.attend

    def spy(self, layer, *tensors, **settings):
        told.extend([self.lengths.tolist()] if layer == 0 else [])
        return attend(self, layer, *tensors, **settings)

    with like_a_gpu(), patch.object(cuda_graph, "CAPTURE_FROM", 99), patch.object(rollout.KVCache, "attend", spy):
        generate(tiny(), PROMPTS[2:3], **LEAVING)
    assert told == [[1] * 4, [2, 2, 2, 0], [3] * 2, [4] * 2, [5] * 2, [6], [7]]


@needs_interpreter
def test_how_many_launches_a_layer_is():
    """Lesson 05 multiplies by it."""
    launches = {}
    for layers, r in itertools.product((1, 2), (0, 3)):
        model = tiny(layers=layers)
        if r:
            add_lora(model, r=r, alpha=6.0)
        _, [replay] = eager_and_captured(model, PROMPTS[:1], max_new_tokens=3)
        launches[layers, r] = replay.launches
    assert launches[2, 0] - launches[1, 0] == 14
    assert launches[2, 3] - launches[1, 3] == 14 + 4 + 4  # of each x: the first and the second half of all its adapters


@needs_interpreter
def test_updated_weights_are_seen():
    model = tiny()
    before, _ = eager_and_captured(model, PROMPTS[:1], max_new_tokens=3)
    for p in model.parameters():
        p.data.mul_(1.1)
    after, _ = eager_and_captured(model, PROMPTS[:1], max_new_tokens=3)
    assert before != after


@needs_interpreter
def test_short_answers_are_not_captured():
    """Of 4 steps, 3 are left once the first has run."""
    for least, recordings in ((3, 1), (4, 0)):
        assert len(eager_and_captured(tiny(), PROMPTS[:1], capture_from=least)[1]) == recordings
    assert cuda_graph.CAPTURE_FROM > 3  # recording takes longer than a step that runs by itself


@needs_interpreter
def test_what_cannot_be_captured_runs_as_it_is_and_says_so(capsys):
    """A step that waits for the GPU; the refusal comes in the middle of it, after lengths and slot have moved."""
    logits = Transformer.logits

    def waiting(self, hidden):
        assert hidden.sum().item() == hidden.sum().item()
        return logits(self, hidden)

    with patch.object(Transformer, "logits", waiting):
        _, replays = eager_and_captured(tiny(), PROMPTS[:1])
    assert [replay.calls for replay in replays] == [0]  # what ends the capture mode, and is never replayed
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "decoding without a CUDA graph, which could not be captured: Runtime"
    )


class FakeGPU:
    """torch.cuda as `capture` uses it; `fails` says at which captures something breaks, and how: "step" (a launch that
    a capture refuses) or "end" (the driver has invalidated it, which capture_end reports)."""

    def __init__(self, fails=()):
        self.fails, self.captures, self.depth, self.said = dict(fails), 0, 0, []

    def patched(self, stack):
        gpu = self

        class Stream:
            def wait_stream(self, other):
                pass

        class Pool:
            id = (0, 7)

            def __init__(self):
                gpu.said.append("pool")

        class Graph:
            def capture_begin(self, pool):
                gpu.captures += 1
                gpu.said.append(f"begin {pool}")

            def capture_end(self):
                gpu.said.append("end")
                if gpu.captures in gpu.fails:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

            def replay(self):
                raise AssertionError("nothing to replay: a fake")

        @contextlib.contextmanager
        def entered(stream):
            gpu.depth += 1
            try:
                yield
            finally:
                gpu.depth -= 1

        fakes = {"CUDAGraph": Graph, "Stream": Stream, "MemPool": Pool, "stream": entered, "current_stream": Stream}
        fakes |= {"empty_cache": lambda: gpu.said.append("empty"), "current_device": lambda: 3}
        for name, value in fakes.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        left = lambda device, pool: gpu.said.append(f"left {device} {pool}")  # noqa: E731
        stack.enter_context(patch.object(torch._C, "_cuda_endAllocateToPool", left, create=True))
        for cached in (cuda_graph._capture_stream, cuda_graph._memory_pool):
            cached.cache_clear()
            stack.callback(cached.cache_clear)


FAILED = ["begin (0, 7)", "end", "left 3 (0, 7)", "empty"]


def test_captures_share_a_pool_and_a_failed_one_leaves_the_allocator_as_it_was():
    """An allocator that is left in its capture mode never releases cached memory again."""
    gpu = FakeGPU(fails={2: "end"})
    with contextlib.ExitStack() as stack:
        gpu.patched(stack)
        cuda_graph.capture(lambda: None)
        with pytest.raises(RuntimeError, match="previous error during capture"):
            cuda_graph.capture(lambda: None)
        cuda_graph.capture(lambda: None)
    assert gpu.said == ["pool", "begin (0, 7)", "end", *FAILED[:3], "begin (0, 7)", "end"] and gpu.depth == 0


@pytest.mark.parametrize("failures", [1, 2])
def test_out_of_memory_is_tried_again_once_with_the_cache_emptied(failures, capsys):
    """The second failure is final for this rollout alone, and says in one line what was the first thing to go wrong.
    A capture of something else follows: only one that ends well tells torch's generators that capturing is over."""
    gpu, calls = FakeGPU(fails=dict.fromkeys(range(1, failures + 1), "step")), []
    cache = SimpleNamespace(extent=5, advance_host=lambda: None, slot=torch.zeros(1))

    def step():
        calls.append(gpu.depth)
        cache.extent += 1
        if gpu.depth and gpu.captures in gpu.fails:
            raise RuntimeError("a library that waits for the GPU\nwith a second line")

    with contextlib.ExitStack() as stack:
        gpu.patched(stack)
        stack.enter_context(patch.object(cuda_graph, "CAPTURE_FROM", 1))
        captured = cuda_graph.CapturedStep(step, cache, enabled=True)
        captured(4)  # by itself
        assert cache.extent == 6
        if failures == 1:
            with pytest.raises(AssertionError, match="nothing to replay"):
                captured(3)
            assert cache.extent == 6 and captured.enabled
        else:
            captured(3)
            captured(2)
            assert cache.extent == 8 and not captured.enabled
    assert calls == ([0, 1, 1] if failures == 1 else [0, 1, 1, 0, 0]) and gpu.depth == 0
    assert gpu.said == ["pool", *FAILED, *([] if failures == 1 else FAILED[:3]), "begin (0, 7)", "end"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == failures - 1 and all("a library that waits for the GPU" in line for line in lines)


def test_ctrl_c_in_a_capture_is_ctrl_c():
    """Also where the driver has meanwhile invalidated the capture, which alone would mean: try again."""

    def interrupted():
        raise KeyboardInterrupt

    gpu = FakeGPU(fails={1: "end"})
    with contextlib.ExitStack() as stack:
        gpu.patched(stack)
        with pytest.raises(KeyboardInterrupt):
            cuda_graph.capture(interrupted)
    assert gpu.said == ["pool", *FAILED[:3]] and gpu.depth == 0


def test_a_failed_capture_changes_no_answer():
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(cuda_graph, "capture", side_effect=RuntimeError("no")))
        stack.enter_context(patch.object(rollout, "can_capture", lambda cache: True))
        stack.enter_context(patch.object(cuda_graph, "CAPTURE_FROM", 1))
        stack.enter_context(patch.object(rollout.KVCache, "mark_finished", lambda self, ends: None))
        answers = [generate(tiny(), PROMPTS, **SETTINGS) for _ in range(2)]
    assert answers[0] == answers[1]
    assert [a.tokens for a in answers[0]] == [a.tokens for a in generate(tiny(), PROMPTS, **SETTINGS)]


def test_a_cpu_captures_nothing():
    with patch.object(cuda_graph, "capture", side_effect=AssertionError):
        generate(tiny(), PROMPTS, **SETTINGS)


# ----------------------------------------------------------------------------
# the recorder itself


def test_recording_leaves_no_trace_and_replays_start_from_what_is_there():
    x, y = torch.arange(4.0), torch.zeros(4)

    def step():
        x.add_(1)
        y.copy_(x.view(2, 2).flip(0).flatten() * 2)

    replay = record(step)
    assert x.tolist() == [0, 1, 2, 3] and y.tolist() == [0] * 4
    replay()
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == [6, 8, 2, 4]
    x.fill_(10)
    replay()
    assert x.tolist() == [11] * 4 and y.tolist() == [22] * 4


def test_numbers_of_python_and_tensors_that_moved_stay_what_they_were():
    state = {"n": 1, "x": torch.ones(2)}
    out, first = torch.zeros(2), state["x"]
    replay = record(lambda: out.copy_(state["x"] * state["n"]))
    state["n"], state["x"] = 5, torch.full((2,), 7.0)
    replay()
    assert out.tolist() == [1, 1]
    first.fill_(3)
    replay()
    assert out.tolist() == [3, 3]


def test_what_was_computed_while_recording_is_junk():
    x, kept = torch.ones(2), []
    record(lambda: kept.append(x + 1))
    assert kept[0].isnan().all()


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: torch.arange(2).repeat_interleave(torch.arange(2)),
        lambda x: x.index_put_((x > 0,), x[0]),
    ],
)
def test_refuses_what_a_graph_refuses(step):
    x = torch.ones(2)

    def moved_then():
        x.add_(1)
        step(x)

    with pytest.raises(RuntimeError, match="while recording, want nothing that (waits for|sends numbers to) a GPU"):
        record(moved_then)
    assert x.tolist() == [1, 1]
