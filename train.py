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
Reading order: run, set_up, Trainer: loop, run_phase, update, sft_update, rl_update, and what they call. What a run
consists of is in nanogspo/run/phases.py, its evaluations in nanogspo/run/evaluations.py.
Lessons: lessons/00_setup.md, lessons/12_gspo.md
"""

import contextlib
import dataclasses
import pathlib
import shlex
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
from nanogspo import checkpoint, distributed, policy, sharding  # noqa: E402
from nanogspo.data import Data, Given, choose_judges, choose_task, read_data  # noqa: E402
from nanogspo.experience import Experience  # noqa: E402
from nanogspo.layers.moe import Routers  # noqa: E402
from nanogspo.model import separate  # noqa: E402
from nanogspo.objectives import combine, kl_to_reference, policy_loss, ratio_histogram, ratio_quantiles, sft_loss  # noqa: E402
from nanogspo.optimizer import Optimizer, learning_rate  # noqa: E402
from nanogspo.packing import MicroBatch, pack, score  # noqa: E402
from nanogspo.reference import freeze, reference  # noqa: E402
from nanogspo.run import curves, doctor, hub, planner  # noqa: E402
from nanogspo.run.evaluations import Evaluations  # noqa: E402
from nanogspo.run.log import RunLog, read_rows, summary  # noqa: E402
from nanogspo.run.phases import Phase, phases_of  # noqa: E402
from nanogspo.run.process import StopRequest, available_memory, peak_memory, run_folder, signals_kept  # noqa: E402
from nanogspo.run.report import write_report  # noqa: E402
from nanogspo.run.trackers import open_tracker  # noqa: E402
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
    returns      (the run's folder, the last value of everything in metrics.jsonl); None with plan_only and check
    """
    # the run's folder and log are closed however the run ends
    with signals_kept(), distributed.started(), contextlib.ExitStack() as held:
        trainer = set_up(config, held, Given(task, rewards, weights, environment))
        if not trainer:
            return None
        trainer.loop()
        return trainer.finish()


def set_up(config: TrainConfig, held: contextlib.ExitStack, given: Given) -> "Trainer | None":
    """Everything before the first update. What is cheap to check comes first: no weights are read and no folder is made
    for a run that is refused. None with --plan-only and --check."""
    started = time.perf_counter()
    # device
    config = dataclasses.replace(config, **given.settings(config))
    check(config, judged=bool(given.rewards))
    config = resolve(dataclasses.replace(config, **planner.machine(config)))
    if config.threads:
        torch.set_num_threads(config.threads)
    # tokenizer, the model's outline (shapes without numbers), data, memory
    task = given.task or choose_task(config)
    config, tokenizer, outline = policy.describe(config, task)
    config, data = read_data(config, task, tokenizer, outline.config)
    memory = 0.0 if config.plan_for else available_memory(config.device)
    config = distributed.first(lambda: planner.approve(config, outline, data.longest_prompt, memory))
    if config.plan_only:
        return None
    judges = choose_judges(config, data, outline.config, given, held)
    if config.check:
        model = policy.build(config, task)
        with sharding.gathered(model):
            return doctor.check(config, data, Sampler(model, data.chat, data.task, config, *judges))
    hub.check_login(config.push_to_hub)
    # folder, model, optimiser
    folder = distributed.first(lambda: held.enter_context(run_folder(config)))
    name = config.tracker if distributed.rank() == 0 else "none"
    tracker = open_tracker(name, config.tracker_project, folder, dataclasses.asdict(config), held)
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
    resume_step = progress.step if config.resume else None
    log = held.enter_context(RunLog(folder, steps=steps, resume_step=resume_step, tracker=tracker))
    distributed.check_same(model.named_parameters(), inputs["files"])
    distributed.first(lambda: checkpoint.atomic_write(folder / "config.yaml", dump(config)))
    sampler, state = Sampler(model, data.chat, data.task, config, *judges), (progress, rollout, frozen, inputs)
    watch = doctor.Watch.of(config, model, data.chat.tokenizer, log, progress)
    stop = StopRequest()
    evaluations = Evaluations(data, sampler, log, folder, stop)
    tools = folder, log, watch, evaluations, stop, started, Routers(model.config)
    trainer = Trainer(config, data, sampler, model, optimizer, phases, *state, *tools)
    if changed:
        log.changed(progress.step, changed)
        trainer.save_state()  # from now on the run is made of these
    return trainer


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
    watch: doctor.Watch
    evaluations: Evaluations
    stop: StopRequest
    started: float
    routers: Routers  # of experts: watched, and kept even
    proved: bool = False  # True once separately scored old log-probs have given ratios of exactly 1; not saved

    def loop(self) -> None:
        """Phase after phase, from where the run stands; ends early when asked to stop."""
        if self.progress.step == 0:
            self.evaluations.make(0, "start")
        while not distributed.agree(self.stop):
            phase, last = self.phases[self.progress.phase], self.progress.phase == len(self.phases) - 1
            self.run_phase(phase)
            if distributed.agree(self.stop):
                return
            if phase.name != "control":  # which a resumed run makes anew
                self.save_state()  # first, because an evaluation may take longer than a cluster waits after SIGTERM
            self.evaluations.make(self.progress.step, phase.name, last)
            if distributed.agree(self.stop) or last:
                return
            self.next_phase()

    def run_phase(self, phase: Phase) -> None:
        """Updates until the phase is over: its steps are done, its time is up, or enough answers are right."""
        progress, config, started = self.progress, self.config, time.perf_counter()
        while progress.phase_step < phase.steps and not progress.phase_done:
            if distributed.agree(self.stop or time.perf_counter() - started >= phase.seconds):
                return
            done = progress.phase_step
            if phase.until <= 1 and done and done % PROBE_EVERY == 0:
                probe = self.data.probe(config.warm_probe)
                right, _ = self.evaluations.examine(probe, progress.step)
                progress.phase_done = right >= phase.until * len(probe)  # groups are mixed enough
            if config.eval_every and done and done % config.eval_every == 0 and not progress.phase_done:
                self.evaluations.make(progress.step, phase.name)
            if distributed.agree(self.stop) or progress.phase_done or self.evaluations.no_better(phase.name):
                return
            self.update(phase)

    def update(self, phase: Phase) -> None:
        """One update: losses and gradients, AdamW, a row for the log. Nothing when stopped while it samples."""
        progress, config = self.progress, self.config
        began = updating = time.perf_counter()  # with and without the sampling of a rollout
        schedule = {"warmup": config.warmup_updates, "total": phase.steps, "schedule": config.lr_schedule}
        lr = learning_rate(progress.phase_step, peak=phase.lr, **schedule)
        if phase.algo == "sft":
            facts, batches = self.sft_update()
        else:
            if progress.update == 0 and not self.new_rollout():
                return  # the state is still that of the last update, so it can be saved
            updating = time.perf_counter()
            facts, batches = self.rl_update(phase.algo)
        norm = self.optimizer.step(lr, config.grad_clip)
        progress.step, progress.phase_step = progress.step + 1, progress.phase_step + 1
        now, tokens = time.perf_counter(), distributed.total(sum(len(batch.tokens) for batch in batches))
        row = {"step": progress.step, "algo": phase.algo, "phase": phase.name}
        row |= facts | self.routers.metrics() | row  # whatever name a reward function logs under
        row |= {"grad_norm": norm.item(), "lr": lr, "step_s": now - began, "peak_mem_bytes": peak_memory(config.device)}
        row |= {"tokens_per_s": tokens / (now - began), "update_tokens_per_s": tokens / (now - updating)}
        self.log.step(row)
        self.watch.look(row)
        if phase.name != "control" and progress.step % config.save_every == 0:
            if config.keep_saves:  # before the state: a run that is killed in between does this update again
                where = self.folder / "saves", self.data.chat.tokenizer
                policy.keep_last(config.keep_saves, progress.step, self.model, config, *where)
            self.save_state()

    def sft_update(self) -> tuple[dict[str, float], list[MicroBatch]]:
        """The gradient of the mean loss over all scored tokens of a batch of examples."""
        config, cursor = self.config, self.progress.sft_cursor
        examples = [self.data.sft_example(cursor + n) for n in distributed.mine(config.batch_size)]
        batches = pack(examples, max_tokens=config.micro_batch_tokens)
        total, metrics = distributed.total(sum(len(batch.targets) for batch in batches)), []
        sharding.keep_pace(self.model, len(batches))
        distributed.seed(config.seed, self.progress.step)  # of dropout: a resumed run has the same masks
        for batch in (batch.to(config.device) for batch in batches):
            logp, entropy, right = score(self.model, batch, linear=self.routers.watch(separate))  # (M,), (M,), (M,)
            loss, facts = sft_loss(logp)
            weight = len(logp) / total  # the weights of an update sum to 1
            ((loss + self.routers.balance(config.router_aux_loss)) * weight).backward()
            self.optimizer.accumulate()
            facts |= {"loss": loss, "entropy": entropy.mean(), "token_accuracy": right.float().mean()}
            metrics.append((weight, facts))
        self.progress.sft_cursor += config.batch_size
        return combine(*distributed.joined(metrics)), batches

    def new_rollout(self) -> bool:
        """Sample answers and score them: minibatches 2 to U always, the first only until its ratios are `proved`.
        False when stopped meanwhile: the answers are thrown away."""
        config, progress = self.config, self.progress
        self.frozen = self.frozen or freeze(self.model, config)
        with sharding.gathered(self.model):
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
            self.watch.measure(self.model, self.rollout)
        progress.rl_cursor += config.prompts_per_rollout * self.rollout.facts["sampling_rounds"]
        return True

    def rl_update(self, algo: str) -> tuple[dict[str, float], list[MicroBatch]]:
        """The gradient of the objective over one minibatch of the rollout at hand."""
        config, rollout, update = self.config, self.rollout, self.progress.update
        batches = rollout.minibatches[update]
        # answers without an advantage are not scored: their gradient is 0, and they count in the average
        weights, trained, trained_fraction = rollout.weights(update, config.loss_average, config.max_new_tokens)
        advantages = rollout.advantages.nan_to_num() * weights
        of_answers = algo in ("gspo", "reinforce")  # the ratios; else of tokens
        ratios_total = trained if of_answers else distributed.total(sum(len(batch.targets) for batch in batches))
        metrics, ratios, log_ratios = [], [], []
        sharding.keep_pace(self.model, len(batches))
        parts = (part[update] for part in (rollout.old_logp, rollout.ref_logp, rollout.experts))
        for batch, old_logp, ref_logp, experts in zip(batches, *parts, strict=True):
            A, w = (x[batch.index].to(config.device, non_blocking=True) for x in (advantages, weights))  # (N,), (N,)
            batch = batch.to(config.device)
            routing = self.routers.watch(separate, experts, config.router_replay)
            logp, entropy, _ = score(self.model, batch, temperature=config.temperature, linear=routing)  # (M,) all
            # None: no weight has moved yet, so this forward pass is also the old one
            old_logp = logp.detach() if old_logp is None else old_logp.to(config.device)  # (M,)
            (low, high), terms = self.watch.clip, {}
            loss, facts, log_ratio = policy_loss(algo, logp, old_logp, batch.cu_scored, A, clip_low=low, clip_high=high)
            if config.beta:
                terms["kl"] = kl_to_reference(logp, ref_logp.to(config.device), batch.cu_scored, w)
                loss = loss + config.beta * terms["kl"]
            weight, loss = len(batch.index) / trained, loss * trained_fraction  # the average over all answers
            ((loss + self.routers.balance(config.router_aux_loss)) * weight).backward()
            self.optimizer.accumulate()
            entropy = (sequence_sums(entropy, batch.cu_scored) / batch.lengths).mean()  # over answers, too
            metrics.append((weight, {"loss": loss, "entropy": entropy, **terms}))
            ratios.append((len(log_ratio) / ratios_total, facts))
            log_ratios.append(log_ratio)
        metrics, ratios, log_ratios = distributed.joined(metrics, ratios, log_ratios)
        facts = combine(metrics, ratios, [(1.0, ratio_quantiles(log_ratios))])
        facts |= {"ratio_hist": ratio_histogram(log_ratios), **(rollout.times if update == 0 else {})}
        if update == 0:
            if not facts["ratio_min"] == facts["ratio_max"] == 1.0:
                found = f"ratios in [{facts['ratio_min']!r}, {facts['ratio_max']!r}], want exactly 1.0"
                raise AssertionError(
                    f"first update of a rollout: {found}; old and new log-probs were not scored the same way"
                )
            self.proved = True  # the two passes agree to the last bit: later rollouts need only one
        self.progress.update = (update + 1) % config.updates_per_rollout
        return rollout.facts | facts | {"trained_frac": trained_fraction}, batches

    def next_phase(self) -> None:
        """A fresh optimiser; the control also goes back to the weights at the end of the warm-up."""
        progress, config, warm = self.progress, self.config, self.folder / "state" / "warm.safetensors"
        if self.phases[progress.phase + 1].name != "control":
            self.save_state(warm)
            self.optimizer = Optimizer(self.model, weight_decay=config.weight_decay)
        else:
            hub.save_weights(self.model, config, self.data, self.folder)  # RL's result is kept
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
        what = path, self.model, self.optimizer, progress, rollout, self.inputs, self.frozen
        runstate.save_state(*what)
        program.state = path

    def finish(self) -> tuple[pathlib.Path, dict]:
        """Save, draw the curves, and say where things are. Returns what `run` does."""
        stopped = distributed.agree(self.stop)
        if self.phases[self.progress.phase].name != "control":
            if stopped:
                self.save_state()
            hub.save_weights(self.model, self.config, self.data, self.folder)
        self.log.close()
        distributed.first(lambda: write_report(self.folder))
        picture = distributed.first(lambda: curves.draw_curves(self.folder, clip_range=self.watch.clip))
        if stopped:
            again = f"{distributed.launcher()} train.py --resume {shlex.quote(str(self.folder))}"
            print(f"stopped after update {self.progress.step}; continue with: {again}")
        else:
            seconds = time.perf_counter() - self.started
            print(summary(self.config, self.folder, picture, self.data.example_prompt(), seconds))
            distributed.first(lambda: hub.push(self.config, self.folder))
        return self.folder, {k: v for row in read_rows(self.folder / "metrics.jsonl") for k, v in row.items()}
