"""Wrong edits of train.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "train.py"
MUTANTS = {
    "tests/test_train.py": [
        (
            "config = dataclasses.replace(config, lora_r=ranks[-1])",
            "pass",
            "config.yaml with a rank that the adapter has not",
        ),
        ("log.sampling(len(problems), stop)", "log.sampling(len(problems))", "an exam goes on after Ctrl-C"),
        (
            "            if not stop:\n                log.evaluation(",
            "            if True:\n                log.evaluation(",
            "half an exam counts",
        ),
        (
            "        if not stop:\n            if phase.name",
            "        if True:\n            if phase.name",
            "an exam begins after Ctrl-C",
        ),
        ("log.sampling(len(probe), stop)", "log.sampling(len(probe))", "a probe goes on after Ctrl-C"),
        ("phase_done = not stop and right", "phase_done = right", "half a probe ends the warm-up"),
        (
            "                save_state()  # first, because",
            "                pass  # first, because",
            "nothing is saved before the last exam",
        ),
        (' or config.model == "tiny":', ":", "the tiny model under an adapter is saved nowhere"),
        (
            "        if stop or phase is phases[-1]:",
            "        if phase is phases[-1]:",
            "the phase moves on though its exam was stopped",
        ),
        (
            "ratios.append((len(log_ratios[-1]) / items, facts))",
            "ratios.append((weight, facts))",
            "GRPO's ratios weigh by answers",
        ),
        (
            "    log = held.enter_context(\n",
            '    checkpoint.atomic_write(folder / "config.yaml", dump(config))\n    log = held.enter_context(\n',
            "a resume that fails has changed config.yaml",
        ),
        (
            "entropy = (sequence_sums(entropy, batch.cu_seqlens) / batch.lengths).mean()",
            "entropy = entropy.mean()",
            "an entropy that depends on how answers fall into micro-batches",
        ),
        (
            "if not all(a.finished or len(a.tokens) == config.max_new_tokens for a in answers):",
            "if not any(a.finished for a in answers):",
            "half a rollout is trained on",
        ),
        ("(prompt, skip_special_tokens=False)", "(prompt)", "samples.jsonl without the marks that the model reads"),
        ('"truncated": not a.finished, ', '"truncated": a.finished, ', "truncated says its opposite"),
        (
            "log_ratios.append(logp.detach() - old_logp)",
            "log_ratios[:] = [logp.detach() - old_logp]",
            "quantiles of the last micro-batch",
        ),
        (
            "(seq_logp.detach() - old_seq_logp) / batch.lengths",
            "seq_logp.detach() - old_seq_logp",
            "quantiles of ratios that are not per token",
        ),
        (
            "if log.has(**where, eval_count=config.eval_size):",
            "if False:",
            "an exam counts twice",
        ),
        (" if last else []", "", "answers to held-out rows at every evaluation"),
        ("        save_state()  # from now on", "        # from now on", "what was accepted is asked again"),
        (
            '(outline.config.max_positions, "max_position_embeddings")',
            '(2**40, "max_position_embeddings")',
            "rows that the model cannot see whole are trained on",
        ),
        ("loss * share", "loss", "what is left out does not count in the average"),
        ("score_first=not proved", "score_first=False", "nothing compares the two passes"),
        (
            "                    proved = True",
            "                proved = True",
            "a resumed run trusts in what it has not seen",
        ),
        (
            "progress.rl_cursor += config.prompts_per_rollout",
            "progress.rl_cursor += 1",
            "problems asked again and again",
        ),
        (
            "weight, loss = len(batch.index) / trained, loss * share",
            "weight, loss = 1 / len(batches), loss * share",
            "an answer weighs more in a small micro-batch",
        ),
        ("weight = len(logp) / total", "weight = 1 / len(batches)", "a token weighs more in a small micro-batch"),
        ("                progress.sft_cursor += config.batch_size\n", "", "the same examples for ever"),
        ("rollout.state() if progress.update else None", "None", "a rollout in progress is lost"),
        (
            "                progress.phase_step,\n                peak",
            "                progress.step,\n                peak",
            "RL starts without a warm-up of its learning rate",
        ),
        (
            "score(model, batch, temperature=config.temperature)",
            "score(model, batch)",
            "new and old log-probs at different temperatures",
        ),
        (
            "        temperature=config.temperature,\n        device=config.device,",
            "        temperature=1.0,\n        device=config.device,",
            "old log-probs scored at another temperature",
        ),
    ],
    "tests/test_planner.py": [
        ("if config.plan_only:", "if False:", "--plan-only starts the run"),
        ("and not config.ignore_memory_plan", "", "--ignore-memory-plan does not"),
        ("if refused and not config.plan_only and", "if refused and", "who asks for the plan is refused"),
        (
            'config.model, want="config")',
            'config.model, want="model")',
            "the plan waits for the weights of a hub's model",
        ),
        ("planner.too_large(parts, free, planner.ESTIMATES)", '""', "a run that cannot fit is started"),
    ],
    "tests/test_quant.py": [
        (
            "    if packed_layers(outline) and not config.lora_r:",
            "    if False:",
            "full fine-tuning of a 4-bit folder",
        ),
        ("device=config.device, dtype=dtype, quant=quant)", "device=config.device, dtype=dtype)", "--quant is ignored"),
    ],
}
