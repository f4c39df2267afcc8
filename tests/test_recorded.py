"""A decode step as a CUDA graph (nanogspo/rollout.py::Batch), without a GPU: tools/recorder.py plays the graph.

Recorded and replayed, with the Triton kernels in the interpreter, against the same kernels launched step by step: the
same bits, because they are the same calls. That those are right is tests/test_rollout.py's business.

Run: python -m pytest tests/test_recorded.py
"""

import contextlib
import itertools
from unittest.mock import patch

import pytest
import torch
from recorder import record

import kernels.decode_attention
import kernels.glu
import kernels.int8
import kernels.lora
import kernels.nf4
import kernels.rms_norm
import kernels.rope
from kernels.backend import INTERPRETED
from nanogspo import rollout
from nanogspo.lora import add_lora, lora_layers
from nanogspo.model import Transformer
from nanogspo.quant import pack_model
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
    """Triton for everything that a step launches, and steps that can be recorded. Gives the recordings made."""
    replays, launched = [], [kernels.decode_attention, kernels.glu, kernels.rms_norm, kernels.rope]
    launched += [kernels.nf4, kernels.int8, kernels.lora]

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
        stack.enter_context(patch.object(rollout, "can_record", lambda cache: recorder is not None))
        stack.enter_context(patch.object(rollout, "record", kept))
        stack.enter_context(patch.object(rollout.Batch, "graphs_work", True))
        yield replays


def tiny(family="qwen3", layers=2):
    return test_rollout.tiny(family, num_hidden_layers=layers, sliding_window_pattern=2)


def eager_and_recorded(model, prompts=PROMPTS[1:2], record_from=1, **settings):
    settings = SETTINGS | settings
    with like_a_gpu(None), patch.object(rollout, "KEEP", rollout.KEEP_RECORDED):  # batches of equal sizes
        eager = generate(model, prompts, **settings)
    with like_a_gpu() as replays, patch.object(rollout, "RECORD_FROM", record_from):
        recorded = generate(model, prompts, **settings)
    assert recorded == eager  # tokens, log-probs and ends
    return eager, replays


@needs_interpreter
def test_rows_that_leave_mean_a_new_recording():
    answers, replays = eager_and_recorded(tiny(), PROMPTS[2:3], **LEAVING)
    assert [len(a.tokens) for a in answers] == [6, 3, 8, 2]  # so half of the batch has left after 3 and 6
    assert [replay.calls for replay in replays] == [1, 2, 1]  # of 2, 3 and 2 steps: the first of each runs by itself


@needs_interpreter
@pytest.mark.parametrize(
    ("family", "settings"),
    list(zip(FAMILIES, [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {}], strict=True)),
)
def test_a_replayed_step_is_the_step(family, settings):
    """Every family, and every way to sample."""
    _, [replay] = eager_and_recorded(tiny(family), **settings)
    assert replay.calls == 3


@needs_interpreter
@pytest.mark.parametrize(("packed", "small"), [("nf4", 16), ("int8", 16), ("nf4", 0)])
def test_with_adapters_on_packed_weights(packed, small, monkeypatch):
    """Few rows multiply straight from the packed weights; more than `small` of them from weights that are unpacked."""
    monkeypatch.setattr(kernels.lora, "SMALL", small)
    model = tiny()
    pack_model(model, packed)
    add_lora(model, r=3, alpha=6.0)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    from triton.runtime.interpreter import GridExecutor

    run, launched = GridExecutor.__call__, set()

    def spy(executor, *args, **kwargs):
        launched.add(executor.fn.__name__)
        return run(executor, *args, **kwargs)

    with patch.object(GridExecutor, "__call__", spy):
        eager_and_recorded(model)
    assert [name for name in launched if packed in name or "dequantize" in name or "matmul" in name], launched


@needs_interpreter
def test_finished_rows_read_nothing_while_they_wait_to_be_dropped():
    """The slots that attention is told of; what it makes of 0 is tests/test_decode_attention.py's business."""
    told, attend = [], rollout.KVCache.attend

    def spy(self, layer, *tensors, **settings):
        told.extend([self.lengths.tolist()] if layer == 0 else [])
        return attend(self, layer, *tensors, **settings)

    with like_a_gpu(), patch.object(rollout, "RECORD_FROM", 99), patch.object(rollout.KVCache, "attend", spy):
        generate(tiny(), PROMPTS[2:3], **LEAVING)
    assert told == [[1] * 4, [2, 2, 2, 0], [3] * 2, [4] * 2, [5] * 2, [6], [7]]


@needs_interpreter
def test_how_many_launches_a_layer_is():
    """Lesson 16 multiplies by it."""
    launches = {}
    for layers, r in itertools.product((1, 2), (0, 3)):
        model = tiny(layers=layers)
        if r:
            add_lora(model, r=r, alpha=6.0)
        _, [replay] = eager_and_recorded(model, PROMPTS[:1], max_new_tokens=3)
        launches[layers, r] = replay.launches
    assert launches[2, 0] - launches[1, 0] == 17
    assert launches[2, 3] - launches[1, 3] == 17 + 7 + 4  # a product for each adapter, and one for each x


@needs_interpreter
def test_updated_weights_are_seen():
    model = tiny()
    before, _ = eager_and_recorded(model, PROMPTS[:1], max_new_tokens=3)
    for p in model.parameters():
        p.data.mul_(1.1)
    after, _ = eager_and_recorded(model, PROMPTS[:1], max_new_tokens=3)
    assert before != after


@needs_interpreter
def test_short_answers_are_not_recorded():
    """Of 4 steps, 3 are left once the first has run."""
    for least, recordings in ((3, 1), (4, 0)):
        assert len(eager_and_recorded(tiny(), PROMPTS[:1], record_from=least)[1]) == recordings
    assert rollout.RECORD_FROM > 3  # recording takes longer than a step that runs by itself


@needs_interpreter
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so(capsys):
    """A step that waits for the GPU; the refusal comes in the middle of it, after lengths and slot have moved."""
    logits = Transformer.logits

    def waiting(self, hidden):
        assert hidden.sum().item() == hidden.sum().item()
        return logits(self, hidden)

    with patch.object(Transformer, "logits", waiting):
        _, replays = eager_and_recorded(tiny(), PROMPTS[:1])
    assert replays == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "decoding without a CUDA graph, which could not be recorded: Runtime"
    )


class Refusing:
    """torch.cuda.CUDAGraph, when something in the middle has broken the recording."""

    ended = 0

    def capture_begin(self):
        pass

    def capture_end(self):
        Refusing.ended += 1
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_a_failed_recording_says_what_failed_leaves_its_stream_and_is_the_last(capsys):
    depth = [0]  # how often the stream has been entered and not left

    @contextlib.contextmanager
    def entered(stream):
        depth[0] += 1
        try:
            yield
        finally:
            depth[0] -= 1

    class Stream:
        def wait_stream(self, other):
            pass

    step, calls = rollout.Batch._step, []

    def breaks_while_recorded(self):
        calls.append(depth[0])
        if depth[0]:
            raise RuntimeError("a library that waits for the GPU\nwith a second line")
        step(self)

    with contextlib.ExitStack() as stack:
        for name, value in {"CUDAGraph": Refusing, "Stream": Stream, "stream": entered}.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.cuda, "current_stream", Stream))
        stack.enter_context(patch.object(rollout, "can_record", lambda cache: True))
        stack.enter_context(patch.object(rollout, "RECORD_FROM", 1))
        stack.enter_context(patch.object(rollout.KVCache, "finish", lambda self, ends: None))
        stack.enter_context(patch.object(rollout.Batch, "_step", breaks_while_recorded))
        stack.enter_context(patch.object(rollout.Batch, "graphs_work", True))
        rollout._recording_stream.cache_clear()
        answers = [generate(tiny(), PROMPTS, **SETTINGS) for _ in range(2)]
        rollout._recording_stream.cache_clear()
    assert answers[0] == answers[1] == generate(tiny(), PROMPTS, **SETTINGS)
    assert depth == [0] and Refusing.ended == sum(calls) == 1  # one attempt in two rollouts
    [line] = capsys.readouterr().err.splitlines()
    assert "a library that waits for the GPU" in line


def test_a_cpu_records_nothing():
    with patch.object(rollout, "record", side_effect=AssertionError):
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
