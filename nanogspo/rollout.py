"""Rollout: sampling answers from the very weights that are being trained.

    prefill   every prompt once, whatever the group size; its keys and values are stored once for all its answers
    decode    one token per row and step: hidden -> fp32 logits -> sample -> log-prob of what was drawn
    finish    a row that drew a stop token leaves the batch, so short answers stop costing

On a GPU a decode step is one CUDA graph (Batch).

Token ids are kept as drawn (the stop token too: the model has to learn to produce it) and are never re-tokenised.
The log-probs kept here are a *measurement*. "Old" log-probs for the ratio come from the training forward
(packing.score): averaged over an answer, cached decoding and a full forward differ by 1e-3 and more in bf16, beyond
GSPO's clip range.

Sampling inverts the cumulative distribution with one uniform number per row and step, all drawn up front, and every
prompt has its own generator. A row's randomness therefore depends neither on which other rows are still running nor on
which prompts are decoded beside it, in one batch, in several (max_rows) or by other processes.

Lessons: lessons/04_sampling_and_cache.md, 16_a_decode_step.md       Tests: tests/test_rollout.py, test_recorded.py
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Segments
from kernels.decode_attention import choose_backend
from nanogspo.cache import KVCache
from nanogspo.model import Transformer


@dataclass
class Answer:
    """One sampled answer. logp[i] is the log-prob tokens[i] was drawn with (temperature and truncation included)."""

    prompt_index: int
    tokens: list[int] = field(default_factory=list)  # the stop token included when there was one
    logp: list[float] = field(default_factory=list)
    finished: bool = False  # False: cut off at max_new_tokens


# rows still running, their tokens, their log-probs, whether each ends here
Step = tuple[list[int], list[int], list[float], list[bool]]


def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    first_prompt: int = 0,
    max_rows: int = 0,
    on_step: Callable[[int, int], bool] | None = None,
) -> list[Answer]:
    """Sample group_size answers to every prompt.

    prompts         token ids, each at least one token
    temperature     > 0 divides the logits; 0 takes the most likely token (logp is then that of temperature 1)
    top_k, top_p    keep the k likeliest tokens (0: all), then the fewest whose mass reaches top_p; logp is renormalised
    eos_ids         tokens that end an answer
    seed            of the run; with a prompt's number, counted from first_prompt, it decides what is drawn for it
    max_rows        rows decoded at a time, rounded down to whole groups (one at least); 0: all
    on_step         called after every decode step with the number of answers that are complete and the tokens of those
                    that are not; a true return ends the sampling there, with the answers as far as they have got
    returns         P * group_size Answers, prompt-major

    Raises ValueError for an empty prompt, for sampling settings outside their range, and for a prompt that leaves no
    room under the model's max_positions.
    """
    if group_size < 1:
        raise ValueError(f"got group_size {group_size}, want at least 1")
    answers = [Answer(p) for p in range(len(prompts)) for _ in range(group_size)]
    per_slice = max(1, max_rows // group_size) if max_rows else max(1, len(prompts))
    complete = 0
    with model.sampling():  # once for all slices
        for first in range(0, len(prompts), per_slice):
            part = prompts[first : first + per_slice]
            steps = _decode(
                model,
                part,
                group_size=group_size,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                eos_ids=eos_ids,
                seed=seed,
                first_prompt=first_prompt + first,
            )
            for rows, tokens, logp, finished in steps:
                for row, token, lp, end in zip(rows, tokens, logp, finished, strict=True):
                    answer = answers[first * group_size + row]
                    answer.tokens.append(token)
                    answer.logp.append(lp)
                    answer.finished = end
                    complete += end or len(answer.tokens) == max_new_tokens
                if on_step and on_step(complete, len(answer.tokens)):
                    steps.close()  # now, not when it is collected: it has to put the model back into training mode
                    return answers
    return answers


def decode(model: Transformer, prompts: list[list[int]], **settings) -> Iterator[Step]:
    """The sampling loop, a step at a time. settings: all of `generate` but max_rows, which have no defaults here."""
    with model.sampling():
        yield from _decode(model, prompts, **settings)


@torch.no_grad()
def _decode(
    model: Transformer,
    prompts: list[list[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    eos_ids: Sequence[int],
    seed: int,
    first_prompt: int = 0,
) -> Iterator[Step]:
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device, was_training = model.embed_tokens.weight.device, model.training
    model.eval()  # LoRA dropout must not touch the policy that is sampled
    with contextlib.ExitStack() as after:
        after.callback(model.train, was_training)
        segments = Segments.build([len(p) for p in prompts], device=device)
        tokens = torch.tensor([token for p in prompts for token in p], device=device)  # (S,) packed: no padding
        capacity = max_new_tokens - 1  # nothing follows an answer's last token
        cache = KVCache(model.config, segments, group_size, capacity, dtype=model.norm.weight.dtype)
        hidden = model(tokens[None], segments=segments, cache=cache)[0]  # (S, C)
        logits = model.logits(hidden[segments.cu_seqlens[1:].long() - 1])  # (P, V)
        logits = logits.repeat_interleave(group_size, dim=0)  # (N, V)
        numbers = range(first_prompt, first_prompt + len(prompts))
        uniforms = torch.cat([draw_uniforms(seed, n, max_new_tokens, group_size) for n in numbers], dim=1)  # (T, N)
        batch = Batch(model, cache, uniforms.to(device), (temperature, top_k, top_p), sorted(eos_ids))
        batch.draw(logits)
        rows = list(range(len(logits)))  # which answer each row of the batch is
        running = rows  # rows of the batch that have not drawn a stop token
        for left in reversed(range(max_new_tokens)):  # steps that may follow
            drawn, logp, ends = batch.drawn.tolist()  # the one time in a step that Python waits for a GPU
            kept = [logp[n] for n in running]
            if not all(map(math.isfinite, kept)):
                raise FloatingPointError(
                    "the model's scores are not finite numbers any more; its weights have diverged; "
                    "train with a lower --lr"
                )
            yield [rows[n] for n in running], [int(drawn[n]) for n in running], kept, [ends[n] > 0 for n in running]
            running = [n for n in running if not ends[n]]
            if not running or not left:
                return
            if len(running) <= batch.fair_share * len(rows):
                batch.keep(running)
                rows = [rows[n] for n in running]
                running = list(range(len(rows)))
            batch.step(left)


def draw_uniforms(seed: int, prompt_number: int, steps: int, group_size: int) -> Tensor:
    """(steps, group_size) float64 in [0, 1): the numbers that the answers to one prompt are drawn with.

    seed, prompt_number   both modulo 2^64: the key of a Philox generator, so all pairs have streams of their own

    float64, because at V = 151,936 a fp32 uniform could not tell apart tokens rarer than 6e-8. Another number of steps
    changes none of the numbers before. numpy guarantees the raw stream for all its versions.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    key = np.array([seed % 2**64, prompt_number % 2**64], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(steps * group_size)  # (steps * G,) uint64
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).view(steps, group_size)


class Batch:
    """The rows that are decoded together, and one step of theirs: from the tokens drawn last to the next ones.

    drawn   (3, n) float64: every row's token, its log-prob, and 1 where it is a stop token

    A step reads and writes tensors that stay where they are and takes no number from Python, so on a GPU it can be
    recorded: its launches become one CUDA graph, which one call replays. For Qwen3-0.6B in bf16 they are 550, and 860
    with adapters: 3 and 4 ms of Python at 5 us each, where a GPU reads the weights in 0.4 ms. The first step of a batch
    runs as it is (kernels are compiled for its sizes), the second is recorded. When rows leave, both are due again.

    Tests: tests/test_recorded.py
    """

    graphs_work = True  # in this process; the first recording that fails is the last

    def __init__(self, model: Transformer, cache: KVCache, uniforms: Tensor, settings: tuple, stop: Sequence[int]):
        device, N = uniforms.device, uniforms.shape[1]
        self.model, self.cache, self.settings = model, cache, settings  # of `sample`: temperature, top_k, top_p
        self.uniforms, self.number = uniforms, torch.zeros(1, dtype=torch.int64, device=device)  # (T, n), (1,)
        self.stop = torch.tensor(stop, dtype=torch.int64, device=device)  # (ids,)
        self.tokens = torch.zeros(N, dtype=torch.int64, device=device)  # (n,)
        self.drawn = torch.zeros(3, N, dtype=torch.float64, device=device)  # (3, n)
        self.graphs, self._warm, self._replay = Batch.graphs_work and can_record(cache), False, None

    @property
    def fair_share(self) -> float:
        return KEEP_RECORDED if self.graphs else KEEP

    def draw(self, logits: Tensor) -> None:
        """The next token of every row, from logits (n, V)."""
        uniform = self.uniforms.index_select(0, self.number)[0]  # (n,)
        tokens, logp = sample(logits, uniform, *self.settings)  # (n,), (n,)
        ends = (tokens[:, None] == self.stop).any(1)  # (n,)
        self.drawn.copy_(torch.stack((tokens.double(), logp.double(), ends.double())))  # (3, n) an id is exact
        self.tokens.copy_(tokens)
        self.number += 1
        if self.graphs:
            self.cache.finish(ends)

    def step(self, left: int) -> None:
        """One token more for every row, finished or not. left: steps that may follow, this one included."""
        if self._replay is None and self.graphs and self._warm and left >= RECORD_FROM:
            extent = self.cache.extent
            try:
                self._replay = record(self._step)
            except RuntimeError as error:  # driver, library, out of memory: continue in eager mode
                while error.__context__ is not None:  # what broke the recording; the last one says that it is broken
                    error = error.__context__
                print(f"decoding without a CUDA graph, which could not be recorded: {error!r:.300}", file=sys.stderr)
                self.graphs = Batch.graphs_work = False
            self.cache.extent = extent  # recording ran nothing but Python
        if self._replay is None:
            self._step()
            self._warm = True
        else:
            self.cache.count()
            self._replay()

    def _step(self) -> None:
        self.draw(self.model.logits(self.model(self.tokens[None], cache=self.cache)[0]))

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self._warm, self._replay = False, None  # first of all: it holds memory
        kept = torch.tensor(rows, device=self.tokens.device)  # (m,)
        self.cache.keep(kept)
        self.tokens, self.drawn, self.uniforms = self.tokens[kept], self.drawn[:, kept], self.uniforms[:, kept]


def can_record(cache: KVCache) -> bool:
    """Whether a step is launches and nothing else: on a GPU, with the Triton kernel (the other one reads lengths)."""
    return cache.k[0].is_cuda and choose_backend(cache.k[0], cache.k[0]) == "triton"


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What `step` launches, as one launch. It is recorded and does not run; what it allocates stays allocated.

    torch.cuda.graph would do, but it first gives all cached memory back to the driver, and when a recording fails it
    leaves the process on its own stream.
    """
    graph, stream = torch.cuda.CUDAGraph(), _recording_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the default stream cannot be recorded
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@functools.cache
def _recording_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: cuBLAS keeps memory for every stream it has seen


# The batch is rebuilt without its finished rows once this share of it, or less, is running. Copying the others costs
# about a step. A graph has to be recorded anew besides; but there finished rows read nothing (KVCache.finish).
KEEP = 0.75
KEEP_RECORDED = 0.5
RECORD_FROM = 8  # steps left. Recording is a step's worth of Python and the driver's work on it: a guess, not measured


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

        token = first v with  sum_{j <= v} p[j] > uniform * sum_j p[j]

    logits   (N, V) float32;  uniform (N,) float64 in [0, 1)
    returns  (N,) int64 tokens, (N,) float32 log-probs under the distribution drawn from
    """
    if temperature == 0:
        token = logits.argmax(-1)  # (N,)
        return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    z = logits if temperature == 1 else logits / temperature  # (N, V)
    if top_k and top_k < z.shape[1]:
        kept = torch.full_like(z, -torch.inf)
        best = z.topk(top_k, dim=-1)  # exactly k, also when several tie for the last place
        z = kept.scatter(1, best.indices, best.values)
    if top_p < 1:
        ordered, index = z.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the strictly likelier tokens
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # the token that crosses top_p stays
        z = torch.full_like(z, -torch.inf).scatter(1, index, ordered)
    p = z.softmax(-1)  # (N, V)
    # sums of blocks of tokens first, in float64 from there on: a running sum over all V, in float64, would take a CPU
    # longer than a layer of the model. The sums' rounding, 1e-7, moves a token's probability by as much of itself
    whole = p.shape[1] // BLOCK * BLOCK
    sums = [p[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    sums = torch.cat([*sums, p[:, whole:].sum(-1, keepdim=True)], dim=1).double()  # (N, blocks)
    ends = sums.cumsum(-1)  # (N, blocks)
    block, rest = _invert(ends, uniform.to(z.device)[:, None] * ends[:, -1:])  # (N, 1) both
    columns = block * BLOCK + torch.arange(BLOCK, device=z.device)  # (N, BLOCK)
    inside = p.gather(1, columns.clamp(max=z.shape[1] - 1)).double()  # (N, BLOCK)
    inside = inside.masked_fill_(columns >= z.shape[1], 0.0).cumsum_(-1)
    share = (rest / sums.gather(1, block)).clamp(0, 1 - 2**-53)  # (N, 1) of the block, below 1 as the uniform is
    token = block * BLOCK + _invert(inside, share * inside[:, -1:])[0]  # (N, 1)
    token = token.clamp(max=z.shape[1] - 1)  # only scores that are nan get that far
    best, likeliest = z.amax(-1, keepdim=True), p.amax(-1, keepdim=True)  # the log of a rare p has lost its digits
    return token.squeeze(1), (z.gather(1, token) - best + likeliest.log()).squeeze(1)


# Tokens of a block: two searches, among V / 256 sums and among 256 tokens, are about equally long for V = 49,152
BLOCK = 256


def _invert(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """First place whose cumulative sum (N, n) is above the target (N, 1), which has probability then, and how far the
    target reaches into it: (N, 1) both."""
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)  # (N, 1)
    return place, target - F.pad(cumulative, (1, 0)).gather(1, place)


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    if not prompts or not all(prompts):
        empty = [i for i, p in enumerate(prompts) if not p]
        raise ValueError(f"got {len(prompts)} prompts, of which {empty} are empty; want at least one token in each")
    if max_new_tokens < 1:
        raise ValueError(f"got max_new_tokens {max_new_tokens}, want at least 1")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"got temperature {temperature}, top_k {top_k}, top_p {top_p}; want >= 0, >= 0 and in (0, 1]")
    longest, room = max(map(len, prompts)), model.config.max_positions
    if longest + max_new_tokens > room:
        raise ValueError(
            f"got a prompt of {longest} tokens + {max_new_tokens} new ones, "
            f"want at most {room} (max_position_embeddings)"
        )
    strange = {i for p in prompts for i in p if not 0 <= i < model.config.vocab_size}
    if strange:
        raise ValueError(
            f"got token id {min(strange)}, want ids in [0, {model.config.vocab_size}): wrong tokenizer for this model?"
        )
