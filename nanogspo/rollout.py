"""Rollout: sampling answers from the very weights that are being trained.

    prefill   every prompt once, whatever the group size; its keys and values are stored once for all its answers
    decode    one token per row and step: hidden -> fp32 logits -> sample -> log-prob of what was drawn
    finish    a row that drew a stop token leaves the batch, so short answers stop costing

Token ids are kept as drawn (the stop token too: the model has to learn to produce it) and are never re-tokenised.
The log-probs kept here are a *measurement*. "Old" log-probs for the ratio come from the training forward
(packing.score): averaged over an answer, cached decoding and a full forward differ by 1e-3 and more in bf16, beyond
GSPO's clip range.

Sampling inverts the cumulative distribution with one uniform number per row and step, all drawn up front. A row's
randomness therefore does not depend on which other rows are still alive.

Lesson: lessons/04_sampling_and_cache.md       Tests: tests/test_rollout.py
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Segments
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
    max_rows: int = 0,
) -> list[Answer]:
    """Sample group_size answers to every prompt.

    prompts         token ids, each at least one token
    temperature     > 0 divides the logits; 0 takes the most likely token (logp is then that of temperature 1)
    top_k, top_p    keep the k likeliest tokens (0: all), then the fewest whose mass reaches top_p; logp is renormalised
    eos_ids         tokens that end an answer
    max_rows        rows decoded at a time, rounded down to whole groups (one at least); 0: all
    returns         P * group_size Answers, prompt-major

    Raises ValueError for an empty prompt, for sampling settings outside their range, and for a prompt that leaves no
    room under the model's max_positions.
    """
    if group_size < 1:
        raise ValueError(f"got group_size {group_size}, want at least 1")
    answers = [Answer(p) for p in range(len(prompts)) for _ in range(group_size)]
    per_slice = max(1, max_rows // group_size) if max_rows else max(1, len(prompts))
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
                seed=seed + first,  # another slice, another stream
            )
            for rows, tokens, logp, finished in steps:
                for row, token, lp, end in zip(rows, tokens, logp, finished, strict=True):
                    answer = answers[first * group_size + row]
                    answer.tokens.append(token)
                    answer.logp.append(lp)
                    answer.finished = end
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
) -> Iterator[Step]:
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    device, was_training = model.embed_tokens.weight.device, model.training
    model.eval()  # LoRA dropout must not touch the policy that is sampled
    with contextlib.ExitStack() as after:
        after.callback(model.train, was_training)
        N = len(prompts) * group_size
        segments = Segments.build([len(p) for p in prompts], device=device)
        tokens = torch.tensor([token for p in prompts for token in p], device=device)  # (S,) packed: no padding
        capacity = max_new_tokens - 1  # nothing follows an answer's last token
        cache = KVCache(model.config, segments, group_size, capacity, dtype=model.norm.weight.dtype)
        hidden = model(tokens[None], segments=segments, cache=cache)[0]  # (S, C)
        logits = model.logits(hidden[segments.cu_seqlens[1:].long() - 1])  # (P, V)
        logits = logits.repeat_interleave(group_size, dim=0)  # (N, V)
        # float64: at V = 151,936 a fp32 uniform could not tell apart tokens rarer than 6e-8
        uniforms = torch.rand(max_new_tokens, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        uniforms = uniforms.to(device)
        stop = torch.tensor(sorted(eos_ids), device=device, dtype=torch.int64)
        rows = torch.arange(N, device=device)  # (n,) which answer each row of the batch is
        running = torch.ones(
            N, dtype=torch.bool, device=device
        )  # (n,) rows of the batch that have not drawn a stop token
        for step in range(max_new_tokens):
            drawn, logp = sample(logits, uniforms[step, rows], temperature, top_k, top_p)  # (n,), (n,)
            ends = torch.isin(drawn, stop)  # (n,)
            live = running.nonzero().squeeze(1)
            kept = logp[live].tolist()
            if not all(map(math.isfinite, kept)):
                raise FloatingPointError(
                    "the model's scores are not finite numbers any more; its weights have diverged"
                )
            yield rows[live].tolist(), drawn[live].tolist(), kept, ends[live].tolist()
            running &= ~ends
            left = int(running.sum())
            if left == 0 or step + 1 == max_new_tokens:
                return
            if left <= KEEP * len(rows):  # copying what is left costs about a step: wait until it buys a fair share
                keep = running.nonzero().squeeze(1)
                cache.keep(keep)
                rows, drawn, running = rows[keep], drawn[keep], running[keep]
            hidden = model(drawn[None], cache=cache)[0]  # (n, C)
            logits = model.logits(hidden)  # (n, V)


KEEP = 0.75  # the batch is rebuilt without its finished rows once a quarter of it has finished


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
