"""The recipe: SFT, GRPO and GSPO of a Qwen, Gemma or Llama model, top to bottom.

    python train.py                                             the two-minute tiny run, no GPU, no download
    python train.py --model Qwen/Qwen3-0.6B --algo gspo         LoRA on a real checkpoint
    python train.py --config configs/sft_qwen3_0.6b.yaml --data rows.jsonl

One update of GSPO (arXiv 2507.18071), which is the whole file in six lines:

    sample G answers to each prompt  ->  rewards  ->  advantages: how much better than the rest of the group
    score the answers once, before any update moves a weight                       old log-probs
    for each of the U minibatches:
        ratio = exp((seq_logp - old_seq_logp) / length), one per answer            exactly 1.0 for the first minibatch
        loss  = -mean(min(ratio * A, clip(ratio, 1 - 3e-4, 1 + 4e-4) * A))
        backward, clip the gradient, AdamW

The printed loss is about 0 by construction (the advantages of a group sum to 0); watch the reward and the ratio.

Exit codes: 0 done, or saved after Ctrl-C, SIGTERM or SIGHUP · 2 one line on stderr says what is wrong and what to do ·
130 a second Ctrl-C, or one before the model is loaded · 1 with a traceback: a bug.

Sections: 1 configuration · 2 device, seeds · 3 tokenizer, outline · 4 data · 5 plan, folder, model · 6 optimiser ·
7 resume · 8 the loop · 9 log, evaluate, save.      Lessons: lessons/00_setup.md, lessons/10_gspo.md
"""

import contextlib
import dataclasses
import math
import pathlib
import shlex
import sys
import time

from nanogspo.config import TrainConfig, check, dump, resolve
from nanogspo.program import main

# ---------------------------------------------------------------------------------------------------------------------
# 1. configuration

if __name__ == "__main__":  # flags are read before torch is imported: --help and a wrong flag answer at once
    hint = "lower --micro-batch-tokens or --rollout-rows, or add --gradient-checkpointing on"
    main(__file__, TrainConfig, check, memory=hint)  # runs this file again as a module, calls its `run`, and exits

import torch  # noqa: E402

from kernels.seq_logprob import sequence_sums  # noqa: E402
from nanogspo import checkpoint, lora, planner, tiny  # noqa: E402
from nanogspo.chat import Chat  # noqa: E402
from nanogspo.device import DTYPES, choose_device, choose_dtype  # noqa: E402
from nanogspo.evaluation import count_exact, held_out_loss, sample_answers, split  # noqa: E402
from nanogspo.experience import Experience, experience, sampler_gap  # noqa: E402
from nanogspo.objectives import group_advantages, grpo_loss, gspo_loss, ratio_quantiles, sft_loss  # noqa: E402
from nanogspo.optimizer import Optimizer, learning_rate  # noqa: E402
from nanogspo.packing import Example, pack, score  # noqa: E402
from nanogspo.process import StopRequest, available_memory, peak_memory, run_folder, summary  # noqa: E402
from nanogspo.quant import pack_model, packed_layers, weight_count  # noqa: E402
from nanogspo.rollout import generate  # noqa: E402
from nanogspo.runlog import RunLog, read_rows  # noqa: E402
from nanogspo.storage import state as runstate  # noqa: E402
from nanogspo.storage.state import Progress  # noqa: E402
from nanogspo.tasks import get_task, shuffled  # noqa: E402
from nanogspo.tasks.jsonl import load_jsonl  # noqa: E402
from nanogspo.tokenizer import Tokenizer, load_tokenizer  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run with one algorithm: the SFT warm-up, the main part, the control."""

    name: str  # of its rows in metrics.jsonl: sft, gspo, grpo, control
    algo: str
    steps: int
    lr: float
    seconds: float = float("inf")  # the control stops by the clock
    until: float = 1.1  # the warm-up stops at this share of right answers


def run(config: TrainConfig) -> None:
    # -----------------------------------------------------------------------------------------------------------------
    # 2. device, seeds

    check(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, torch.float32 if config.model == "tiny" else torch.bfloat16)
    config = resolve(dataclasses.replace(config, device=device, dtype=dtype))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    task = None if config.data else get_task(config.task, config.task_size or None)
    with contextlib.ExitStack() as held:
        train(config, task, held)


def train(config: TrainConfig, task, held: contextlib.ExitStack) -> None:
    """Sections 3 to 9. held: what to close at the end, however that comes: the run's folder and its log."""
    started = time.perf_counter()

    # -----------------------------------------------------------------------------------------------------------------
    # 3. tokenizer, and the model's outline: shapes without numbers

    dtype, quant = DTYPES[config.dtype], None if config.quant == "none" else config.quant
    if config.adapter:  # named wrongly, it is said before a model is fetched
        checkpoint.resolve(config.adapter, want="adapter")
    if config.model == "tiny":
        if task is None:
            raise ValueError("got --model tiny with --data: its vocabulary is one task's alphabet; want a real --model")
        tokenizer, raw = tiny.describe(task.characters)
    else:
        files = checkpoint.resolve(config.model, want="config")
        tokenizer, raw = load_tokenizer(files), checkpoint.read_config(files)
    outline = planner.outline(raw, dtype, quant)
    if packed_layers(outline) and not config.lora_r:
        raise ValueError(f"got --lora-r 0 with {config.model}, whose weights are packed in 4 bits; want --lora-r 16")
    config = resolve(config, weight_count(outline))
    adapt(outline, config)
    ranks = sorted({layer.r for layer in lora.lora_layers(outline).values()})
    if config.adapter and ranks != [config.lora_r]:
        rank = ", ".join(map(str, ranks))
        print(f"{config.adapter}: an adapter of rank {rank}, so --lora-r {config.lora_r} is not used")
        config = dataclasses.replace(config, lora_r=ranks[-1])
    chat = Chat(tokenizer, {} if config.thinking == "auto" else {"enable_thinking": config.thinking == "on"})

    # -----------------------------------------------------------------------------------------------------------------
    # 4. data

    if config.data:
        limit, name = min(
            (config.max_length, "--max-length"), (outline.config.max_positions, "max_position_embeddings")
        )
        rows, too_long = load_jsonl(config.data, tokenizer, max_length=limit, template_kwargs=chat.template_kwargs)
        if too_long:
            lines = ", ".join(map(str, too_long[:20])) + (", ..." if len(too_long) > 20 else "")
            print(f"left out {len(too_long)} rows longer than {limit} tokens ({name}): lines {lines}")

        beyond = [row.line for row in rows if max(row.tokens) >= outline.config.vocab_size]
        if beyond:
            V = outline.config.vocab_size
            raise ValueError(f"{config.data}:{beyond[0]}: got token ids beyond the model's {V}; want its own tokenizer")

        config, rows, held_out = split(config, rows)

        def sft_example(n: int) -> Example:
            epoch, i = divmod(n, len(rows))
            return rows[shuffled(len(rows), f"{config.seed}-{epoch}")[i]]

        longest_prompt = max(len(row.tokens) for row in rows)
    else:

        def sft_example(n: int) -> Example:
            return chat.demonstration(task.train_problem(n, config.seed + SFT_STREAM))

        longest_prompt = max(len(chat.prompt(task.train_problem(n, config.seed))) for n in range(50))
        if longest_prompt + config.max_new_tokens > outline.config.max_positions:
            raise ValueError(
                f"got prompts of {longest_prompt} tokens + --max-new-tokens {config.max_new_tokens}, "
                f"want at most {outline.config.max_positions} together (max_position_embeddings)"
            )
        longest_answer = max(sum(sft_example(n).loss_mask) for n in range(50))
        if longest_answer > config.max_new_tokens:
            raise ValueError(
                f"got --max-new-tokens {config.max_new_tokens} for answers of up to {longest_answer} tokens; "
                f"want at least {longest_answer}"
            )
        held_out = []
    problems = task.held_out(config.eval_size) if task and config.eval_size else []

    # -----------------------------------------------------------------------------------------------------------------
    # 5. the plan; then folder, model, adapter

    free = available_memory(config.device)
    config = planner.decide_checkpointing(config, outline, longest_prompt, free)
    print(planner.plan(config, outline, longest_prompt))
    parts = planner.memory_parts(config, outline, longest_prompt)
    refused = planner.too_large(parts, free, planner.ESTIMATES)
    if refused and not config.plan_only and not config.ignore_memory_plan:
        raise ValueError(f"{refused}; or --ignore-memory-plan")
    if note := refused or planner.too_large(parts, free):
        print(f"  {note}")
    if config.plan_only:
        return
    folder = held.enter_context(run_folder(config))
    if config.model == "tiny":
        _, model = tiny.build(task.characters, seed=config.seed)
        model.to(config.device, dtype)
        if quant:
            pack_model(model, quant)
    else:
        model = checkpoint.load(config.model, device=config.device, dtype=dtype, quant=quant)
    adapt(model, config)
    model.train()
    model.gradient_checkpointing = config.gradient_checkpointing == "on"

    # -----------------------------------------------------------------------------------------------------------------
    # 6. optimiser and schedule

    warm_steps = 0 if config.algo == "sft" else config.warm_steps
    phases = [Phase("sft", "sft", warm_steps, config.warm_lr, until=config.warm_until)] if warm_steps else []
    phases.append(Phase(config.algo, config.algo, config.steps, config.lr))
    if config.control and warm_steps:  # SFT instead of RL, for as long as RL took (known when RL has ended)
        phases.append(Phase("control", "sft", sys.maxsize, config.warm_lr))
    elif config.control and config.algo != "sft":
        print("  no control: it continues the SFT of a warm-up, and this run has none (--warm-steps 0)")
    optimizer = Optimizer(model, weight_decay=config.weight_decay)

    # -----------------------------------------------------------------------------------------------------------------
    # 7. resume

    progress, rollout, changed = Progress(), None, []
    state, warm = folder / "state" / "state.safetensors", folder / "state" / "warm.safetensors"
    made_of = runstate.inputs(config)
    if config.resume:
        progress, rollout, changed = runstate.resume(state, config, made_of, model, optimizer, len(phases))
        print(f"resumed {folder} after update {progress.step}")
    log = held.enter_context(
        RunLog(
            folder,
            steps=warm_steps + config.steps,
            resume_step=progress.step if config.resume else None,
            clip_range=(config.clip_low, config.clip_high),
        )
    )
    checkpoint.atomic_write(folder / "config.yaml", dump(config))

    def save_state() -> None:
        at_hand = rollout.state() if progress.update else None
        runstate.save_state(state, model, optimizer, dataclasses.asdict(progress), at_hand, made_of)

    def evaluate(name: str, last: bool = False) -> None:
        """Stopped in the middle it logs nothing, and the resumed run makes it anew."""
        where = {"step": progress.step, "phase": name}
        if log.has(**where, eval_count=config.eval_size):  # killed after this row
            return
        if held_out:
            loss, accuracy = held_out_loss(model, held_out, config, stop)
            answers = sample_answers(model, chat, held_out, config, log.sampling(3, stop)) if last else []
            if not stop:
                log.answers(progress.step, answers)
                log.held_out(**where, loss=loss, accuracy=accuracy, count=config.eval_size)
        if problems:
            right = count_exact(model, chat, task, problems, config, log.sampling(len(problems), stop))
            if not stop:
                log.evaluation(**where, successes=right, count=config.eval_size)

    # -----------------------------------------------------------------------------------------------------------------
    # 8. the loop

    stop, proved = StopRequest(), False
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    if changed:
        log.changed(progress.step, changed)
        save_state()  # from now on the run is made of these
    if progress.step == 0:
        evaluate("start")
    while progress.phase < len(phases) and not stop:
        phase, phase_started = phases[progress.phase], time.perf_counter()
        while progress.phase_step < phase.steps and not progress.phase_done and not stop:
            if time.perf_counter() - phase_started >= phase.seconds:
                break
            done = progress.phase_step
            if phase.until <= 1 and done and done % PROBE_EVERY == 0:
                probe = [task.train_problem(n, config.seed + PROBE_STREAM) for n in range(config.warm_probe)]
                right = count_exact(model, chat, task, probe, config, log.sampling(len(probe), stop))
                progress.phase_done = not stop and right >= phase.until * len(probe)  # groups are mixed enough for RL
            if config.eval_every and done and done % config.eval_every == 0 and not progress.phase_done:
                evaluate(phase.name)
            if stop or progress.phase_done:
                break
            began = time.perf_counter()
            lr = learning_rate(
                progress.phase_step,
                peak=phase.lr,
                warmup=config.warmup_updates,
                total=phase.steps,
                schedule=config.lr_schedule,
            )
            # (weight, facts) of each micro-batch; the weights of an update sum to 1. GRPO's ratios are tokens'
            metrics, ratios, log_ratios = [], [], []

            if phase.algo == "sft":
                draws = range(progress.sft_cursor, progress.sft_cursor + config.batch_size)
                batches = pack([sft_example(n) for n in draws], max_tokens=config.micro_batch_tokens)
                total = sum(len(batch.targets) for batch in batches)
                for batch in batches:
                    batch = batch.to(config.device)
                    logp, entropy, right = score(model, batch)  # (S,), (S,), (S,)
                    loss, facts = sft_loss(logp)
                    weight = len(logp) / total  # SFT averages over tokens
                    (loss * weight).backward()
                    optimizer.accumulate()
                    facts |= {"loss": loss, "entropy": entropy.mean(), "token_accuracy": right.float().mean()}
                    metrics.append((weight, facts))
                progress.sft_cursor += config.batch_size

            else:
                if progress.update == 0:
                    on_step = log.sampling(config.prompts_per_rollout * config.group_size, stop)
                    rollout = sample_rollout(model, chat, task, config, progress, on_step, score_first=not proved)
                    if rollout is None:  # stopped: nothing has changed since the last update, and that is what is saved
                        break
                    log.samples(rollout.samples)
                    progress.rl_cursor += config.prompts_per_rollout
                batches, old = rollout.minibatches[progress.update], rollout.old_logp[progress.update]
                trained = sum(len(batch.index) for batch in batches)
                items = trained if phase.algo == "gspo" else sum(len(batch.targets) for batch in batches)
                share = trained / (len(rollout.examples) // config.updates_per_rollout)  # the others' gradient is 0
                for batch, old_logp in zip(batches, old, strict=True):
                    A = rollout.advantages[batch.index].to(config.device)  # (N,)
                    batch = batch.to(config.device)
                    logp, entropy, _ = score(model, batch, temperature=config.temperature)  # (S,), (S,), (S,)
                    old_logp = logp.detach() if old_logp is None else old_logp.to(config.device)  # (S,)
                    if phase.algo == "gspo":  # one ratio per answer
                        seq_logp = sequence_sums(logp, batch.cu_seqlens)  # (N,)
                        old_seq_logp = sequence_sums(old_logp, batch.cu_seqlens)  # (N,)
                        loss, facts = gspo_loss(seq_logp, old_seq_logp, batch.lengths, A, **clip)
                        log_ratios.append((seq_logp.detach() - old_seq_logp) / batch.lengths)  # (N,)
                    else:  # grpo: one ratio per token
                        loss, facts = grpo_loss(logp, old_logp, batch.cu_seqlens, A, **clip)
                        log_ratios.append(logp.detach() - old_logp)  # (S,)
                    weight, loss = len(batch.index) / trained, loss * share  # both average over answers, of all
                    (loss * weight).backward()
                    optimizer.accumulate()
                    entropy = (sequence_sums(entropy, batch.cu_seqlens) / batch.lengths).mean()  # over answers, too
                    metrics.append((weight, {"loss": loss, "entropy": entropy, "trained_frac": share}))
                    ratios.append((len(log_ratios[-1]) / items, facts))
                facts = combine(ratios)
                if progress.update == 0:
                    if not facts["ratio_min"] == facts["ratio_max"] == 1.0:
                        raise AssertionError(
                            f"first update of a rollout: ratios in [{facts['ratio_min']!r}, {facts['ratio_max']!r}], "
                            "want exactly 1.0; old and new log-probs were not scored the same way"
                        )
                    proved = True  # the two passes agree to the last bit: later rollouts need only one
                progress.update = (progress.update + 1) % config.updates_per_rollout

            norm = optimizer.step(lr, config.grad_clip)
            progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1

            # ---------------------------------------------------------------------------------------------------------
            # 9. log, evaluate, save

            seconds = time.perf_counter() - began
            row = {
                "step": progress.step,
                "algo": phase.algo,
                "phase": phase.name,
                **combine(metrics),
                **combine(ratios),
            }
            row |= {} if phase.algo == "sft" else rollout.facts | ratio_quantiles(log_ratios)
            row |= {"grad_norm": norm.item(), "lr": lr, "step_s": seconds, "peak_mem_bytes": peak_memory(config.device)}
            log.step(row | {"tokens_per_s": sum(len(batch.tokens) for batch in batches) / seconds})
            if phase.name != "control" and progress.step % config.save_every == 0:
                save_state()

        if not stop:
            if phase.name != "control":  # which a resumed run makes anew
                save_state()  # first, because an evaluation may take longer than a cluster waits after SIGTERM
            evaluate(phase.name, last=phase is phases[-1])
        if stop or phase is phases[-1]:
            break
        if phases[progress.phase + 1].name != "control":
            runstate.save_state(warm, model, optimizer, dataclasses.asdict(progress), None, made_of)
            optimizer = Optimizer(model, weight_decay=config.weight_decay)
        else:  # the RL result is kept; then back to the end of the warm-up, its optimiser included
            save_weights(model, tokenizer, config, folder)
            optimizer = Optimizer(model, weight_decay=config.weight_decay)
            saved, _ = runstate.load_state(warm, model, optimizer)
            progress.sft_cursor = saved["sft_cursor"]
            spent = sum(row["step_s"] for row in read_rows(folder / "metrics.jsonl") if row.get("algo") == config.algo)
            phases[-1] = dataclasses.replace(phases[-1], seconds=spent)
        progress.phase, progress.phase_step, progress.phase_done = progress.phase + 1, 0, False

    if phases[progress.phase].name != "control":
        if stop:
            save_state()
        save_weights(model, tokenizer, config, folder)
    picture = log.draw()
    log.close()
    if stop:
        print(
            f"stopped after update {progress.step}; continue with: python train.py --resume {shlex.quote(str(folder))}"
        )
    else:
        example = task and (problems or [task.train_problem(0, config.seed)])[0]
        if example:
            example = example.messages[-1]["content"] if tokenizer.has_chat_template else example.text
        print(summary(config, folder, picture, example, time.perf_counter() - started))


# ---------------------------------------------------------------------------------------------------------------------
# what the recipe calls, in the order it calls it

# seeds apart from the rollouts' own: three different orders of the training problems
SFT_STREAM, PROBE_STREAM = 1_000_000, 2_000_000
PROBE_EVERY = 5  # updates; the share climbs by about 1 % an update once it moves, so look often


def adapt(model, config: TrainConfig) -> None:
    """Add the adapter to train: the one from --adapter, or a fresh one; with --lora-r 0, none."""
    if config.adapter:
        checkpoint.load_adapter(model, config.adapter, dropout=config.lora_dropout)
    elif config.lora_r:
        lora.add_lora(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            targets=[t.strip() for t in config.lora_targets.split(",") if t.strip()],
            dropout=config.lora_dropout,
            seed=config.seed,
        )


def sample_rollout(
    model, chat: Chat, task, config: TrainConfig, progress: Progress, on_step, *, score_first: bool
) -> Experience | None:
    """Prompts -> answers -> rewards -> advantages -> micro-batches -> old log-probs. None if on_step ended it early."""
    problems = [task.train_problem(progress.rl_cursor + i, config.seed) for i in range(config.prompts_per_rollout)]
    prompts = [chat.prompt(p) for p in problems]
    answers = generate(
        model,
        prompts,
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        eos_ids=chat.tokenizer.eos_ids,
        seed=config.seed,
        first_prompt=progress.rl_cursor,
        max_rows=config.rollout_rows,
        on_step=on_step,
    )
    if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):
        return None
    asked = [problems[a.prompt_index] for a in answers]
    texts = [chat.text(a.tokens) for a in answers]
    rewards = [task.reward(p, text) for p, text in zip(asked, texts, strict=True)]
    table = torch.tensor(rewards).view(-1, config.group_size)  # (P, G)
    advantages = group_advantages(table, divide_by_std=config.divide_by_std).flatten()  # (N,)
    examples = [Example.answered(prompts[a.prompt_index], a.tokens) for a in answers]
    rollout = experience(
        model,
        examples,
        advantages,
        updates=config.updates_per_rollout,
        max_tokens=config.micro_batch_tokens,
        temperature=config.temperature,
        device=config.device,
        score_first=score_first,
    )
    N = len(answers)
    rollout.facts = {
        "reward": table.mean().item(),
        "reward_std": table.std(dim=1).mean().item(),
        "exact": sum(task.exact(p, text) for p, text in zip(asked, texts, strict=True)) / N,
        "zero_spread_frac": (table.amax(1) == table.amin(1)).float().mean().item(),
        "truncated_frac": sum(not a.finished for a in answers) / N,
        "answer_len": sum(len(a.tokens) for a in answers) / N,
        "sampler_gap_max": sampler_gap(rollout, [a.logp for a in answers]),
    }
    read = [chat.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    for a, text, reward, A in zip(answers, texts, rewards, advantages.tolist(), strict=True):
        row = {"step": progress.step + 1, "prompt": read[a.prompt_index], "answer": text, "reward": reward}
        rollout.samples.append(row | {"advantage": A, "truncated": not a.finished, "length": len(a.tokens)})
    return rollout


def combine(metrics: list[tuple[float, dict]]) -> dict[str, float]:
    """Metrics of an update from those of its micro-batches: minima, maxima, and weighted means of the rest."""
    out = {}
    for key in metrics[0][1] if metrics else ():
        values = [(weight, float(torch.as_tensor(facts[key]).detach())) for weight, facts in metrics]
        if key.endswith(("_min", "_max")):
            out[key] = (min if key.endswith("_min") else max)(v for _, v in values)
        else:
            out[key] = sum(w * v for w, v in values)
    if "ratio_std" in out:  # of the whole update: mean square minus squared mean
        squares = (w * (float(facts["ratio_std"]) ** 2 + float(facts["ratio_mean"]) ** 2) for w, facts in metrics)
        out["ratio_std"] = max(0.0, sum(squares) - out["ratio_mean"] ** 2) ** 0.5
    if "perplexity" in out:
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
    return out


def save_weights(model, tokenizer: Tokenizer, config: TrainConfig, folder: pathlib.Path) -> None:
    """adapter/ in PEFT's format for LoRA, model/ for full fine-tuning; both with --save-merged."""
    if config.lora_r:
        checkpoint.save_adapter(model, folder / "adapter", base=config.model)
    if config.save_merged and packed_layers(model):
        print(f"{folder / 'model'}: the sum of unpacked weights and adapter, saved as {config.dtype}")
    if config.save_merged or not config.lora_r or config.model == "tiny":  # whose base is saved nowhere else
        checkpoint.save(model, folder / "model", tokenizer=tokenizer)
