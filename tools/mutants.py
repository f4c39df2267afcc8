"""The wrong edits that tools/mutate.py makes, one at a time: what a reader of the code would get wrong.

    (file, the test file that must turn red, [(right, wrong, why), ...])      right occurs exactly once in the file

A change that adds code adds its mutants here.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    right: str  # occurs exactly once in the file
    wrong: str
    test: str  # the test file that must fail
    why: str  # what a reader of the code would get wrong


# ruff: noqa: E501      an edit is quoted as it stands in the code
GROUPS = [
    (
        "nanogspo/tasks/__init__.py",
        "tests/test_tasks.py",
        [
            (
                "zlib.crc32(key.encode()) % 10 == 0",
                "hash(key) % 10 == 0",
                "a split that is salted anew in every process",
            ),
            (
                "    random.Random(stream).shuffle(order)",
                "    random.Random(0).shuffle(order)",
                "every seed and every epoch in the same order",
            ),
        ],
    ),
    (
        "nanogspo/tasks/addition.py",
        "tests/test_tasks.py",
        [
            ('f"{min(a, b)}+{max(a, b)}"', 'f"{a}+{b}"', "38+47 in the exam, 47+38 in training"),
            ("            if a != b:\n", "            if True:\n", "44+44 twice an epoch"),
            (
                "zip(reversed(answer), reversed(reference), strict=False)",
                "zip(answer, reference, strict=False)",
                "digits compared from the left, where a longer number shifts them all",
            ),
            ("max(len(answer), len(reference))", "len(reference)", "digits too many cost nothing"),
            (
                'self._draw(f"{seed}/{n}", held_out=False)',
                'self._draw(f"{seed}/{n}", held_out=n % 2 == 1)',
                "training on the exam, only where pairs are not listed",
            ),
            (
                "answer_text.strip() == problem.answer",
                "answer_text == problem.answer",
                "a space in front of the number makes it wrong",
            ),
        ],
    ),
    (
        "nanogspo/tasks/reverse.py",
        "tests/test_tasks.py",
        [
            (
                "is_held_out(min(word, word[::-1]))",
                "is_held_out(word)",
                "the exam asks for a word whose answer was a training prompt",
            ),
            ("diagonal + 1 if x == y else", "row[j + 1] + 1 if x == y else", "one letter matched many times"),
            (
                "/ max(len(answer), len(problem.answer))",
                "/ len(problem.answer)",
                "an answer that holds every letter sequence scores 1",
            ),
        ],
    ),
    (
        "nanogspo/tasks/jsonl.py",
        "tests/test_tasks.py",
        [
            (
                "start=1):\n        if not raw",
                "start=0):\n        if not raw",
                "an error that names the line above the bad one",
            ),
            (
                "if len(tokens) <= max_length]",
                "if len(tokens) < max_length]",
                "a row of exactly the maximal length is left out",
            ),
            ("            too_long.append(line)", "            pass", "rows left out in silence"),
            (
                "written = [*tokenizer.encode_plain(completion), min(tokenizer.eos_ids)]",
                "written = tokenizer.encode_plain(completion)",
                "a model that never learns to stop",
            ),
            ("[False] * len(given)", "[True] * len(given)", "loss on the prompt"),
            (
                "return [_last_answer_only(*sequences[-1])]",
                "return sequences",
                "loss on what the prompt's assistant said",
            ),
            ('message["role"] == "assistant" or not', "not", "empty answers are learned"),
        ],
    ),
    (
        "nanogspo/runlog.py",
        "tests/test_runlog.py",
        [
            ("centre = (share + z2 / 2) / (1 + z2)", "centre = share", "the textbook interval, which leaves [0, 1]"),
            (
                "None if isinstance(value, float) and not math.isfinite(value) else value",
                "None if value != value else value",
                "infinities are not JSON either",
            ),
            ("    file.flush()", "    pass", "a killed run loses its last rows"),
            (
                'row.get("step", 0) <= step]',
                'row.get("step", 0) < step]',
                "a resumed run forgets the step it was saved at",
            ),
            (
                "math.nan if any(map(math.isnan, ends)) else max(ends)",
                "max(ends)",
                "a ratio of NaN printed as a perfect one",
            ),
            (
                "number('clip_low_frac') + number('clip_high_frac')",
                "number('clip_high_frac')",
                "half of the clipping is not shown",
            ),
            (
                'if row.get("phase") == "sft"][-1:] + control',
                'if row.get("phase") == "sft"][-1:]',
                "the control's line is not drawn",
            ),
        ],
    ),
    (
        "kernels/seq_logprob.py",
        "tests/test_seq_logprob.py",
        [
            ("_put(z, column, inside, z.new_full((), -math.inf))", "pass", "target counted among the others"),
            ("torch.maximum(m[rows], z.amax(1))", "torch.maximum(m[rows], 0 * z.amax(1))", "no running maximum"),
            ("s[rows] = s[rows] * down.exp() + e.sum(1)", "s[rows] = s[rows] + e.sum(1)", "old sum not rescaled"),
            (
                "(a[rows] + s[rows] * down) * down.exp()",
                "a[rows] * down.exp()",
                "entropy sum not shifted to the new maximum",
            ),
            ("info.min / 2, dtype=dtype", "-math.inf, dtype=dtype", "start from -inf"),
            ("torch.full_like(m, info.tiny)", "torch.zeros_like(m)", "V = 1 has log 0"),
            (".clamp_min_(UNDERFLOW)", "", "-inf * 0 in the entropy"),
            (
                "logp = logsigmoid(margin)",
                "logp = z_y - torch.logaddexp(m + log_s, z_y)",
                "equation (1): logp of -1e-8 rounds to 0",
            ),
            ("logp.expm1() * (logp_m", "(logp.exp() - 1) * (logp_m", "1 - p_y cancels in the entropy"),
            ("logp.clamp_min(info.min)", "logp", "0 * -inf for a banned target"),
            ("z_y >= m", "z_y > m", "ties are not top"),
            (
                "sums = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32",
                "sums = hidden.dtype",
                "logits in bf16",
            ),
            ("torch.mm(a, b, out=out)", "torch.mm(a, b)", "autocast takes the logits to bf16"),
            ("z.div_(temperature)", "z.mul_(temperature)", "temperature the wrong way"),
            (".tanh_().mul_(softcap)", ".tanh_()", "soft-cap does not scale back"),
            ("(column >= 0) & (column < width)", "column >= 0", "a target of a later tile is found in this one"),
            (
                "slice(v, min(v + width, V))",
                "slice(v, min(v + width, V - 1))",
                "last token of the vocabulary forgotten",
            ),
            ("dz_y = -logp.expm1() * dlogp", "dz_y = (1 - logp.exp()) * dlogp", "1 - p_y cancels in the gradient"),
            (
                "dz_y = dz_y - logp.exp() * dentropy * (logp + entropy)",
                "dz_y = dz_y + logp.exp() * dentropy * (logp + entropy)",
                "sign of the entropy at the target",
            ),
            ("dlogp = dlogp / temperature", "dlogp = dlogp * 1", "no 1 / T in the gradient"),
            ("dentropy = dentropy / temperature", "dentropy = dentropy * 1", "no 1 / T in the entropy's gradient"),
            ("(x / softcap).cosh_().pow_(-2)", "1 - (x / softcap).tanh_().square_()", "1 - tanh^2 cancels"),
            ("dx.mul_(slope)", "dx.mul_(1)", "no slope of the soft-cap"),
            (
                ".sub_(m[rows, None]).add_(logp_m[rows, None])",
                ".sub_((m - logp_m)[rows, None])",
                "one large number instead of two small",
            ),
            ("exp_().mul_(pull).neg_()", "exp_().mul_(pull)", "sign of the gradient"),
            ("_put(dx, *_find(targets[rows], vocab), dz_y[rows, None])", "pass", "target's own gradient forgotten"),
            (
                "dw = m.new_zeros(w.shape) if",
                "dw = w.new_zeros(w.shape, dtype=weight.dtype) if",
                "dweight summed in 16 bits",
            ),
            (
                "_addmm(dhidden[rows], dx, w)",
                "torch.mm(dx, w, out=dhidden[rows])",
                "only the last tile of the vocabulary",
            ),
            (
                "wrong = scored & ((targets < 0) | (targets >= V))",
                "wrong = scored & (targets >= V)",
                "-1 is let through",
            ),
            (
                "wrong = scored & ((targets < 0) | (targets >= V))",
                "wrong = scored & ((targets < 0) | (targets > V))",
                "V is let through",
            ),
            ("targets != IGNORE", "targets != -1", "IGNORE is not ignored"),
            ("values.double()", "values", "sums of answers in fp32"),
            (
                'sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)',
                "sums = torch.cat([values.new_zeros(1), values.cumsum(0)])[cu_seqlens.long()].diff()",
                "cumulative sum: bits depend on neighbours",
            ),
        ],
    ),
    (
        "nanogspo/objectives.py",
        "tests/test_objectives.py",
        [
            (
                "rewards.mean(dim=1, keepdim=True)",
                "rewards.mean(dim=0, keepdim=True)",
                "centred down the columns: groups leak",
            ),
            ("rewards.std(dim=1, keepdim=True)", "rewards.std()", "one std for the batch"),
            (
                "rewards.std(dim=1, keepdim=True)",
                "rewards.std(dim=1, correction=0, keepdim=True)",
                "std over G, not over G - 1",
            ),
            ("keepdim=True) + 1e-4)", "keepdim=True) + 1e-8)", "another epsilon than TRL's"),
            (
                "centred = centred.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)",
                "pass",
                "float noise of equal rewards",
            ),
            ("rewards.shape[1] < 2", "rewards.shape[1] < 1", "G = 1 is let through"),
            (
                "- old_seq_logp.detach()) / lengths",
                "- old_seq_logp.detach()) / lengths.max()",
                "padded length in the ratio",
            ),
            ("- old_seq_logp.detach()) / lengths", "- old_seq_logp.detach())", "ratio of the whole sequence"),
            ("- old_seq_logp.detach()) / lengths", "- old_seq_logp) / lengths", "gradient into the old policy"),
            ("torch.minimum(ratio * advantages", "torch.maximum(ratio * advantages", "max for min"),
            ("ratio.clamp(low, high) * advantages", "ratio.clamp(low, low) * advantages", "high bound lost"),
            (
                "torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)",
                "ratio.clamp(low, high) * advantages",
                "clipped whatever the sign of A",
            ),
            ("return -objective.mean(), metrics", "return objective.mean(), metrics", "sign of the loss"),
            (
                "return -objective.mean(), metrics",
                "return -(objective * lengths).sum() / lengths.sum(), metrics",
                "mean over tokens, not sequences",
            ),
            (
                "-(sequence_sums(objective, cu_seqlens) / lengths).mean()",
                "-objective.mean()",
                "long answers count more",
            ),
            ("((ratio < low) & (advantages < 0))", "(ratio < low)", "clip_low_frac counts answers that still learn"),
            (
                "((ratio > high) & (advantages > 0))",
                "((ratio > high) & (advantages < 0))",
                "clip_high_frac of the wrong sign",
            ),
            ("ratio.std(correction=0)", "ratio.std()", "nan for one answer"),
            ("torch.promote_types(x.dtype, torch.float32)", "x.dtype", "ratios in bf16"),
            ("(lengths < 1).any()", "(lengths < 0).any()", "an empty answer is let through"),
            ("or any(t.shape != first.shape for t in others.values())", "", "shapes broadcast in silence"),
            ("loss = -_at_least_float32(logp).mean()", "loss = -_at_least_float32(logp).sum()", "sum for mean in SFT"),
        ],
    ),
    (
        "nanogspo/families.py",
        "tests/test_families.py",
        [
            (
                '"full" if layer % 2 else "sliding"',
                '"sliding" if layer % 2 else "full"',
                "Gemma 2 starts with a full layer",
            ),
            (
                '"sliding" if (layer + 1) % n else "full"',
                '"sliding" if layer % n else "full"',
                "Gemma 3 starts with a full layer",
            ),
            (
                '"sliding" if layer >= first else "full"',
                '"sliding" if layer > first else "full"',
                "max_window_layers off by one",
            ),
            (
                'text["query_pre_attn_scalar"] if row.attn_scalar else D',
                "D",
                "attention scale from head_dim where the file says otherwise",
            ),
            (
                'config.get("tie_word_embeddings", text.get("tie_word_embeddings", row.tied))',
                'text.get("tie_word_embeddings", config.get("tie_word_embeddings", row.tied))',
                "text_config wins over the wrapper about tying",
            ),
            (
                "if value is not None or key in NULL_MEANS}",
                "if value is not None}",
                "a soft-cap switched off by null comes back",
            ),
            (
                'text.get("use_sliding_window") and text.get("sliding_window")',
                'text.get("sliding_window")',
                "a window where use_sliding_window is false",
            ),
        ],
    ),
    (
        "nanogspo/model.py",
        "tests/test_model.py",
        [
            (
                "return (h * (1.0 + self.weight.float())).to(x.dtype) if self.plus_one",
                "return (1.0 + self.weight) * h.to(x.dtype) if self.plus_one",
                "Gemma norm rounded before it is multiplied",
            ),
            (
                "torch.cat((-second, first), dim=-1) * sin",
                "torch.cat((second, -first), dim=-1) * sin",
                "RoPE turns the other way",
            ),
            (
                "allowed &= key > query - window",
                "allowed &= key >= query - window",
                "a sliding window one key too wide",
            ),
            (
                "if not window or T <= window:",
                "if not window or T <= window + 1:",
                "the shortcut skips a window that already bites",
            ),
            (
                "x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)",
                "x = x * config.hidden_size**0.5",
                "embedding scale not rounded to the weight dtype",
            ),
            (
                "scores = torch.tanh(scores / softcap) * softcap",
                "scores = torch.tanh(scores / softcap)",
                "soft-cap does not scale back",
            ),
            (
                "k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)",
                "k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)",
                "query heads paired with the wrong kv heads",
            ),
            (
                "keep = ((turns - low) / (high - low)).clamp(0, 1)",
                "keep = ((turns - low) / (high - low)).clamp(0, 1).round()",
                "llama3 RoPE without its ramp",
            ),
            (
                "first, last = math.floor(first), math.ceil(last)",
                "first, last = math.ceil(first), math.floor(last)",
                "yarn ramp rounded inwards",
            ),
            (
                "if cache is None or cache.extent == T:",
                "if cache is None or T > 1:",
                "a second chunk of a prompt attends as if the cache were empty",
            ),
            (
                "if self.gradient_checkpointing and torch.is_grad_enabled():",
                "if False:",
                "gradient checkpointing does nothing",
            ),
            (
                "return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))",
                "return x + self.mlp(self.pre_feedforward_layernorm(x))",
                "the last sandwich norm left out",
            ),
        ],
    ),
    (
        "nanogspo/cache.py",
        "tests/test_model.py",
        [
            (
                "if self.extent + T > self.capacity:",
                "if self.extent + T >= self.capacity:",
                "the last slot cannot be used",
            ),
            (
                "new.lengths, new.extent = self.lengths[index], self.extent",
                "new.lengths, new.extent = self.lengths, self.extent",
                "rows keep the lengths of other rows",
            ),
        ],
    ),
    (
        "nanogspo/checkpoint.py",
        "tests/test_checkpoint.py",
        [
            (
                'if t["start"] != expected or t["end"] - t["start"] != bytes_:',
                'if t["end"] - t["start"] != bytes_:',
                "overlapping tensors are read",
            ),
            ('text += b" " * (-len(text) % 8)', 'text += b""', "data not aligned"),
            (
                'if SKIP.search(name) or (config.tied and ours == "lm_head.weight"):',
                "if SKIP.search(name):",
                "a tied lm_head in the file is an error",
            ),
            (
                "get = layer.merged_weight if merge_lora else lambda layer=layer: base_weight(layer)",
                "get = lambda layer=layer: base_weight(layer)",
                "the export forgets the adapter",
            ),
            ('(math.sqrt(r) if config.get("use_rslora") else r)', "r", "rank-stabilised adapters scaled wrongly"),
            ('"lora_alpha": first.scale * first.r,', '"lora_alpha": first.scale,', "PEFT would divide by r once more"),
            ("        if old.name not in written:", "        if False:", "stale shards stay and win"),
            ("if 8 + length + expected != size:", "if False:", "a truncated file is read"),
            (
                "except errors.GatedRepoError as e:",
                "except errors.DisabledRepoError as e:",
                "a gated repository looks like an unknown one",
            ),
            ("if any(file.parent != folder for file in files):", "if False:", "an index may point outside its folder"),
        ],
    ),
    (
        "nanogspo/lora.py",
        "tests/test_lora.py",
        [
            (
                "F.dropout(x, self.dropout, self.training)",
                "F.dropout(x, self.dropout, True)",
                "dropout while sampling and scoring",
            ),
            ("self.lora_A(h.float())", "self.lora_A(h)", "a bf16 input to an fp32 adapter"),
            (
                "bound = 1 / math.sqrt(base.in_features)",
                "bound = 1 / math.sqrt(base.out_features)",
                "A drawn for another width",
            ),
            ("    model.requires_grad_(False)\n", "", "the base is trained as well"),
            (
                "nn.init.zeros_(self.lora_B.weight)",
                "nn.init.normal_(self.lora_B.weight, std=1e-3)",
                "a fresh adapter that changes the model",
            ),
            (
                "device=device, dtype=torch.float32)\n        self.lora_B",
                "device=device, dtype=base.weight.dtype)\n        self.lora_B",
                "bf16 adapters, which round GSPO's updates away",
            ),
        ],
    ),
    (
        "nanogspo/rollout.py",
        "tests/test_rollout.py",
        [
            (
                "[torch.arange(len(prompts), device=device), lengths - 1]",
                "[:, -1]",
                "the first token of a short prompt is read off its padding",
            ),
            ("        cache.lengths = lengths  #", "        #", "short prompts go on behind their padding"),
            ("right=True)", "right=False)", "a token of probability 0 is drawn at uniform 0"),
            ("uniforms[step, rows]", "uniforms[step, : len(rows)]", "draws that depend on who has finished"),
            (
                "cache, rows, drawn = cache.rows(keep), rows[keep], drawn[keep]",
                "cache, rows, drawn = cache.rows(keep), rows, drawn[keep]",
                "answers mixed up once the batch shrinks",
            ),
            ("before >= top_p", "before > top_p", "one token too many where the mass is met exactly"),
            ("seed=seed + first,", "seed=seed,", "equal draws in every slice"),
        ],
    ),
    (
        "nanogspo/cache.py",
        "tests/test_rollout.py",
        [
            ("new.v = [v[index] for v in self.v]", "new.v = list(self.v)", "values stay with their old rows"),
        ],
    ),
    (
        "nanogspo/packing.py",
        "tests/test_packing.py",
        [
            ("tokens[rows, columns + 1]", "tokens[rows, columns]", "a token is asked to predict itself"),
            (
                "* (len(batch) + 1) > max_tokens",
                "* len(batch) > max_tokens",
                "a row more than the memory was planned for",
            ),
            ("temperature=temperature, softcap=cap,", "softcap=cap,", "sampled at one temperature, scored at another"),
            (
                "not any(e.loss_mask[1:])",
                "not any(e.loss_mask)",
                "an example whose only scored token has nothing before it",
            ),
        ],
    ),
    (
        "nanogspo/optimizer.py",
        "tests/test_optimizer.py",
        [
            (
                "nn.Parameter(p.detach().float())",
                "nn.Parameter(p.detach().clone())",
                "masters in bf16: a policy that never moves",
            ),
            (
                "master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)",
                "master.grad = p.grad.float()",
                "only the last micro-batch counts",
            ),
            ("                p.copy_(master)", "                pass", "the model never sees its masters"),
            ("if not torch.isfinite(norm):", "if torch.isnan(norm):", "an infinite gradient is stepped on"),
            (
                'for key in ("step", "exp_avg", "exp_avg_sq")',
                'for key in ("step", "exp_avg")',
                "the second moment is lost on resume",
            ),
            ("peak * (step + 1) / (warmup + 1)", "peak * step / (warmup + 1)", "a first update of learning rate 0"),
        ],
    ),
    (
        "nanogspo/runstate.py",
        "tests/test_runstate.py",
        [
            ('    torch.set_rng_state(tensors["rng.cpu"])\n', "", "dropout goes on with other numbers"),
            ("[i >= start for i in", "[i > start for i in", "the first token of a saved answer is not scored"),
            (
                "kind != (wanted[name].dtype, tuple(wanted[name].shape))",
                "kind[1] != tuple(wanted[name].shape)",
                "fp32 weights resumed in bf16 without a word",
            ),
        ],
    ),
    (
        "nanogspo/config.py",
        "tests/test_config.py",
        [
            ("{**base, **given}", "{**given, **base}", "the file wins over the flags"),
            (
                "if config.updates_per_rollout == 1:",
                "if config.updates_per_rollout == 0:",
                "REINFORCE under another name",
            ),
            (
                "if config.top_k or config.top_p != 1:",
                "if config.top_k and config.top_p != 1:",
                "truncated sampling in RL",
            ),
            ("math.isfinite(getattr(config, f.name))", "True", "nan passes every comparison"),
            ("if kind is float and isinstance(value, str):", "if False:", "3e-4 in YAML is a string"),
            ("allow_abbrev=False", "allow_abbrev=True", "--step is taken for --steps"),
        ],
    ),
    (
        "nanogspo/planner.py",
        "tests/test_planner.py",
        [
            (
                '"gradients": numbers * 4',
                '"gradients": numbers * element',
                "gradients are summed in fp32 whatever the weights are",
            ),
        ],
    ),
    (
        "nanogspo/experience.py",
        "tests/test_train.py",
        [
            ("b.index + first", "b.index", "every minibatch gets the advantages of the first"),
        ],
    ),
    (
        "train.py",
        "tests/test_train.py",
        [
            (
                "progress.rl_cursor += config.prompts_per_rollout",
                "progress.rl_cursor += 1",
                "problems asked again and again",
            ),
            (
                "weight = len(batch.index) / total",
                "weight = 1 / len(batches)",
                "an answer weighs more in a small micro-batch",
            ),
            ("weight = len(logp) / total", "weight = 1 / len(batches)", "a token weighs more in a small micro-batch"),
            ("                progress.sft_cursor += config.batch_size\n", "", "the same examples for ever"),
            ("rollout and rollout.state()", "None", "a rollout in progress is lost"),
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
        ],
    ),
    (
        "sample.py",
        "tests/test_sample.py",
        [
            ('if not text.endswith("\\ufffd"):', "if True:", "half a character on the screen"),
            (
                '        messages.append({"role": "assistant", "content": answer})',
                "        messages.clear()",
                "a chat that forgets",
            ),
        ],
    ),
    (
        "train.py",
        "tests/test_train.py",
        [
            (
                "        temperature=config.temperature,\n        device=config.device,",
                "        temperature=1.0,\n        device=config.device,",
                "old log-probs scored at another temperature",
            ),
        ],
    ),
    (
        "nanogspo/checkpoint.py",
        "tests/test_checkpoint.py",
        [
            (
                't["start"] + 8 + length, t["end"] + 8 + length',
                't["start"] + length, t["end"] + length',
                "every tensor read 8 bytes early",
            ),
        ],
    ),
    (
        "nanogspo/lora.py",
        "tests/test_lora.py",
        [
            (
                "draw = torch.rand(layer.lora_A.weight.shape, generator=generator) * (2 * bound) - bound",
                "draw = torch.zeros(layer.lora_A.weight.shape)",
                "A and B both zero: no gradient ever",
            ),
            (
                "return (self.base.weight.detach().float() + update * self.scale).to(self.base.weight.dtype)",
                "return self.base.weight.detach() + (update * self.scale).to(self.base.weight.dtype)",
                "merging rounds twice",
            ),
        ],
    ),
    (
        "nanogspo/rollout.py",
        "tests/test_rollout.py",
        [
            (
                "return token.squeeze(1), logp.gather(1, token).squeeze(1)",
                "return token.squeeze(1), logits.log_softmax(-1).gather(1, token).squeeze(1)",
                "log-prob kept at another temperature than it was drawn with",
            ),
        ],
    ),
    (
        "nanogspo/packing.py",
        "tests/test_packing.py",
        [
            (
                "[False] * len(prompt) + [True] * len(answer)",
                "[False] * len(prompt) + [True] * (len(answer) - 1) + [False]",
                "the stop token is not scored",
            ),
        ],
    ),
    (
        "nanogspo/tokenizer.py",
        "tests/test_tokenizer.py",
        [
            (
                "loss_mask += [True] * produced + [False] * (len(answer) - produced)",
                "loss_mask += [True] * (produced - 1) + [False] * (len(answer) - produced + 1)",
                "the turn end is not learnt",
            ),
        ],
    ),
]

MUTANTS = [Mutant(file, right, wrong, test, why) for file, test, rows in GROUPS for right, wrong, why in rows]
