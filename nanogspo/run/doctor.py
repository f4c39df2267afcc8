"""The doctor: can the numbers of this run be trusted, and what do its first rollouts say?

    python train.py --check ...     noise floor, packing, sampler, kernels, a sample with its loss mask; then it ends
    every run of RL                 the noise floor of its first answers, and a sentence for each fault it can see

GSPO ignores changes of the ratio below its clip range, 3e-4 wide. So the first question about a run is how large the
changes are that nobody made. The same answers are scored three times before any update, twice

    in the same micro-batches    the difference is exactly 0; this is how old and new log-probs are made
    as padded rows               other shapes, nothing packed or shared: the same sums in another order. This is the
                                 noise of log(ratio) in this dtype on this machine, and a test of packing as well

A clip range below the 99th percentile of that noise is decided by rounding as soon as weights have moved, because new
weights round anew. `auto_clip` takes K times as much.

With experts two questions more: how many tokens does that rounding send to other ones, and how much of the noise is
left if they go where they went before (--router-replay)?

Reading order: Noise, noise_floor, auto_clip, diagnose, Watch, check.
Lessons: lessons/18_noise_clip_and_length.md, 19_reading_a_run.md       Tests: tests/test_doctor.py
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import HAVE_TRITON, INTERPRETED
from kernels.seq_logprob import token_logprob
from nanogspo import distributed
from nanogspo.config import TrainConfig, resolve
from nanogspo.data import Data
from nanogspo.experience import Experience
from nanogspo.layers.moe import Routing, flips
from nanogspo.model import Transformer, separate
from nanogspo.packing import Example, pack, score
from nanogspo.quant import weight_count
from nanogspo.run.log import RunLog
from nanogspo.sampler import Sampler
from nanogspo.storage.state import Progress
from nanogspo.tokenizer import Tokenizer

ANSWERS, SECONDS = 32, 2.0  # what a run's start spends on its noise floor at most
K, CLIP_LOW = 2.0, 3e-4  # of auto_clip; the paper's range is never made narrower


@dataclasses.dataclass(frozen=True)
class Noise:
    """How far log-probs of the same answers under the same weights lie apart."""

    same: float  # largest difference of a token, same micro-batches
    token: float  # the same between packed and padded
    p50: float  # quantiles of an answer's |log(ratio)|, which is a mean over its tokens, between packed and padded
    p99: float
    answers: int
    length: float  # tokens of an answer, on average
    flipped: float = 0.0  # share of (token, layer) whose experts differ between packed and padded
    by_replay: tuple[float, float] | None = None  # p99 without and with the packed rows' experts in padded rows

    def __str__(self) -> str:
        again = "exactly 0" if self.same == 0 else f"{self.same:.1e}, want exactly 0 (scoring is not deterministic)"
        text = (
            f"noise floor of {self.answers} answers of {self.length:.1f} tokens: scored twice alike {again}, "
            f"packed and padded |log ratio| p50 {self.p50:.1e}, p99 {self.p99:.1e}, of a token {self.token:.1e} at most"
        )
        if self.by_replay is None:
            return text
        without, replayed = self.by_replay
        changed = f"{self.flipped:.2%} of (token, layer) change experts"
        return f"{text}; {changed}, p99 {without:.1e} without and {replayed:.1e} with --router-replay"


# of each example: float32 log-probs of its scored tokens (M,); and, of a model with experts, those that all its tokens
# but the last were sent to, (tokens - 1, L, k)
Scored = tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def packed(model: Transformer, examples: list[Example], max_tokens: int, temperature: float) -> Scored:
    """Examples as training scores them."""
    found, experts, device = {}, {}, model.embed_tokens.weight.device
    for batch in pack(examples, max_tokens=max_tokens):
        routing, index, parents = Routing(separate), batch.index.tolist(), batch.segments.parents
        logp = score(model, batch.to(device), temperature=temperature, linear=routing)[0].cpu()  # (M,)
        found |= dict(zip(index, logp.split(batch.lengths.tolist()), strict=True))
        if routing.experts is not None:
            parts = routing.experts.cpu().split(batch.segments.lengths)  # (tokens of a segment, L, k) each
            own = [s for s in range(len(parts)) if s not in parents]  # not the prompts that several share
            whole = [torch.cat([parts[parents[s]], parts[s]]) if parents[s] >= 0 else parts[s] for s in own]
            experts |= dict(zip(index, whole, strict=True))
    return [found[i] for i in range(len(examples))], [experts[i] for i in range(len(experts))]


@torch.no_grad()
def padded(
    model: Transformer, examples: list[Example], max_tokens: int, temperature: float, before: Sequence[Tensor] = ()
) -> Scored:
    """Examples as rows padded on the right to the longest, max_tokens at a time or one row: dense attention.
    before: the experts to send tokens to, instead of the likeliest."""
    device, T, found, experts = model.embed_tokens.weight.device, max(len(e.tokens) for e in examples), [], []
    rows, how = max(1, max_tokens // T), {"temperature": temperature, "softcap": model.config.final_softcap or None}
    for first in range(0, len(examples), rows):
        part = examples[first : first + rows]
        tokens = torch.tensor([e.tokens + [0] * (T - len(e.tokens)) for e in part], device=device)  # (N, T)
        scored = torch.tensor([e.loss_mask + [False] * (T - len(e.tokens)) for e in part], device=device)  # (N, T)
        fills = [F.pad(x, (0, 0, 0, 0, 0, T - len(x))) for x in before[first : first + rows]]  # (T, L, k) each
        routing = Routing(separate, torch.cat(fills).to(device) if fills else None, replay=True)
        hidden = model(tokens, linear=routing)[:, :-1][scored[:, 1:]]  # (M, C)
        logp = token_logprob(hidden, model.head_weight, tokens[:, 1:][scored[:, 1:]], **how)[0].cpu()  # (M,)
        found += logp.split(scored[:, 1:].sum(1).tolist())
        if routing.experts is not None:
            chosen = routing.experts.cpu().split(T)  # (T, L, k) each
            experts += [x[: len(e.tokens) - 1] for x, e in zip(chosen, part, strict=True)]
    return found, experts


def noise_floor(
    model: Transformer, examples: list[Example], max_tokens: int, temperature: float, replay: bool = False
) -> Noise:
    """Score N examples twice in micro-batches of max_tokens, and once as padded rows; with experts also as padded rows
    whose tokens go where those of the micro-batches went. replay: of these two, that is the run's noise."""
    how = model, examples, max_tokens, temperature
    (one, experts), (again, _), (other, others) = packed(*how), packed(*how), padded(*how)
    ways = [other, padded(*how, experts)[0]] if experts else [other]
    quantiles = [noise_quantiles(one, way) for way in ways]
    facts = largest(one, again), largest(one, ways[replay]), *quantiles[replay], len(one), sum(map(len, one)) / len(one)
    if not experts:
        return Noise(*facts)
    return Noise(*facts, share_of_flips(experts, others), (quantiles[0][1], quantiles[1][1]))


def noise_quantiles(one: list[Tensor], other: list[Tensor]) -> list[float]:
    """p50 and p99 of an answer's |log(ratio)|."""
    apart = torch.stack([(a - b).mean().abs() for a, b in zip(one, other, strict=True)]).sort().values  # (N,)
    return [apart[round(p * (len(apart) - 1))].item() for p in (0.5, 0.99)]


def share_of_flips(one: list[Tensor], other: list[Tensor]) -> float:
    """How many of all pairs of a token and a layer have other experts."""
    return flips(torch.cat(one), torch.cat(other)).float().mean().item()


def largest(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest |difference| of a token."""
    return (torch.cat(one) - torch.cat(other)).abs().max().item()


def auto_clip(p99: float) -> tuple[float, float]:
    """(clip_low, clip_high) that rounding does not decide.

        clip_low = max(3e-4, K p99),  clip_high = 4/3 clip_low,  K = 2

    p99  of the noise of log(ratio): a Noise's

    After an update every weight rounds anew, so an unmoved answer's log(ratio) is as noisy as p99 says: at K = 1 one
    answer in a hundred leaves the range by rounding alone. With K = 2 normal noise, whose p99 is 2.6 standard
    deviations, would have to reach 5.2 of them. 3e-4 and the 4/3 are the GSPO paper's, arXiv:2507.18071.
    """
    low = max(CLIP_LOW, K * p99)
    return low, low * 4 / 3


# ---------------------------------------------------------------------------------------------------------------------
# sentences


def diagnose(
    rows: list[dict], config: TrainConfig, *, usual_lr: float, template: bool, stops: bool, p99: float = 0.0
) -> dict[str, str]:
    """What is wrong with a run, by its rows so far: {fault: a sentence}. "loss" is no fault but a frequent question.

    rows      of metrics.jsonl, RL updates only; a row with "reward_s" is the first of its rollout
    usual_lr  what this model's size takes;  template, stops: whether its tokenizer has a chat template, a stop token
    p99       of the noise of log(ratio); 0: not measured
    """
    c, low = config, min(config.clip_low, config.clip_high)
    talks = bool(c.environment)  # then there are no answers that a warm-up could imitate
    starts = [row for row in rows if "reward_s" in row]
    recent, three = starts[-3:], len(starts) >= 3

    def mean(key: str, of: list[dict] = recent) -> float:
        return sum(row.get(key) or 0.0 for row in of) / max(len(of), 1)

    cut, equal, solved = mean("truncated_frac", recent[-1:]), mean("zero_spread_frac"), mean("exact") > 0.9
    gap, rewards = mean("sampler_gap_mean", recent[-1:]), [row.get("reward") or 0.0 for row in starts]
    nothing = three and not any(row.get("reward") or row.get("reward_std") for row in starts)
    moves = [max(abs(row.get(key, 1.0) - 1) for key in ("ratio_min", "ratio_max")) for row in rows if row not in starts]
    still = three and len(moves) >= 6 and max(moves[-6:]) < 1e-6 and equal < 1 and "ratio_max" in rows[-1]
    first, last = torch.tensor(rewards[:10]), torch.tensor(rewards[-10:])
    error = ((first.var() + last.var()) / 10).sqrt().item() if len(starts) >= 20 else 0.0
    flat = last.mean() - first.mean() < 2 * error if error else three and len(set(rewards[-3:])) == 1
    faults = {
        "lora rate": c.lora_r and c.lr < usual_lr / 5 and
            f"lr {c.lr:.1e} is a rate of full fine-tuning: an adapter hardly moves with it; {usual_lr:.0e} is usual "
            f"here, {usual_lr / c.lr:.0f} times as much",
        "template": not template and c.model != "tiny" and
            "this tokenizer has no chat template: the prompt is given as plain text, which a base model continues "
            "instead of answering; want an instruct model, or prompts that are to be continued",
        "stop": not stops and
            f"this tokenizer names no stop token, so every answer is cut off at {c.max_new_tokens} tokens; want "
            "eos_token_id in its generation_config.json",
        "clip": p99 > low and
            f"the clip range begins at {low:.0e}, below the noise of rounding (p99 {p99:.1e} at this length): rounding "
            "will decide what is clipped; want --clip auto, longer answers or --dtype fp32",
        "equal": starts and not three and not solved and starts[-1].get("zero_spread_frac") == 1.0 and
            "nothing is learned from this rollout: the answers of each group all earned the same; want a reward that "
            "differs between answers, easier problems or a larger --group-size",
        "loss": rows and equal < 1 and abs(rows[0].get("loss") or 0.0) < 0.05 and
            "a loss near 0 is expected: the advantages of a group sum to 0; watch the reward and the ratio",
        "truncated": cut >= 0.99 and stops and
            (f"no episode came to its end within {c.max_turns} turns of {c.max_new_tokens} tokens; want a higher "
             "--max-turns or --max-new-tokens" if talks else
             f"every answer was cut off at {c.max_new_tokens} tokens: the model never says that it has ended; want "
             "its own chat template, --warm-steps 20, or a higher --max-new-tokens"),
        "length": three and 0.3 < mean("truncated_frac") < 0.99 and
            f"{mean('truncated_frac'):.0%} of the answers are cut off at {c.max_new_tokens} tokens, and rewarded as "
            "they are; want a higher --max-new-tokens, or --mask-truncated",
        "no reward": nothing and
            "three rollouts without any reward: there is nothing to compare, so nothing is learned; in a new run try "
            + ("easier goals, a larger model" if talks else
               "--warm-steps 20 (SFT on the task's own answers first), an easier --task-size") +
            ", or, if trunc is near 1, more --max-new-tokens",
        "spread": three and equal >= 0.7 and not solved and not nothing and
            f"{equal:.0%} of the groups have zero spread: their answers all earned the same and teach nothing; want a "
            "larger --group-size, --dynamic-sampling 3, or problems that are neither too hard nor too easy",
        "sampler": gap > (1e-3 if c.dtype == "fp32" else 0.1) and
            f"answers are scored {gap:.1e} nats a token away from how they were sampled, more than {c.dtype} rounds: "
            "another temperature, dropout or other weights in one of the two",
        "reward": flat and not solved and not nothing and
            f"the reward has not moved in {len(starts)} rollouts ({rewards[0]:.2f} to {rewards[-1]:.2f}); want a "
            "higher --lr, or a reward that tells good answers from better ones",
        "ratio": still and
            f"no ratio has left 1 in the last {len(moves[-6:])} updates that could move it: the weights stand still at "
            f"lr {c.lr:.1e}",
        "entropy": three and mean("entropy", rows[-1:]) < 0.1 * mean("entropy", rows[:1]) and not solved
        and mean("reward") <= rewards[0] and
            f"the entropy has fallen from {mean('entropy', rows[:1]):.2f} to {mean('entropy', rows[-1:]):.2g} and the "
            "reward has not risen: answers become alike; want a lower --lr, or --beta 0.01",
    }  # fmt: skip
    return {name: sentence for name, sentence in faults.items() if sentence}


def facts_of(config: TrainConfig, model: Transformer, tokenizer: Tokenizer) -> dict:
    """What `diagnose` wants to know besides the rows."""
    usual = resolve(dataclasses.replace(config, lr=0.0), weight_count(model)).lr
    return {"usual_lr": usual, "template": tokenizer.has_chat_template, "stops": bool(tokenizer.eos_ids)}


@dataclasses.dataclass
class Watch:
    """What the doctor knows of a run of RL, and says once."""

    config: TrainConfig
    facts: dict  # usual_lr, template, stops
    log: RunLog
    progress: Progress
    rows: list[dict]  # RL updates so far
    noise: Noise | None = None

    @classmethod
    def of(cls, config: TrainConfig, model: Transformer, tokenizer: Tokenizer, log: RunLog, progress: Progress):
        return cls(config, facts_of(config, model, tokenizer), log, progress, log.updates(config.algo))

    def measure(self, model: Transformer, rollout: Experience) -> None:
        """The noise floor of the first rollout at hand, and with --clip auto the range for the rest of the run."""
        config, examples = self.config, rollout.examples
        if self.noise or config.algo == "reinforce":
            return
        some = examples[:: max(1, len(examples) // ANSWERS)][:ANSWERS]
        seconds = 3 * sum(len(e.tokens) for e in some) / rollout.times.get("scoring_tokens_per_s", 1e9)
        auto = config.clip == "auto" and not self.progress.clip
        if not auto and seconds > SECONDS:
            self.noise = Noise(0.0, 0.0, 0.0, 0.0, 0, 0.0)
            return self.log.say(f"noise floor not measured: it would take {seconds:.0f} s; --check measures it")
        how = config.micro_batch_tokens, config.temperature, config.router_replay
        measure = functools.partial(noise_floor, model, some, *how)
        self.noise = distributed.first(measure) if auto else measure()
        if auto:
            self.progress.clip, _ = auto_clip(self.noise.p99)
        low, high = self.clip
        note = {"noise_p50": self.noise.p50, "noise_p99": self.noise.p99, "clip_low": low, "clip_high": high}
        note |= {"experts_flipped": self.noise.flipped} if self.noise.by_replay else {}
        self.log.says(self.progress.step, "noise", f"{self.noise}; clip -{low:.1e} / +{high:.1e}", **note)

    @property
    def clip(self) -> tuple[float, float]:
        low = self.progress.clip
        return (low, low * 4 / 3) if low else (self.config.clip_low, self.config.clip_high)

    def look(self, row: dict) -> None:
        """Say what the rows show, with the one of an update just made; each sentence once. SFT is not looked at."""
        if row["algo"] == "sft":
            return
        self.rows.append(row)
        config = dataclasses.replace(self.config, clip_low=self.clip[0], clip_high=self.clip[1])
        p99 = self.noise.p99 if self.noise else 0.0
        for name, sentence in diagnose(self.rows, config, **self.facts, p99=p99).items():
            self.log.says(self.progress.step, name, sentence)


# ---------------------------------------------------------------------------------------------------------------------
# --check


def render(example: Example, tokenizer: Tokenizer, colour: bool) -> str:
    """The text of an example with its loss mask: what is scored is green, or stands between [[ and ]]."""
    begin, end, text, t = ("\033[32m", "\033[0m", "", 0) if colour else ("[[", "]]", "", 0)
    while t < len(example.tokens):
        scored, first = example.loss_mask[t], t
        while t < len(example.tokens) and example.loss_mask[t] == scored:
            t += 1
        part = tokenizer.decode(example.tokens[first:t], False)
        text += begin + part + end if scored else part
    return text


def kernel_gap(model: Transformer, example: Example, temperature: float) -> str:
    """The log-prob kernel of Triton against its reference in torch, on the hidden states of one example."""
    device = model.embed_tokens.weight.device
    if not (HAVE_TRITON and (device.type == "cuda" or INTERPRETED)):
        return "not run: Triton needs a GPU"
    [batch] = pack([example], max_tokens=1)
    batch = batch.to(device)
    with torch.no_grad():
        hidden = model(batch.tokens[None], segments=batch.segments)[0, batch.scored]  # (M, C)
        how = {"temperature": temperature, "softcap": model.config.final_softcap or None}
        one, other = (
            token_logprob(hidden, model.head_weight, batch.targets, backend=b, **how)[0] for b in ("torch", "triton")
        )
    return f"{(one - other).abs().max().item():.1e} a token at most"


def check(config: TrainConfig, data: Data, sampler: Sampler) -> None:
    """Print what --check finds. Nothing is trained and nothing written."""
    model, tokenizer, T, sampled = sampler.model, data.chat.tokenizer, config.temperature, None
    if config.algo == "sft":
        examples, T = [data.sft_example(n) for n in range(min(config.batch_size, ANSWERS))], 1.0
    else:
        problems = [data.task.train_problem(n, config.seed) for n in range(max(1, ANSWERS // config.group_size))]
        samples, _ = sampler.answers(problems, config.group_size, T, 0, lambda complete, tokens: False)
        examples, sampled = [s.example for s in samples], [torch.tensor(s.logp) for s in samples]
        drawn = [s.experts for s in samples if s.experts is not None]
    noise = noise_floor(model, examples, config.micro_batch_tokens, T, config.router_replay)
    print(f"{noise} ({config.dtype} on {config.device})")
    print(f"Triton's log-prob kernel against torch: {kernel_gap(model, examples[0], T)}")
    if sampled:
        low, high = auto_clip(noise.p99)
        one, experts = packed(model, examples, config.micro_batch_tokens, T)
        print(f"sampler against scorer: {largest(one, sampled):.1e} a token at most")
        if experts:
            own = [x[e.loss_mask[1:]] for x, e in zip(experts, examples, strict=True)]  # (sampled tokens, L, k) each
            print(f"sampler against scorer: {share_of_flips(own, drawn):.2%} of (token, layer) change experts")
        print(f"clip -{config.clip_low:.1e} / +{config.clip_high:.1e}; --clip auto would take -{low:.1e} / +{high:.1e}")
    facts = facts_of(config, model, tokenizer)
    for sentence in diagnose([], config, **facts, p99=noise.p99 if sampled else 0.0).values():
        print(sentence)
    colour = sys.stdout.isatty()
    print(f"one sample, its scored tokens {'in green' if colour else 'between [[ and ]]'}:")
    print(render(examples[0], tokenizer, colour))
