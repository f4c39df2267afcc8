"""Wrong edits of train.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "train.py"
MUTANTS = {
    "tests/test_router_replay.py": [
        (
            "self.routers.watch(separate, experts, config.router_replay)",
            "self.routers.watch(separate, experts)",
            "the flag does nothing",
        ),
        (
            "self.routers.watch(separate, experts, config.router_replay)",
            "self.routers.watch(separate)",
            "no token is ever flipped",
        ),
    ],
    "tests/test_train.py": [
        (
            "            if distributed.agree(self.stop):\n                return\n            if phase.name",
            "            if phase.name",
            "an exam begins after Ctrl-C",
        ),
        (
            "                self.save_state()  # first, because",
            "                pass  # first, because",
            "nothing is saved before the last exam",
        ),
        (
            "            if distributed.agree(self.stop) or last:",
            "            if last:",
            "the phase moves on though its exam was stopped",
        ),
        (
            "ratios.append((len(log_ratio) / ratios_total, facts))",
            "ratios.append((weight, facts))",
            "GRPO's ratios weigh by answers",
        ),
        (
            "    log = held.enter_context(",
            '    checkpoint.atomic_write(folder / "config.yaml", dump(config))\n    log = held.enter_context(',
            "a resume that fails has changed config.yaml",
        ),
        (
            "entropy = (sequence_sums(entropy, batch.cu_scored) / batch.lengths).mean()",
            "entropy = entropy.mean()",
            "an entropy that depends on how answers fall into micro-batches",
        ),
        ("log_ratios.append(log_ratio)", "log_ratios[:] = [log_ratio]", "quantiles of the last micro-batch"),
        ("        trainer.save_state()  # from now on", "        # from now on", "what was accepted is asked again"),
        ("loss * trained_fraction", "loss", "what is left out does not count in the average"),
        ("score_first=not self.proved", "score_first=False", "nothing compares the two passes"),
        (
            "            self.proved = True",
            "        self.proved = True",
            "a resumed run trusts in what it has not seen",
        ),
        (
            "progress.rl_cursor += config.prompts_per_rollout",
            "progress.rl_cursor += 1",
            "problems asked again and again",
        ),
        (
            "weight, loss = len(batch.index) / trained, loss *",
            "weight, loss = 1 / len(batches), loss *",
            "an answer weighs more in a small micro-batch",
        ),
        ("weight = len(logp) / total", "weight = 1 / len(batches)", "a token weighs more in a small micro-batch"),
        ("        self.progress.sft_cursor += config.batch_size\n", "", "the same examples for ever"),
        ("self.rollout.state() if self.progress.update else None", "None", "a rollout in progress is lost"),
        (
            "learning_rate(progress.phase_step, peak",
            "learning_rate(progress.step, peak",
            "RL starts without a warm-up of its learning rate",
        ),
        (
            "score(self.model, batch, temperature=config.temperature, linear=routing)",
            "score(self.model, batch, linear=routing)",
            "new and old log-probs at different temperatures",
        ),
        (
            'facts["ratio_min"] == facts["ratio_max"] == 1.0',
            '0.5 < facts["ratio_min"] <= facts["ratio_max"] < 2',
            "two scorers that differ a little",
        ),
        (
            "                return  # the state is still",
            "                pass  # nothing has changed",
            "a rollout that was thrown away is trained on",
        ),
        ("        program.state = path\n", "", "a saved state is not told"),
        (
            "            if stopped:\n                self.save_state()\n",
            "",
            "a run that is stopped loses its last updates",
        ),
        ("        program.state = state\n", "", "a resumed state is not told"),
    ],
    "tests/test_own.py": [
        ("if config.keep_saves:  #", "if False:  #", "no weights are kept but the last"),
    ],
    "tests/test_planner.py": [
        ("    if config.plan_only:", "    if False:", "--plan-only starts the run"),
    ],
    "tests/test_train_objectives.py": [
        (
            'config.prompts_per_rollout * self.rollout.facts["sampling_rounds"]',
            "config.prompts_per_rollout",
            "problems of further rounds are asked again",
        ),
        (
            "self.frozen = self.frozen or freeze(self.model, config)",
            "self.frozen = freeze(self.model, config)",
            "the reference follows the policy",
        ),
        ("        frozen = runstate.load_frozen(state, model)\n", "", "a resumed run takes a new reference"),
        ("loss = loss + config.beta * terms", "loss = loss + terms", "beta is 1"),
        (
            "rollout.advantages.nan_to_num() * weights",
            "rollout.advantages.nan_to_num()",
            "every --loss-average is GRPO's",
        ),
    ],
}
