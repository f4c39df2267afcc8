"""The recipe: SFT, GRPO and GSPO of a Qwen, Gemma or Llama model, top to bottom.

    python train.py                                             the two-minute tiny run, no GPU, no download
    python train.py --model Qwen/Qwen3-0.6B --algo gspo         LoRA on a real checkpoint
    python train.py --config configs/sft_qwen3_0.6b.yaml --data rows.jsonl

One rollout of GSPO (arXiv 2507.18071) and its U updates, which is the whole file in six lines:

    sample G answers to each prompt  ->  rewards  ->  advantages: (reward - mean) / std of the group
    score the answers, before any update moves a weight                            old log-probs
    for each of the U minibatches:
        ratio = exp((seq_logp - old_seq_logp) / length), one per answer            exactly 1.0 for the first minibatch
        loss  = -mean(min(ratio * A, clip(ratio, 1 - 3e-4, 1 + 4e-4) * A))
        backward, clip the gradient, AdamW

The printed loss is about 0 by construction (the advantages of a group sum to 0); watch the reward and the ratio.

Exit codes: 0 done, or saved after Ctrl-C, SIGTERM or SIGHUP · 2 one line on stderr says what is wrong and what to do ·
130 a second Ctrl-C, or one before the model is loaded · 1 with a traceback: a bug.

Letters: P prompts, G answers to each; N answers of a micro-batch, M their scored tokens; A advantages.
Reading order: run, set_up, phases_of, Trainer: loop, run_phase, update, sft_update, rl_update, and what they call.
Lessons: lessons/00_setup.md, lessons/12_gspo.md
"""

import contextlib
import dataclasses
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence

from nanogspo.config import TrainConfig, check, dump, resolve
from nanogspo.run import program

if __name__ == "__main__":  # flags are read before torch is imported: --help and a wrong flag answer at once
    hint = "lower --micro-batch-tokens or --rollout-rows, or add --gradient-checkpointing on"
    # runs this file again as a module, calls its `run`, and exits
    program.main(__file__, TrainConfig, check, memory=hint)

import torch  # noqa: E402

from kernels.seq_logprob import sequence_sums  # noqa: E402
from nanogspo import checkpoint, policy  # noqa: E402
from nanogspo.data import Data, Given, choose_judges, choose_task, read_data  # noqa: E402
from nanogspo.device import choose_device, choose_dtype  # noqa: E402
from nanogspo.evaluation import examine, held_out_loss, sample_answers  # noqa: E402
from nanogspo.experience import Experience  # noqa: E402
from nanogspo.objectives import combine, kl_to_reference, policy_loss, ratio_quantiles, sft_loss  # noqa: E402
from nanogspo.optimizer import Optimizer, learning_rate  # noqa: E402
from nanogspo.packing import MicroBatch, pack, score  # noqa: E402
from nanogspo.reference import freeze, reference  # noqa: E402
from nanogspo.run import curves, planner  # noqa: E402
from nanogspo.run.log import RunLog, read_rows, summary  # noqa: E402
from nanogspo.run.process import StopRequest, available_memory, peak_memory, run_folder, signals_kept  # noqa: E402
from nanogspo.sampler import Sampler  # noqa: E402
from nanogspo.storage import state as runstate  # noqa: E402
from nanogspo.storage.state import Progress  # noqa: E402
from nanogspo.tasks.base import Task  # noqa: E402

PROBE_EVERY = 5  # updates; the fraction of right answers climbs by about 1 % an update once it moves, so look often


def run(
    config: TrainConfig,
    *,
    task: Task | None = None,
    rewards: Sequence[Callable] = (),
    weights: Sequence[float] = (),
    environment: object | None = None,
) -> tuple[pathlib.Path, dict] | None:
    """One run, from a configuration to saved weights. Bad input raises ValueError.

    task         an object with the members of nanogspo.tasks.base.Task, instead of --task and --data
    rewards      functions, instead of --reward; weights: one number for each, 1 if left out
    environment  a class, or an object that is copied for each episode, instead of --environment
    returns      (the run's folder, the last value of everything in metrics.jsonl); None with plan_only
    """
    with signals_kept(), contextlib.ExitStack() as held:  # the run's folder and log are closed however the run ends
        trainer = set_up(config, held, Given(task, rewards, weights, environment))
        if not trainer:
            return None
        trainer.loop()
        return trainer.finish()


def set_up(config: TrainConfig, held: contextlib.ExitStack, given: Given) -> "Trainer | None":
    """Everything before the first update. What is cheap to check comes first: no weights are read and no folder is made
    for a run that is refused. None with --plan-only."""
    started = time.perf_counter()
    # device, seeds
    config = dataclasses.replace(config, **given.settings(config))
    check(config, judged=bool(given.rewards))
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, torch.float32 if config.model == "tiny" else torch.bfloat16)
    config = resolve(dataclasses.replace(config, device=device, dtype=dtype))
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    # tokenizer, the model's outline (shapes without numbers), data, memory
    task = given.task or choose_task(config)
    config, tokenizer, outline = policy.describe(config, task)
    config, data = read_data(config, task, tokenizer, outline.config)
    config = planner.approve(config, outline, data.longest_prompt, available_memory(config.device))
    if config.plan_only:
        return None
    judges = choose_judges(config, data, outline.config, given, held)
    # folder, model, optimiser
    folder = held.enter_context(run_folder(config))
    model = policy.build(config, task)
    phases = phases_of(config)
    if config.control and config.algo != "sft" and not config.warm_steps:
        print("  no control: it continues the SFT of a warm-up, and this run has none (--warm-steps 0)")
    optimizer = Optimizer(model, weight_decay=config.weight_decay)
    # resume, log
    progress, rollout, changed, frozen = Progress(), None, [], {}
    inputs = runstate.inputs(config, given.task, *given.rewards, given.environment)
    if config.resume:
        state = folder / "state" / "state.safetensors"
        progress, rollout, changed = runstate.resume(state, config, inputs, model, optimizer, len(phases))
        frozen = runstate.load_frozen(state, model)
        program.state = state
        print(f"resumed {folder} after update {progress.step}")
    steps = sum(phase.steps for phase in phases if phase.name != "control")
    log = held.enter_context(RunLog(folder, steps=steps, resume_step=progress.step if config.resume else None))
    checkpoint.atomic_write(folder / "config.yaml", dump(config))
    sampler, state = Sampler(model, data.chat, data.task, config, *judges), (progress, rollout, frozen, inputs)
    trainer = Trainer(config, data, sampler, model, optimizer, phases, *state, folder, log, started)
    if changed:
        log.changed(progress.step, changed)
        trainer.save_state()  # from now on the run is made of these
    return trainer


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the run with one algorithm: the SFT warm-up, the main part, the control."""

    name: str  # of its rows in metrics.jsonl: sft, gspo, grpo, control
    algo: str
    steps: int
    lr: float
    seconds: float = float("inf")  # the control stops by the clock
    until: float = 1.1  # the warm-up stops at this fraction of right answers; above 1: never


def phases_of(config: TrainConfig) -> list[Phase]:
    """What the run consists of. Warm-up and control belong to RL; a control continues a warm-up, so it needs one."""
    main = Phase(config.algo, config.algo, config.steps, config.lr)
    if config.algo == "sft" or not config.warm_steps:
        return [main]
    warm_up = Phase("sft", "sft", config.warm_steps, config.warm_lr, until=config.warm_until)
    # SFT instead of RL, for as long as RL took, which is known when RL has ended
    control = Phase("control", "sft", sys.maxsize, config.warm_lr)
    return [warm_up, main, control] if config.control else [warm_up, main]


@dataclasses.dataclass
class Trainer:
    """A run between set_up and finish: what it trains, where it stands, and the loop."""

    config: TrainConfig
    data: Data
    sampler: Sampler  # where answers come from
    model: torch.nn.Module
    optimizer: Optimizer
    phases: list[Phase]
    progress: Progress
    rollout: Experience | None  # the one at hand, while progress.update > 0
    frozen: dict[str, torch.Tensor]  # the policy at the start of RL, where --beta needs a copy of it
    inputs: dict  # what the run is made of: storage.state.inputs
    folder: pathlib.Path
    log: RunLog
    started: float
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)
    proved: bool = False  # True once separately scored old log-probs have given ratios of exactly 1; not saved

    def loop(self) -> None:
        """Phase after phase, from where the run stands; ends early when asked to stop."""
        if self.progress.step == 0:
            self.evaluate("start")
        while not self.stop:
            phase, last = self.phases[self.progress.phase], self.progress.phase == len(self.phases) - 1
            self.run_phase(phase)
            if self.stop:
                return
            if phase.name != "control":  # which a resumed run makes anew
                self.save_state()  # first, because an evaluation may take longer than a cluster waits after SIGTERM
            self.evaluate(phase.name, last)
            if self.stop or last:
                return
            self.next_phase()

    def run_phase(self, phase: Phase) -> None:
        """Updates until the phase is over: its steps are done, its time is up, or enough answers are right."""
        progress, config, started = self.progress, self.config, time.perf_counter()
        while progress.phase_step < phase.steps and not progress.phase_done and not self.stop:
            if time.perf_counter() - started >= phase.seconds:
                return
            done = progress.phase_step
            if phase.until <= 1 and done and done % PROBE_EVERY == 0:
                probe = self.data.probe(config.warm_probe)
                right, _ = self.examine(probe)
                progress.phase_done = not self.stop and right >= phase.until * len(probe)  # groups are mixed enough
            if config.eval_every and done and done % config.eval_every == 0 and not progress.phase_done:
                self.evaluate(phase.name)
            if self.stop or progress.phase_done or self.no_better(phase.name):
                return
            self.update(phase)

    def update(self, phase: Phase) -> None:
        """One update: losses and gradients, AdamW, a row for the log. Nothing when stopped while it samples."""
        began, progress, config = time.perf_counter(), self.progress, self.config
        schedule = {"warmup": config.warmup_updates, "total": phase.steps, "schedule": config.lr_schedule}
        lr = learning_rate(progress.phase_step, peak=phase.lr, **schedule)
        if phase.algo == "sft":
            facts, batches = self.sft_update()
        else:
            if progress.update == 0 and not self.new_rollout():
                return  # the state is still that of the last update, so it can be saved
            facts, batches = self.rl_update(phase.algo)
        norm = self.optimizer.step(lr, config.grad_clip)
        progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1
        seconds = time.perf_counter() - began
        row = {"step": progress.step, "algo": phase.algo, "phase": phase.name}
        row |= facts | row  # whatever name a reward function logs under
        row |= {"grad_norm": norm.item(), "lr": lr, "step_s": seconds, "peak_mem_bytes": peak_memory(config.device)}
        self.log.step(row | {"tokens_per_s": sum(len(batch.tokens) for batch in batches) / seconds})
        if phase.name != "control" and progress.step % config.save_every == 0:
            if config.keep_saves:  # before the state: a run that is killed in between does this update again
                where = self.folder / "saves", self.data.chat.tokenizer
                policy.keep_last(config.keep_saves, progress.step, self.model, config, *where)
            self.save_state()

    def sft_update(self) -> tuple[dict[str, float], list[MicroBatch]]:
        """The gradient of the mean loss over all scored tokens of a batch of examples."""
        config, cursor = self.config, self.progress.sft_cursor
        examples = [self.data.sft_example(n) for n in range(cursor, cursor + config.batch_size)]
        batches = pack(examples, max_tokens=config.micro_batch_tokens)
        total, metrics = sum(len(batch.targets) for batch in batches), []
        for batch in batches:
            batch = batch.to(config.device)
            logp, entropy, right = score(self.model, batch)  # (M,), (M,), (M,)
            loss, facts = sft_loss(logp)
            weight = len(logp) / total  # the weights of an update sum to 1
            (loss * weight).backward()
            self.optimizer.accumulate()
            facts |= {"loss": loss, "entropy": entropy.mean(), "token_accuracy": right.float().mean()}
            metrics.append((weight, facts))
        self.progress.sft_cursor += config.batch_size
        return combine(metrics), batches

    def new_rollout(self) -> bool:
        """Sample answers and score them: minibatches 2 to U always, the first only until its ratios are `proved`.
        False when stopped meanwhile: the answers are thrown away."""
        config, progress = self.config, self.progress
        self.frozen = self.frozen or freeze(self.model, config)
        self.rollout = self.sampler.rollout(
            first_problem=progress.rl_cursor,
            step=progress.step + 1,
            score_first=not self.proved,
            on_step=self.log.sampling(config.prompts_per_rollout * config.group_size, self.stop),
            reference=reference(self.model, self.frozen) if config.beta else None,
        )
        if self.rollout is None:
            return False
        self.log.samples(self.rollout.samples)
        progress.rl_cursor += config.prompts_per_rollout * self.rollout.facts["sampling_rounds"]
        return True

    def rl_update(self, algo: str) -> tuple[dict[str, float], list[MicroBatch]]:
        """The gradient of the objective over one minibatch of the rollout at hand."""
        config, rollout, update = self.config, self.rollout, self.progress.update
        batches = rollout.minibatches[update]
        trained = sum(len(batch.index) for batch in batches)
        # answers without an advantage are not scored: their gradient is 0, and they count in the average
        weights, trained_fraction = rollout.weights(update, config.loss_average, config.max_new_tokens)
        advantages = rollout.advantages.nan_to_num() * weights
        of_answers = algo in ("gspo", "reinforce")  # the ratios; else of tokens
        ratios_total = trained if of_answers else sum(len(batch.targets) for batch in batches)
        metrics, ratios, log_ratios = [], [], []
        for batch, old_logp, ref_logp in zip(batches, rollout.old_logp[update], rollout.ref_logp[update], strict=True):
            A, w = (x[batch.index].to(config.device, non_blocking=True) for x in (advantages, weights))  # (N,), (N,)
            batch = batch.to(config.device)
            logp, entropy, _ = score(self.model, batch, temperature=config.temperature)  # (M,), (M,), (M,)
            # None: no weight has moved yet, so this forward pass is also the old one
            old_logp = logp.detach() if old_logp is None else old_logp.to(config.device)  # (M,)
            clip, terms = {"clip_low": config.clip_low, "clip_high": config.clip_high}, {}
            loss, facts, log_ratio = policy_loss(algo, logp, old_logp, batch.cu_scored, A, **clip)
            if config.beta:
                terms["kl"] = kl_to_reference(logp, ref_logp.to(config.device), batch.cu_scored, w)
                loss = loss + config.beta * terms["kl"]
            weight, loss = len(batch.index) / trained, loss * trained_fraction  # the average over all answers
            (loss * weight).backward()
            self.optimizer.accumulate()
            entropy = (sequence_sums(entropy, batch.cu_scored) / batch.lengths).mean()  # over answers, too
            metrics.append((weight, {"loss": loss, "entropy": entropy, **terms}))
            ratios.append((len(log_ratio) / ratios_total, facts))
            log_ratios.append(log_ratio)
        facts = combine(metrics, ratios, [(1.0, ratio_quantiles(log_ratios))])
        if update == 0:
            if not facts["ratio_min"] == facts["ratio_max"] == 1.0:
                raise AssertionError(
                    f"first update of a rollout: ratios in [{facts['ratio_min']!r}, {facts['ratio_max']!r}], "
                    "want exactly 1.0; old and new log-probs were not scored the same way"
                )
            self.proved = True  # the two passes agree to the last bit: later rollouts need only one
        self.progress.update = (update + 1) % config.updates_per_rollout
        return rollout.facts | facts | {"trained_frac": trained_fraction}, batches

    def examine(self, problems: list) -> tuple[int, dict[str, float]]:
        on_step = self.log.sampling(len(problems), self.stop)
        return examine(self.sampler, problems, on_step, self.progress.step)

    def evaluate(self, name: str, last: bool = False) -> None:
        """Held-out problems or rows. Stopped in the middle it logs nothing, and the resumed run makes it anew."""
        config, data, log = self.config, self.data, self.log
        where = {"step": self.progress.step, "phase": name}
        if log.has(**where, eval_count=config.eval_size):  # already logged: the run was killed after this row
            return
        if data.held_out:
            loss, accuracy = held_out_loss(self.model, data.held_out, config, self.stop)
            on_step = log.sampling(3, self.stop)
            answers = sample_answers(self.model, data.chat, data.held_out, config, on_step) if last else []
            if not self.stop:
                self.keep_best(name, -loss)
                log.answers(self.progress.step, answers)
                log.held_out(**where, loss=loss, accuracy=accuracy, count=config.eval_size)
        if data.problems:
            right, facts = self.examine(data.problems)
            if not self.stop:
                self.keep_best(name, facts.get("eval_reward", right / len(data.problems)))
                log.evaluation(**where, successes=right, count=config.eval_size, **facts)

    def keep_best(self, name: str, result: float) -> None:
        """Keep the weights if this evaluation of the main phase is better than all before it."""
        best = max(self.log.results(name), default=-math.inf)
        if self.config.keep_best and name == self.config.algo and result > best:
            policy.save(self.model, self.config, self.folder / "best", self.data.chat.tokenizer)

    def no_better(self, name: str) -> bool:
        """Whether --patience is at its end: metrics.jsonl says so, and says it to a resumed run too."""
        n = self.config.patience
        results = self.log.results(name) if n else []  # asked before every update
        return name == self.config.algo and 0 < n < len(results) and max(results[-n:]) <= max(results[:-n])

    def next_phase(self) -> None:
        """A fresh optimiser; the control also goes back to the weights at the end of the warm-up."""
        progress, config, warm = self.progress, self.config, self.folder / "state" / "warm.safetensors"
        if self.phases[progress.phase + 1].name != "control":
            self.save_state(warm)
            self.optimizer = Optimizer(self.model, weight_decay=config.weight_decay)
        else:
            policy.save(self.model, config, self.folder, self.data.chat.tokenizer)  # RL's result is kept
            self.optimizer = Optimizer(self.model, weight_decay=config.weight_decay)
            saved, _ = runstate.load_state(warm, self.model, self.optimizer)
            progress.sft_cursor = saved["sft_cursor"]
            rows = read_rows(self.folder / "metrics.jsonl")
            seconds = sum(row["step_s"] for row in rows if row.get("algo") == config.algo)
            self.phases[-1] = dataclasses.replace(self.phases[-1], seconds=seconds)
        progress.phase, progress.phase_step, progress.phase_done = progress.phase + 1, 0, False

    def save_state(self, path: pathlib.Path | None = None) -> None:
        path = path or self.folder / "state" / "state.safetensors"
        rollout = self.rollout.state() if self.progress.update else None
        progress = dataclasses.asdict(self.progress)
        runstate.save_state(path, self.model, self.optimizer, progress, rollout, self.inputs, self.frozen)
        program.state = path

    def finish(self) -> tuple[pathlib.Path, dict]:
        """Save, draw the curves, and say where things are. Returns what `run` does."""
        if self.phases[self.progress.phase].name != "control":
            if self.stop:
                self.save_state()
            policy.save(self.model, self.config, self.folder, self.data.chat.tokenizer)
        self.log.close()
        picture = curves.draw_curves(self.folder, clip_range=(self.config.clip_low, self.config.clip_high))
        if self.stop:
            again = f"python train.py --resume {shlex.quote(str(self.folder))}"
            print(f"stopped after update {self.progress.step}; continue with: {again}")
        else:
            seconds = time.perf_counter() - self.started
            print(summary(self.config, self.folder, picture, self.data.example_prompt(), seconds))
        return self.folder, {k: v for row in read_rows(self.folder / "metrics.jsonl") for k, v in row.items()}
