"""Rollout: sampling answers from the very weights that are being trained.

    prefill   every prompt once, whatever the group size; its keys and values are stored once for all its answers
    decode    one token per row and step: hidden -> fp32 logits -> sample -> log-prob of what was drawn
    compact   rows that drew a stop token are dropped, once a quarter of the batch (with a CUDA graph half) has done so

Linear layers that share an input are fused (fast/fused_linear.py), and on a GPU a decode step is one CUDA graph
(fast/cuda_graph.py). You can read `decode` as if neither existed.

A prompt is shared three times: prefill and cache (once a group), decode attention (its keys are read once a group), and
in training, where it stands once in the packed row for all its answers (packing.py).

Token ids are kept as drawn (the stop token too: the model has to learn to produce it) and are never re-tokenised.
The log-probs kept here are a *measurement*. "Old" log-probs for the ratio come from the training forward
(packing.score): averaged over an answer, cached decoding and a full forward differ by 1e-3 and more in bf16, beyond
GSPO's clip range. So are the experts kept here: --router-replay replays those of the training forward.

Sampling inverts the cumulative distribution with one uniform number per row and step, all drawn up front, and every
prompt has its own generator. A row's randomness therefore depends neither on which other rows are still running nor on
which prompts are decoded beside it, in one batch, in several (max_rows) or by other processes.

Letters: P prompts, G answers to each; N = P G rows, n of them still in the batch; S prompt tokens in all; T steps.
Lessons: lessons/04_sampling_and_cache.md, 05_a_decode_step.md       Tests: tests/test_rollout.py, test_cuda_graph.py
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.attention import Segments
from kernels.sample import sample as sample_token
from nanogspo.cache import KVCache
from nanogspo.fast.cuda_graph import CapturedStep, can_capture
from nanogspo.fast.fused_linear import FusedLinears
from nanogspo.layers.moe import Routing
from nanogspo.model import Transformer
from nanogspo.sharding import is_sharded


@dataclass
class Answer:
    """One sampled answer. logp[i] is the log-prob tokens[i] was drawn with (temperature and truncation included)."""

    prompt_index: int
    tokens: list[int] = field(default_factory=list)  # the stop token included when there was one
    logp: list[float] = field(default_factory=list)
    finished: bool = False  # False: cut off at max_new_tokens
    # (len(tokens), L, k) int16, of the pass that each token was drawn after
    experts: Tensor | None = field(default=None, compare=False)  # answers are equal by their numbers in Python


# rows still running, their tokens, their log-probs, whether each ends here, experts (rows, L, k) of a model with these
Step = tuple[list[int], list[int], list[float], list[bool], Tensor | None]


def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    first_prompt: int = 0,
    streams: Sequence[tuple[int, int, int]] = (),
    max_rows: int = 0,
    on_step: Callable[[int, int], bool] | None = None,
    **settings,
) -> list[Answer]:
    """Sample group_size answers to every prompt.

    prompts         token ids, each at least one token
    first_prompt    number of the first prompt: with settings' seed it decides what is drawn for a prompt
    streams         (prompt's number, answer, turn) of every prompt, for later turns of episodes (episodes.py)
    max_rows        rows decoded at a time, rounded down to whole groups (one at least); 0: all
    on_step         called after every decode step with how many answers are complete, and how many tokens each other
                    one has; a true return ends the sampling there, with the answers as far as they have got
    settings        of `decode`: temperature, top_k, top_p, eos_ids, seed
    returns         P * group_size Answers, prompt-major

    Raises ValueError for no prompts, an empty one, ids outside the vocabulary, settings outside their range, and a
    prompt that leaves no room under the model's max_positions; FloatingPointError when scores are not finite.
    """
    if group_size < 1:
        raise ValueError(f"got group_size {group_size}, want at least 1")
    answers = [Answer(p) for p in range(len(prompts)) for _ in range(group_size)]
    per_slice = max(1, max_rows // group_size) if max_rows else max(1, len(prompts))
    complete, routed = 0, []
    fused = FusedLinears(model)  # once for all slices; anew for each rollout, because the weights have moved
    for first in range(0, len(prompts), per_slice):
        part = prompts[first : first + per_slice]
        steps = decode(
            model,
            part,
            fused,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            first_prompt=first_prompt + first,
            streams=streams[first : first + per_slice],
            **settings,
        )
        for rows, tokens, logp, finished, experts in steps:
            routed += [] if experts is None else [([first * group_size + row for row in rows], experts)]
            for row, token, lp, end in zip(rows, tokens, logp, finished, strict=True):
                answer = answers[first * group_size + row]
                answer.tokens.append(token)
                answer.logp.append(lp)
                answer.finished = end
                complete += end or len(answer.tokens) == max_new_tokens
            if on_step and on_step(complete, len(answer.tokens)):
                steps.close()  # now, not when it is collected: it has to put the model back into training mode
                return answers
    if routed:  # answer by answer, each in the order of its tokens
        order = torch.tensor([row for rows, _ in routed for row in rows]).argsort(stable=True)  # (drawn tokens,)
        experts = torch.cat([part for _, part in routed])[order].split([len(answer.tokens) for answer in answers])
        for answer, own in zip(answers, experts, strict=True):
            answer.experts = own
    return answers


@torch.no_grad()
def decode(
    model: Transformer,
    prompts: list[list[int]],
    fused: FusedLinears | None = None,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    seed: int = 0,
    first_prompt: int = 0,
    streams: Sequence[tuple[int, int, int]] = (),
) -> Iterator[Step]:
    """The sampling loop, a step at a time. Arguments as those of `generate`, and

    fused           the model's linear layers, where the caller has fused them already
    temperature     > 0 divides the logits; 0 takes the most likely token (logp is then that of temperature 1)
    top_k, top_p    keep the k likeliest tokens (0: all), then the fewest whose mass reaches top_p; logp is renormalised
    eos_ids         tokens that end an answer
    seed            of the run
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device, was_training, fused = model.embed_tokens.weight.device, model.training, fused or FusedLinears(model)
    model.eval()  # LoRA dropout must not touch the policy that is sampled
    try:
        # prefill: every prompt once
        segments = Segments.build([len(p) for p in prompts], device=device)
        tokens = torch.tensor([token for p in prompts for token in p], device=device)  # (S,) packed: no padding
        capacity = max_new_tokens - 1  # nothing follows an answer's last token
        cache = KVCache(model.config, segments, group_size, capacity, dtype=model.norm.weight.dtype)
        # FSDP2's hooks wait for streams of their own, which a graph cannot contain
        cache.capturable = can_capture(cache) and not is_sharded(model)
        routing, last = Routing(fused), segments.cu_seqlens[1:].long() - 1  # (P,)
        hidden = model(tokens[None], segments=segments, cache=cache, linear=routing)[0]  # (S, C)
        logits, experts = fused.logits(hidden[last]), routing.experts  # (P, V), (S, L, k)
        experts = None if experts is None else experts[last].repeat_interleave(group_size, dim=0)  # (N, L, k)

        # the first token of every answer
        streams = streams or [(first_prompt + p, 0, 0) for p in range(len(prompts))]
        uniforms = [draw_uniforms(seed, n, max_new_tokens, group_size, *where) for n, *where in streams]
        uniforms = torch.cat(uniforms, dim=1)  # (T, N)
        batch = DecodeBatch(cache, uniforms.to(device), (temperature, top_k, top_p), sorted(eos_ids), experts)
        batch.sample_next(logits.repeat_interleave(group_size, dim=0))  # (N, V)

        # one more at every step. What `step` reads and writes keeps its address and size until rows are compacted:
        # the cache has all its slots from the start, and how many are in use is a number on the device
        def step() -> None:
            routing = Routing(fused)
            hidden = model(batch.tokens[None], cache=cache, linear=routing)  # (1, n, C)
            if batch.experts is not None:
                batch.experts.copy_(routing.experts)
            batch.sample_next(fused.logits(hidden[0]))  # (n, V)

        next_step = CapturedStep(step, cache, enabled=cache.capturable)
        rows = list(range(batch.size))  # which answer each row of the batch is
        active = rows  # rows of the batch that have not drawn a stop token
        for left in reversed(range(max_new_tokens)):  # how many more steps are allowed
            drawn, logp, ends = batch.drawn.tolist()  # the one time in a step that Python waits for a GPU
            kept = [logp[n] for n in active]
            if not all(map(math.isfinite, kept)):
                advice = "its weights have diverged; train with a lower --lr"
                raise FloatingPointError(f"the model's scores are not finite numbers any more; {advice}")
            experts = None if batch.experts is None else batch.experts[active].cpu()  # (active, L, k)
            ended = [ends[n] > 0 for n in active]
            yield [rows[n] for n in active], [int(drawn[n]) for n in active], kept, ended, experts
            active = [n for n in active if not ends[n]]
            if not active or not left:
                return
            if len(active) <= (COMPACT_CAPTURED_BELOW if next_step.enabled else COMPACT_BELOW) * batch.size:
                next_step.forget()  # first of all: a graph holds memory
                batch.compact(active)
                rows = [rows[n] for n in active]
                active = list(range(batch.size))
            next_step(left)
    finally:
        model.train(was_training)


def draw_uniforms(seed: int, prompt_number: int, steps: int, group_size: int, answer: int = 0, turn: int = 0) -> Tensor:
    """(steps, group_size) float64 in [0, 1): the numbers that the answers to one prompt are drawn with.

    seed, prompt_number   both modulo 2^64: the key of a Philox generator, so all pairs have streams of their own
    answer, turn          the high words of its 256-bit counter. A first turn (0) draws for all answers at once; from
                          the second on every answer has its own stream of 2^128 numbers, whoever else still runs

    float64, because at V = 151,936 a fp32 uniform could not tell apart tokens rarer than 6e-8. Another number of steps
    changes none of the numbers before. numpy guarantees the raw stream for all its versions.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    key = np.array([seed % 2**64, prompt_number % 2**64], dtype=np.uint64)
    counter = np.array([0, 0, answer, turn], dtype=np.uint64)  # the lowest word first
    raw = np.random.Philox(key=key, counter=counter).random_raw(steps * group_size)  # (steps * G,) uint64
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-53).view(steps, group_size)


class DecodeBatch:
    """The rows that are decoded together: the token each has drawn last, and how the next one is drawn.

    drawn   (3, n) float64: every row's token, its log-prob, and 1 where it is a stop token
    experts (n, L, k) int16 that the pass before this token sent each row to; None of a model without

    `sample_next` reads and writes tensors that stay where they are and takes no number from Python, so that a CUDA
    graph can capture it (fast/cuda_graph.py); `compact` moves them.
    """

    def __init__(self, cache: KVCache, uniforms: Tensor, settings: tuple, stop: Sequence[int], experts: Tensor | None):
        device, N = uniforms.device, uniforms.shape[1]
        self.cache, self.settings = cache, settings  # of `sample`: temperature, top_k, top_p
        self.uniforms, self.number = uniforms, torch.zeros(1, dtype=torch.int64, device=device)  # (T, n), (1,)
        self.stop = torch.tensor(stop, dtype=torch.int64, device=device)  # (ids,)
        self.tokens = torch.zeros(N, dtype=torch.int64, device=device)  # (n,)
        self.drawn = torch.zeros(3, N, dtype=torch.float64, device=device)  # (3, n)
        self.experts = experts

    @property
    def size(self) -> int:
        return len(self.tokens)

    def sample_next(self, logits: Tensor) -> None:
        """The next token of every row, from logits (n, V)."""
        uniform = self.uniforms.index_select(0, self.number)[0]  # (n,)
        tokens, logp = sample(logits, uniform, *self.settings)  # (n,), (n,)
        ends = (tokens[:, None] == self.stop).any(1)  # (n,)
        drawn = torch.stack((tokens.double(), logp.double(), ends.double()))  # (3, n) float64 holds an id exactly
        self.drawn.copy_(drawn)
        self.tokens.copy_(tokens)
        self.number += 1
        if self.cache.capturable:
            self.cache.mark_finished(ends)

    def compact(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        kept = torch.tensor(rows, device=self.tokens.device)  # (m,)
        self.cache.compact(kept)
        self.tokens, self.drawn, self.uniforms = self.tokens[kept], self.drawn[:, kept], self.uniforms[:, kept]
        self.experts = None if self.experts is None else self.experts[kept]


# The batch is compacted once this fraction of its rows, or less, is active. Copying their cache costs about a step.
# With a graph it costs a new capture too, while finished rows cost little: they read no cache (KVCache.mark_finished).
COMPACT_BELOW = 0.75
COMPACT_CAPTURED_BELOW = 0.5


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Draw one token per row, by inverting the cumulative distribution (kernels/sample.py) of what is left of it.

    logits   (N, V) float32;  uniform (N,) float64 in [0, 1)
    returns  (N,) int64 tokens, (N,) float32 log-probs under the distribution drawn from
    """
    if temperature == 0:
        token = logits.argmax(-1)  # (N,)
        return token, logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    if not top_k and top_p == 1:
        return sample_token(logits, uniform.to(logits.device), temperature)
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
    return sample_token(z, uniform.to(z.device))


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
        got = f"got a prompt of {longest} tokens + {max_new_tokens} new ones"
        raise ValueError(f"{got}, want at most {room} (max_position_embeddings)")
    strange = {i for p in prompts for i in p if not 0 <= i < model.config.vocab_size}
    if strange:
        line = f"got token id {min(strange)}, want ids in [0, {model.config.vocab_size})"
        raise ValueError(f"{line}: wrong tokenizer for this model?")
