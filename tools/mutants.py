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
        "nanogspo/lora.py",
        "tests/test_model.py",
        [
            (
                "self.lora_B.weight, self.scale)\n\n    def merged",
                "self.lora_B.weight, 0.0)\n\n    def merged",
                "sampled without the adapter",
            ),
            (
                "            return Layer(self.base.weight, self.base.bias)\n",
                "            pass\n",
                "a merged adapter is sampled twice",
            ),
        ],
    ),
    (
        "nanogspo/experience.py",
        "tests/test_train.py",
        [
            ("if advantages[i] != 0]", "]", "answers with nothing to teach are trained on"),
            ("torch.tensor(kept)[b.index]", "b.index + rows[0]", "advantages of other answers, once some are left out"),
            (
                "min(rows, key=lambda",
                "max(rows, key=lambda",
                "of a minibatch with nothing to teach the longest is kept",
            ),
            ("if update or score_first", "if update and score_first", "no first rollout is scored twice"),
        ],
    ),
    (
        "train.py",
        "tests/test_train.py",
        [
            ("planner.cache_slots(config, longest)", "10**9", "an exam of 500 rows at a time"),
            ("loss * share", "loss", "what is left out does not count in the average"),
            ("score_first=not proved", "score_first=False", "nothing compares the two passes"),
            (
                "                    proved = True",
                "                proved = True",
                "a resumed run trusts in what it has not seen",
            ),
        ],
    ),
    (
        "nanogspo/cache.py",
        "tests/test_cache.py",
        [
            (
                "if self.extent == self.capacity:",
                "if self.extent + 1 == self.capacity:",
                "the last slot cannot be used",
            ),
            ("self.prefix_lengths[self.prompt] + self.lengths", "self.lengths", "answers begin at position 0"),
            (
                "self.prompt, self.lengths, self.running = self.prompt[rows]",
                "self.prompt, self.lengths, self.running = self.prompt[: len(rows)]",
                "rows that stay read another prompt",
            ),
            (
                "self.extent, self._plans = self.extent + 1, {}",
                "self.extent += 1",
                "every step sees what the first one saw",
            ),
            ("self.k[layer][:, :, self.extent - 1] = k", "self.k[layer][:, :, 0] = k", "each key replaces the first"),
        ],
    ),
    (
        "nanogspo/rollout.py",
        "tests/test_recorded.py",
        [
            (
                "        self.number += 1\n",
                "        self.number = self.number + 1\n",
                "a graph that draws one number for ever",
            ),
            (
                "        self.tokens.copy_(tokens)\n",
                "        self.tokens = tokens\n",
                "a graph that goes on from a token of its own past",
            ),
            ("            self.cache.count()\n", "", "a cache that leaves no trace of replayed steps to copy"),
            (
                "            self.cache.extent = extent  # recording ran nothing but Python\n",
                "",
                "a slot counted and never filled",
            ),
            (
                "self._warm, self._replay = False, None  # first",
                "self._warm = False  # first",
                "the graph of rows that left",
            ),
            (
                "(tokens[:, None] == self.stop).any(1)",
                "torch.tensor([t in self.stop.tolist() for t in tokens.tolist()])",
                "a step that waits for the GPU",
            ),
            ("self.graphs and self._warm and left", "self.graphs and left", "recorded before its kernels are compiled"),
            ("left >= RECORD_FROM", "left > RECORD_FROM", "recorded one step too late"),
            ("self.graphs = Batch.graphs_work = False", "self.graphs = False", "a refusal at every rollout"),
            (
                "                while error.__context__ is not None:",
                "                while False:",
                "what the last call says in place of what went wrong",
            ),
            (
                "        try:\n            step()\n        finally:\n            graph.capture_end()\n",
                "        step()\n        graph.capture_end()\n",
                "a recording that failed and never ends",
            ),
        ],
    ),
    (
        "nanogspo/cache.py",
        "tests/test_recorded.py",
        [
            (
                "        self.lengths += self.running\n",
                "        self.lengths = self.lengths + self.running\n",
                "a graph in which no row grows",
            ),
            ("        self.lengths *= self.running\n", "", "finished rows are read to the end"),
            (
                "self.running.masked_fill_(ends, 0)",
                "self.running.masked_fill_(~ends, 0)",
                "only finished rows are read",
            ),
            (", self.running[rows]\n", ", self.running[: len(rows)]\n", "rows that go on read nothing"),
            ("        self.slot += 1\n", "        self.slot.fill_(self.extent - 1)\n", "a slot that Python counts"),
            (
                "self.v[layer].index_copy_(2, self.slot, v.unsqueeze(2))",
                "self.v[layer][:, :, self.extent - 1] = v",
                "a value's slot that Python counts",
            ),
        ],
    ),
    (
        "nanogspo/model.py",
        "tests/test_recorded.py",
        [
            (
                "x.new_full((), config.hidden_size**0.5)",
                "torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)",
                "a number that Python sends at every step",
            ),
        ],
    ),
    (
        "kernels/blocked.py",
        "tests/test_blocked.py",
        [
            ("layer.B * layer.scale", "layer.B", "the adapter's scale is forgotten"),
            ("                    column += r\n", "", "adapters share the columns of the first"),
            (
                "                start += out\n",
                "                start += out if layer.A is not None else 0\n",
                "an adapter beside the layer before its own",
            ),
            ("zero if b is None else b", "zero", "biases are dropped"),
            ("weight.dtype == torch.bfloat16 and", "weight.dtype.is_floating_point and", "blocks of fp16"),
        ],
    ),
    (
        "nanogspo/planner.py",
        "tests/test_planner.py",
        [
            ("max(element, 4)", "element", "a CPU's cache counted in bf16"),
            ("if name not in (CACHE, BLOCKS)", "if name", "checkpointing for the sake of a cache that is gone by then"),
            ("if needed <= FILL * available:", "if needed >= FILL * available:", "checkpointing where memory abounds"),
            (
                "rows * (config.max_new_tokens - 1)",
                "rows * config.max_new_tokens",
                "a slot for the last token, which is never fed",
            ),
        ],
    ),
    (
        "kernels/decode_attention.py",
        "tests/test_decode_attention.py",
        [
            (
                "s = s * shrink + tl.sum(e, axis=1)",
                "s = s + tl.sum(e, axis=1)",
                "sums are not rescaled to a new maximum",
            ),
            (
                "acc = acc * shrink[:, None] + tl.dot(",
                "acc = acc + tl.dot(",
                "values are not rescaled to a new maximum",
            ),
            (
                "alive = valid & (prompt == p) & (length > 0)",
                "alive = valid & (prompt >= p) & (length > 0)",
                "rows see the prompts before theirs as well",
            ),
            ("alive = valid & (prompt == p) & (length > 0)", "alive = valid & (prompt == p)", "the dead read prompts"),
            (
                "oldest = tl.maximum(end + length - window, 0)",
                "oldest = tl.maximum(end + length - window - 1, 0)",
                "prefix: one key too many (triton)",
            ),
            (
                "oldest += tl.maximum(length - window, 0)",
                "oldest += tl.maximum(length - window - 1, 0)",
                "suffix: one key too many (triton)",
            ),
            (
                "weight = tl.where(full, tl.exp(m - tl.max(m, axis=0)), 0.0)",
                "weight = tl.where(full, 1.0, 0.0)",
                "parts are merged without their maxima",
            ),
            ("inside = slot < stop", "inside = slot < stop + 1", "a slot behind the end is read"),
            (
                "- split * chunk, 0) // BLOCK_S * BLOCK_S  # tiles",
                "- split * chunk, 0)  # tiles",
                "where tiles begin depends on the neighbours' window",
            ),
            ("mask=(valid & (s > 0))[:, None]", "mask=(valid & (s > 1))[:, None]", "parts of a single key are lost"),
            (
                "mask=full[:, None] & (d < D)[None, :]",
                "mask=(part < PARTS)[:, None] & (d < D)[None, :]",
                "unwritten parts are read: 0 * nan",
            ),
            ("scores.add_(plan.hidden)", "scores.add_(0)", "torch: nothing is hidden"),
            (").mul_(scale)", ")", "torch: the scale is forgotten"),
            (
                ".baddbmm_(share, prefix_values)",
                ".baddbmm_(share, prefix_values, beta=0)",
                "torch: the row's own part is overwritten",
            ),
            (
                "oldest = [max(0, prefix[p] + n - window) if window",
                "oldest = [max(0, prefix[p] + n - window - 1) if window",
                "torch: one key too many in the window",
            ),
            (
                "x.view(K, N, -1, D).masked_fill(plan.unused, 0.0).view_as(x)",
                "x.view_as(x)",
                "torch: unused slots reach a product",
            ),
            ("x = tl.where(x < 0, -softcap, softcap) *", "x = softcap *", "triton: softcap loses the sign"),
            (
                "out[:, rows] += torch.bmm",
                "out[:, rows] = torch.bmm",
                "torch: the row's own part is overwritten, prompts apart",
            ),
            (
                "unused, width = torch.cat((slot >= end, unused), dim=1), 0",
                "unused, width = torch.cat((slot > end, unused), dim=1), 0",
                "torch: the slot behind a copied prefix reaches a product",
            ),
            (
                "(prompt, slice(start, stop)), []",
                "(prompt, slice(0, stop - start)), []",
                "torch: copies begin at slot 0",
            ),
            (
                "together=len(blocks) == 1 and blocks[0][0] == slice(0, P)",
                "together=len(blocks) == 1",
                "torch: rows share in the prompts of others",
            ),
        ],
    ),
    (
        "kernels/attention.py",
        "tests/test_attention.py",
        [
            (
                "torch.logaddexp(whole, part_lse)",
                "torch.maximum(whole, part_lse)",
                "pieces join by the larger lse alone",
            ),
            (
                "lead + i + n - low > bound else 0",
                "lead + i + n - low > bound + 1 else 0",
                "a piece one key too long is not masked",
            ),
            (
                "min(lengths[i], window - 1)",
                "min(lengths[i], window - 2)",
                "the last token that sees the prompt does not",
            ),
            ("(key > query - piece.window)", "(key >= query - piece.window)", "the window is one key too wide"),
            ("t = x.abs().mul_(-2).exp_()", "t = x.abs().mul_(-1).exp_()", "another slope of the soft-cap"),
            (
                "_blocks(whole, *block).add_(part)",
                "_blocks(whole, *block).copy_(part)",
                "the last answer alone trains the prompt",
            ),
            ("rescale = tl.exp2(m - m_new)", "rescale = tl.exp2(m - m)", "sums are not rescaled to a new maximum"),
            (
                "reach = first + OWNED - 1 + window",
                "reach = first + window",
                "queries at the window's edge do not reach the keys",
            ),
            (
                "for g in range(GROUP):",
                "for g in range(1):",
                "only the first query head of a group trains its key head",
            ),
            (
                "family_end[parent] = starts[i + 1]",
                "family_end[parent] = starts[parent + 1]",
                "answers do not train their prompt",
            ),
            ("m + tl.log2(s), mask", "m, mask", "the lse is the maximum"),
            ("tl.store(dq_ptr + at, dq * scale,", "tl.store(dq_ptr + at, dq,", "dq without the scores' factor"),
            ("m = tl.full((OWNED,), -1e30,", 'm = tl.full((OWNED,), -float("inf"),', "a first tile of nothing is nan"),
            (
                "(key[:, None] <= query[None, :])",
                "(key[:, None] < query[None, :])",
                "a key is not trained by its own query",
            ),
            ("(parent != i - 1 and prefix[i - 1] != parent)", "False", "answers may stand anywhere"),
        ],
    ),
    (
        "kernels/backend.py",
        "tests/test_backend.py",
        [
            (
                "    finally:\n        torch.backends.mkldnn.matmul.fp32_precision = before\n",
                "    finally:\n        pass\n",
                "every later fp32 product is rounded to bf16",
            ),
            (
                "    try:\n        yield\n    finally:\n",
                "    yield\n    if True:\n",
                "the same, after an exception",
            ),
            (
                "    if wanted:\n        torch.backends",
                "    if True:\n        torch.backends",
                "fp32 operands lose 16 of their bits",
            ),
        ],
    ),
    (
        "nanogspo/model.py",
        "tests/test_model.py",
        [
            (
                "        if not self.config.qk_norm:\n",
                "        if True:\n",
                "heads are not normalised",
            ),
            (
                "h, x = self.post_attention_layernorm.add(x, mixed)",
                "h, _ = self.post_attention_layernorm.add(x, mixed)",
                "the attention's output never reaches the residual stream",
            ),
            (
                "(key > query - window))[:, None]",
                "(key >= query - window))[:, None]",
                "a sliding window one key too wide",
            ),
            (
                "if not window or order.shape[1] <= window:",
                "if not window or order.shape[1] <= window + 1:",
                "the shortcut skips a window that already bites",
            ),
            (
                "x = x * x.new_full((), config.hidden_size**0.5)",
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
                "if self.gradient_checkpointing and torch.is_grad_enabled():",
                "if False:",
                "gradient checkpointing does nothing",
            ),
            (
                "return x + self.post_feedforward_layernorm(self.mlp(h))",
                "return x + self.mlp(h)",
                "the last sandwich norm left out",
            ),
            (
                "with bf16_products(weight.dtype == hidden.dtype == torch.bfloat16):",
                "with bf16_products(True):",
                "fp16 heads and fp32 hidden states rounded to bf16",
            ),
            (
                "                module.part()\n",
                "                pass\n",
                "sampling goes on with the weights of the last rollout",
            ),
            (
                "            self._blocked_head = None\n\n",
                "\n",
                "sampling goes on with the head of the last rollout",
            ),
            (
                "if names in self._together and not torch.is_grad_enabled():",
                "if names in self._together:",
                "training reads the copies that carry no gradient",
            ),
            (
                "order = segments.positions[None]  # (1, T)",
                "order = torch.arange(T, device=tokens.device)[None]  # (1, T)",
                "an answer stands behind the answers before it, not behind its prompt",
            ),
            (
                '"softcap": config.attn_softcap or None, "window": self.window}',
                '"softcap": config.attn_softcap or None, "window": 0}',
                "no window in a packed row",
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
            ("if self.dropout and self.training:", "if self.dropout:", "dropout while sampling and scoring"),
            (
                "        dh = wide @ B * layer.scale  # (n, r)\n",
                "        dh = wide @ B  # (n, r)\n",
                "dA and the adapter's dx without alpha / r",
            ),
            (
                "dB = wide.T @ (x_wide @ A.T * layer.scale)",
                "dB = wide.T @ (x_wide @ A.T)",
                "dB without alpha / r",
            ),
            (
                "dx = _add(dy @ dense_weight(layer.base, dy.dtype), dh, A, 1.0)",
                "dx = _add(dy @ dense_weight(layer.base, dy.dtype), dh, A, layer.scale)",
                "alpha / r twice in dx",
            ),
            (
                "        dA = dh.T @ x_wide  # (r, in)\n",
                "        dA = (dh.to(x.dtype).T @ x).float()  # (r, in)\n",
                "dA out of bf16 products: a sum over all tokens, rounded to 8 bits",
            ),
            (
                "ctx.save_for_backward(x, A, B)",
                "ctx.save_for_backward(x.float(), A, B)",
                "a copy of x in fp32 for every adapter, as autograd would keep it",
            ),
            (
                "torch.addmm(y.float(), a, b, alpha=scale).to(y.dtype)",
                "torch.addmm(y, a.to(y.dtype), b.to(y.dtype), alpha=scale)",
                "the update multiplied in bf16",
            ),
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
            ("(m.lora_B.weight * m.scale).to(dtype)", "m.lora_B.weight.to(dtype)", "sampling forgets the scale"),
            ("if m in adapted else None", "if hasattr(m, 'r') else None", "a merged adapter is added once more"),
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
            ("right=True)", "right=False)", "a token of probability 0 is drawn at uniform 0"),
            (
                "model.logits(hidden[segments.cu_seqlens[1:].long() - 1])",
                "model.logits(hidden[segments.cu_seqlens[:-1].long()])",
                "the first token is drawn after the prompt's first",
            ),
            (
                "                rows = [rows[n] for n in running]\n",
                "                rows = rows[: len(running)]\n",
                "answers mixed up once the batch shrinks",
            ),
            (
                "        self.cache.keep(kept)\n",
                "        self.cache.keep(kept - kept[0])\n",
                "rows go on in others' caches",
            ),
            ("self.uniforms[:, kept]", "self.uniforms[:, : len(rows)]", "draws that depend on who has finished"),
            ("if not running or not left:", "if not running or left == 1:", "an answer one token short"),
            (
                "inside.masked_fill_(columns >= z.shape[1], 0.0).cumsum_(-1)",
                "inside.cumsum_(-1)",
                "the last token stands for what is missing of its block",
            ),
            (
                "target - F.pad(cumulative, (1, 0))",
                "target - F.pad(cumulative, (0, 1))",
                "each block searched from the end of it",
            ),
            ("- best + likeliest.log()", "- best", "log-probs that are not normalised"),
            ("before >= top_p", "before > top_p", "one token too many where the mass is met exactly"),
            ("seed=seed + first,", "seed=seed,", "equal draws in every slice"),
        ],
    ),
    (
        "nanogspo/packing.py",
        "tests/test_packing.py",
        [
            ("targets += [own[t + 1] for t in hits]", "targets += [own[t] for t in hits]", "a token predicts itself"),
            (
                "scored += [len(tokens) + t for t in hits]",
                "scored += [len(tokens) + t + 1 for t in hits]",
                "the hidden state that has seen the token predicts it",
            ),
            (
                "return self.tokens[: self.loss_mask.index(True, 1) - 1]",
                "return self.tokens[: self.loss_mask.index(True, 1)]",
                "the prompt's last token shared as well: nothing is left to predict an answer's first",
            ),
            (
                "self.loss_mask.index(True, 1) - 1]",
                "self.loss_mask.index(True) - 1]",
                "a first token marked as scored ends the prompt before it begins",
            ),
            (
                "            if used + new + prompt * (not begun) > max_tokens:\n",
                "            if used + new > max_tokens:\n",
                "a prompt more than the memory was planned for",
            ),
            (
                "                used, begun = 0, False\n",
                "                used = 0\n",
                "a family split by the budget goes on without its prompt in another's",
            ),
            (
                "                used, begun = used + prompt, True\n",
                "                begun = True\n",
                "prompts cost nothing",
            ),
            ("            used += new\n", "            used += new + 1\n", "a budget that is not used up"),
            (
                " and examples[last].prompt == prompt:",
                " and len(examples[last].prompt) == len(prompt):",
                "another prompt of the same length is shared",
            ),
            ("while len(prompt) >= SHARE_FROM and", "while", "a piece of attention for a prompt of two tokens"),
            (
                "prompt, parent = examples[family[0]].prompt, len(lengths)",
                "prompt, parent = examples[family[0]].prompt, 0",
                "every answer reads the first family's prompt",
            ),
            (
                "            parents.append(parent)\n",
                "            parents.append(-1)\n",
                "answers without their prompt",
            ),
            (
                "            tokens += own[:-1]\n            lengths.append(len(own) - 1)\n",
                "            tokens += own\n            lengths.append(len(own))\n",
                "a token in each example that predicts nothing",
            ),
            (
                "own, mask = e.tokens[len(prompt) :], e.loss_mask[len(prompt) :]",
                "own, mask = e.tokens[len(prompt) :], e.loss_mask",
                "the mask of the prompt over the answer",
            ),
            (
                "torch.tensor([i for family in families for i in family])",
                "torch.tensor(sorted(i for family in families for i in family))",
                "advantages of other answers, once they are sorted by length",
            ),
            (
                "segments=batch.segments)[0, batch.scored]",
                "segments=None)[0, batch.scored]",
                "a packed row is read as one sequence",
            ),
            (
                'names = ("tokens", "segments", "scored", "targets", "cu_seqlens")',
                'names = ("tokens", "segments", "scored", "targets")',
                "offsets stay behind on the CPU",
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
            (
                "whole = groups * prompt + size * answer",
                "whole = size * (prompt + answer)",
                "memory for a prompt for each answer",
            ),
            (
                "groups = max((min(first + size, N) - 1) // G - first // G + 1 for first in range(0, N, size))",
                "groups = size // G",
                "updates that begin within a group",
            ),
            ("element * (2 * queries + 2 * keys", "element * (3 * queries + 2 * keys", "a second copy of out"),
        ],
    ),
    (
        "nanogspo/experience.py",
        "tests/test_train.py",
        [
            (
                "[examples[i] for i in kept]",
                "[examples[i - first] for i in kept]",
                "every minibatch trains on the answers of the first",
            ),
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
                "weight, loss = len(batch.index) / trained, loss * share",
                "weight, loss = 1 / len(batches), loss * share",
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
                "return (weight.float() + update * self.scale).to(weight.dtype)",
                "return weight + (update * self.scale).to(weight.dtype)",
                "merging rounds twice",
            ),
        ],
    ),
    (
        "nanogspo/rollout.py",
        "tests/test_rollout.py",
        [
            (
                "return token.squeeze(1), (z.gather(1, token) - best + likeliest.log()).squeeze(1)",
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
    (
        "nanogspo/quant.py",
        "tests/test_quant.py",
        [
            (
                "dx = dy @ ctx.layer.unpack(dy.dtype) if",
                "dx = dy @ ctx.layer.unpack(torch.float16).to(dy.dtype) if",
                "backward through other weights than forward",
            ),
            (
                "        ctx.layer = layer\n",
                "        ctx.layer = layer\n        ctx.save_for_backward(layer.unpack(x.dtype))\n",
                "every layer's wide weight alive until the backward pass",
            ),
            (
                "return fn(t.view(torch.int32)).view(torch.float32) if bits else fn(t)",
                "return fn(t)",
                "model.to(bf16) rounds the scales",
            ),
            (
                "        self.q = dataclasses.replace(self.q, **moved)\n",
                "",
                "the kernels read the old device's tensors",
            ),
            ("    model.requires_grad_(False)\n", "", "norms and embeddings trained beside packed weights"),
            (
                "self.record = nf4_record(q) if record is None else record",
                "self.record = nf4_record(q)",
                "a file's own record is not written back",
            ),
            (
                "    return packed + sum(p.numel()",
                "    return sum(p.numel()",
                "a packed model counts as a small one, and gets its learning rate",
            ),
            (
                '["lm_head", *(f"model.{name}" for name in plain)]',
                '["lm_head"]',
                "transformers looks for packed weights where there are none",
            ),
            (
                '"nested_offset": q.offset.item()',
                '"nested_offset": round(q.offset.item(), 6)',
                "an offset of 6 digits: other scales",
            ),
            ("if offset is not None and absmax.dtype != torch.uint8:", "if False:", "fp32 scales read as 8-bit codes"),
            (
                'if kind != "nf4" or nested != NESTED:',
                'if kind != "nf4":',
                "scales in blocks of 128 read as blocks of 256",
            ),
            (
                'for name, t in layer._buffers.items() if name not in ("weight", "nested_offset")',
                'for name, t in layer._buffers.items() if name != "weight"',
                "a tensor in the file that bitsandbytes does not know",
            ),
        ],
    ),
    (
        "nanogspo/checkpoint.py",
        "tests/test_quant.py",
        [
            (
                "match[1] in linear and match[2] not in companions[match[1]]",
                "match[1] in linear",
                "of two tensors for one place the last wins",
            ),
            (
                "                if tensor.dtype != dtype:\n",
                "                if False:\n",
                "packed from fp32 here, from bf16 by everybody else",
            ),
            (
                "        model.requires_grad_(False)  # packed",
                "        pass  # packed",
                "norms and embeddings of a 4-bit folder are trained",
            ),
            ("    as_nf4 = not (merge_lora and layers) and ", "    as_nf4 = ", "a merged export without the adapter"),
            (
                "merged(dtype) if merged else layer.unpack(dtype)",
                "layer.unpack(dtype)",
                "a merged export without the adapter",
            ),
            ("    return [] if q.shape == shape else", "    return [] if True else", "a transposed weight is loaded"),
            ('    if companions and quant == "int8":', "    if False:", "--quant int8 of a 4-bit folder is ignored"),
            (
                '    entries = [entry for entry in entries if DTYPES[entry["dtype"]].is_floating_point] or entries  # no packed bytes\n',
                "",
                "sample.py computes in uint8",
            ),
            (
                '                    raise ValueError(f"{file}: {name}: {e}") from e',
                "                    raise",
                "which of 400 tensors is not finite?",
            ),
            (
                "if isinstance(m, LINEAR) and not _inside_lora(n)",
                "if isinstance(m, nn.Linear) and not _inside_lora(n)",
                "an adapter of some layers says it is of all",
            ),
        ],
    ),
    (
        "nanogspo/lora.py",
        "tests/test_quant.py",
        [
            (
                "        weight = dense_weight(self.base, dtype)  # (out, in)\n",
                "        weight = dense_weight(self.base, torch.float32)  # (out, in)\n",
                "another base than the one that was trained over",
            ),
            ("    if packed:\n", "    if False:\n", "merging writes into a packed weight"),
            (
                "    total = weight_count(model)\n",
                "    total = sum(p.numel() for p in model.parameters())\n",
                "trained 30 % of all parameters",
            ),
        ],
    ),
    (
        "nanogspo/config.py",
        "tests/test_quant.py",
        [
            ('    if config.quant != "none" and not config.lora_r:', "    if False:", "full fine-tuning of nothing"),
        ],
    ),
    (
        "nanogspo/planner.py",
        "tests/test_quant.py",
        [
            (
                "sum(layer.nbytes for layer in packed)",
                "sum(layer.weight.nbytes for layer in packed)",
                "scales and tables not counted",
            ),
        ],
    ),
    (
        "train.py",
        "tests/test_quant.py",
        [
            (
                "    if packed_layers(model) and not config.lora_r:",
                "    if False:",
                "full fine-tuning of a 4-bit folder",
            ),
            ("dtype=DTYPES[config.dtype], quant=quant)", "dtype=DTYPES[config.dtype])", "--quant is ignored"),
        ],
    ),
    (
        "sample.py",
        "tests/test_quant.py",
        [
            (', quant=None if config.quant == "none" else config.quant)', ")", "--quant is ignored"),
        ],
    ),
    (
        "kernels/nf4.py",
        "tests/test_nf4.py",
        [
            (
                "return (code[:-1] + code[1:]) / 2",
                "return (code[:-1].double() + code[1:].double()).mul(0.5).float().nextafter(code[1:])",
                "thresholds that are not the fp32 midpoints",
            ),
            (
                "two steps ahead is on its way: 4 KB a step for 16 rows of bf16\n        enable_fp_fusion=False,",
                "two steps ahead is on its way: 4 KB a step for 16 rows of bf16",
                "the product fuses the two roundings of a scale",
            ),
            (
                "        BLOCKS=blocks,\n        num_warps=4,\n        enable_fp_fusion=False,",
                "        BLOCKS=blocks,\n        num_warps=4,",
                "decoding fuses the two roundings of a scale",
            ),
            (
                "a.clamp_min(1e-38).reciprocal()[:, None]",
                "a.reciprocal()[:, None]",
                "a block of zeros divides by 0 and its codes are no longer 0",
            ),
            (
                "scaled[-1] = x[-1] / a[-1]",
                "pass",
                "a short last block multiplies by the reciprocal, and one code in thousands moves",
            ),
            (
                "(code[:, :1] << 4) | code[:, 1:]",
                "(code[:, 1:] << 4) | code[:, :1]",
                "the low half of a byte comes first",
            ),
            (
                "/ 2 * 10.0 ** (e - 6)  # (2^e,)",
                "/ 2 * 10.0 ** (e - 7)  # (2^e,)",
                "the decades of the 8-bit map are one too low",
            ),
            (
                "position = (((scaled + 1) * 0.5).double() * 65535 + 0.5).float().int()",
                "position = ((scaled + 1) * 0.5).double() * 65535",
                "scales go to the nearest code, and not by way of 65,536 positions",
            ),
            (
                "return q.code2[stored.int()] * q.absmax2[group] + q.offset",
                "return torch.addcmul(q.offset.double(), q.code2[stored.int()].double(), q.absmax2[group].double()).float()",
                "the two roundings of a scale become one, as a fused multiply-add",
            ),
            (
                "torch.arange(first, last, device=stored.device) // NESTED",
                "torch.arange(last - first, device=stored.device) // NESTED",
                "every chunk starts again at the first absmax2",
            ),
            ("values[whole * size :].mul_(a[-1])", "pass", "the weights of a short last block are not scaled"),
            (
                "tl.join(codes >> 4, codes & 15)",
                "tl.join(codes & 15, codes >> 4)",
                "the kernel unpacks the low half first",
            ),
            ("b // 256, mask=mask, other=0.0)", "b // 64, mask=mask, other=0.0)", "absmax2 of the wrong group"),
            ("mask=i < n)", "mask=i < n + 1)", "the kernel writes one number beyond out"),
            (
                "mask=(k < K)[:, None] & (m < M)[None, :],",
                "mask=(k < K + 1)[:, None] & (m < M)[None, :],",
                "the product reads beyond a row of x",
            ),
            (
                "(n[:, None] * K + piece[None, :]) // SIZE",
                "n[:, None] * (K // SIZE) + piece[None, :] // SIZE",
                "scales of rows that do not start with a block",
            ),
            (
                ".to(x.dtype)  # (BLOCK_N, BLOCK_K) the very bits of dequantize_nf4",
                ".to(tl.bfloat16).to(x.dtype)  # (BLOCK_N, BLOCK_K)",
                "the product rounds its weights to bf16 whatever x is",
            ),
            (
                "return dy @ dequantize_nf4(ctx.q, dy.dtype, backend=ctx.backend), None, None",
                "return dy @ dequantize_nf4(ctx.q, torch.bfloat16, backend=ctx.backend).to(dy.dtype), None, None",
                "backward uses other weights than forward",
            ),
        ],
    ),
    (
        "kernels/nf4.cu",
        "tests/test_nf4.py",
        [
            ("(j % 2 ? 0 : 4)", "(j % 2 ? 4 : 0)", "the low half of a byte comes first"),
            ("word >> (q.log2_block - 3)", "word >> q.log2_block", "one scale for eight blocks"),
            ("q.absmax2[b >> 8]", "q.absmax2[b >> 7]", "absmax2 of the wrong group"),
            (
                "if (first + j < q.n) out[first + j]",
                "if (first + j <= q.n) out[first + j]",
                "writes one number beyond out",
            ),
            ("<< (8 * (i - first))", "<< (4 * (i - first))", "bytes of a last, short word overlap"),
            ("constexpr int PER_WORD = 8;", "constexpr int PER_WORD = 4;", "a word holds half as many weights"),
        ],
    ),
    (
        "kernels/int8.py",
        "tests/test_int8.py",
        [
            (
                "scale[rows] = absmax / 127",
                "scale[rows] = absmax / 128",
                "steps too small: the largest weight of a row is clipped",
            ),
            (".round_().clamp_(-127, 127)", ".add_(0.5).floor_().clamp_(-127, 127)", "ties go up and not to even"),
            ("tiny = torch.finfo(torch.float32).tiny", "tiny = 1e-4", "rows of small weights count as rows of zeros"),
            ("x.abs().amax(1)  # (r,)", "x.abs().amax().expand(len(x))  # (r,)", "one scale for all rows of a chunk"),
            (
                "tl.load(codes_ptr + i, mask=mask, other=0).to(tl.float32) * scale[:, None]",
                "tl.load(codes_ptr + i, mask=mask, other=0).to(tl.float32)",
                "the kernel forgets the scale",
            ),
            (
                "tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=mask)",
                "tl.store(out_ptr + i, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K + 1)[None, :])",
                "the kernel writes one number beyond out",
            ),
            (
                "mask=(k < K)[:, None] & (m < M)[None, :],",
                "mask=(k < K + 1)[:, None] & (m < M)[None, :],",
                "the product reads beyond a row of x",
            ),
            (
                "w = (codes.to(tl.float32) * scale[:, None]).to(x.dtype)",
                "w = (codes.to(tl.float32).to(x.dtype) * scale[:, None].to(x.dtype))",
                "the product rounds scales before it multiplies",
            ),
            (
                "backend=ctx.backend), None, None  # (M, K)",
                "backend=ctx.backend) * 0.99, None, None  # (M, K)",
                "the gradient is off by a percent",
            ),
        ],
    ),
    (
        "kernels/rms_norm.py",
        "tests/test_rms_norm.py",
        [
            (
                "h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)",
                "h = h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()",
                "the same number in other bits: a CPU run no longer gives what it gave",
            ),
            (
                "rstd = tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)",
                "rstd = tl.rsqrt(tl.sum(x * x, axis=1) / BLOCK_W + eps)",
                "the mean over the tile's padding as well",
            ),
            (
                "        x = total.to(tl.float32)  # (ROWS, BLOCK_W) what is",
                "        x = x + delta  # (ROWS, BLOCK_W) what is",
                "the norm of the sum before it was rounded, not of what later layers read",
            ),
            (
                "y = h.to(y_ptr.dtype.element_ty).to(tl.float32) * weight",
                "y = h * weight",
                "Llama's norm without its first rounding",
            ),
            (
                "        y = h * (1.0 + weight)",
                "        y = h.to(y_ptr.dtype.element_ty).to(tl.float32) * (1.0 + weight)",
                "Gemma's norm rounded twice",
            ),
            (
                "        scale = 1.0 + scale",
                "        scale = scale",
                "backward forgets that Gemma stores the weight minus 1",
            ),
            ("dx = rstd * (dh - h * along)", "dx = rstd * dh", "rstd taken for a constant"),
            ("along = tl.sum(dh * h, axis=1)", "along = tl.sum(dy * h, axis=1)", "the projection before the weight"),
            (
                "            dweight += dy * h",
                "            dweight = dy * h",
                "only the last tile of a program reaches dweight",
            ),
            ("            dweight += dy * h", "            dweight += dh * h", "the weight in its own gradient"),
            ("n = (p * tiles + i) * ROWS", "n = (p + tiles * i) * ROWS", "programs take each other's rows"),
            (
                "dx += tl.load(dsum_ptr + n[:, None] * stride_dsum",
                "dx += tl.load(dsum_ptr + n[:, None] * stride_dy",
                "the strides of one upstream gradient used for the other",
            ),
            (
                "return dsum, dsum if want_ddelta else None, None, None, None",
                "return None, None, None, None, None",
                "no gradient where only the sum is used",
            ),
            (
                "n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,) int64",
                "n = tl.program_id(0).to(tl.int64) * (ROWS - ROWS // 4) + tl.arange(0, ROWS)  # (ROWS,) int64",
                "tiles that overlap leave the last rows unwritten",
            ),
        ],
    ),
    (
        "kernels/rope.py",
        "tests/test_rope.py",
        [
            (
                "torch.cat((-second, first), dim=-1)",
                "torch.cat((second, -first), dim=-1)",
                "the reference turns the other way",
            ),
            (
                "    y_first = first * cos - second * sin",
                "    y_first = first * cos + second * sin",
                "a shear in place of a rotation",
            ),
            (
                "square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)  # (ROWS,)\n        if R < D:",
                "square = tl.sum(first * first, axis=1)  # (ROWS,)\n        if R < D:",
                "the mean square of half a head",
            ),
            (
                "        d_second = dy_second * cos - dy_first * sin",
                "        d_second = dy_second * cos + dy_first * sin",
                "backward turns one half forwards",
            ),
            (
                "            d_first = rstd * (d_first - first * along)",
                "            d_first = rstd * d_first",
                "rstd taken for a constant in half the head",
            ),
            (
                "                along += tl.sum(d_tail * tail, axis=1)",
                "                pass",
                "the part that is not turned is normed all the same",
            ),
            (
                "                dw_second += d_second * second",
                "                dw_second += d_second * first",
                "dweight of the second half from the first",
            ),
            (
                "                    dw_tail += d_tail * tail",
                "                    dw_tail = d_tail * tail",
                "only the last tile of a program reaches dweight",
            ),
            (
                "(row % heads).to(tl.int64), row < rows",
                "(row % heads).to(tl.int64), row < rows - 1",
                "the last head is left as it was in memory",
            ),
            (
                "_places(p * tiles + step, heads, T, rows, ROWS)",
                "_places(p + tiles * step, heads, T, rows, ROWS)",
                "programs take each other's heads",
            ),
            (
                "return self.cos.shape[1] if self.cos.shape[0] > 1 else 0",
                "return 0",
                "every row of the batch at the positions of the first",
            ),
            (
                "K, T, tokens * K, eps, NORM, PLUS, D, R, ROWS",
                "H, T, tokens * K, eps, NORM, PLUS, D, R, ROWS",
                "keys turned as if there were as many heads of them as of queries",
            ),
            ('"PLUS": float(self.plus_one)', '"PLUS": 0.0', "Gemma's qk-norm with the weight as stored"),
            (
                "return x if x.stride(-1) == 1 else x.contiguous()",
                "return x",
                "an expanded upstream gradient read as if its channels were neighbours",
            ),
        ],
    ),
    (
        "kernels/glu.py",
        "tests/test_glu.py",
        [
            (
                "    return act * up  # (..., F)",
                "    return (act.float() * up.float()).to(gate.dtype) + 0.0 * up  # (..., F)",
                "the reference no longer gives the bits and gradients it gave",
            ),
            (
                "1.5957691216057308 * c * (1.0 + 0.044715 * c * c)",
                "0.7978845608028654 * c * (1.0 + 0.044715 * c * c)",
                "the argument of tanh, not twice it",
            ),
            ("(1.0 + 0.134145 * c * c)", "(1.0 + 0.044715 * c * c)", "the derivative of g^3 without its 3"),
            ("c = tl.minimum(tl.maximum(g, -12.0), 12.0)", "c = g", "inf * 0 in the gradient of a gate of 1e20"),
            (
                "    e = tl.exp(-tl.abs(v))",
                "    e = tl.exp(-v)",
                "overflow where the gate is shut, and the two sigmoids swapped",
            ),
            (
                "p, q, slope = _sigmoids(g, GELU)",
                "p, q, slope = _sigmoids(g.to(gate_ptr.dtype.element_ty).to(tl.float32) * 1.001, GELU)",
                "a gradient a thousandth off",
            ),
            (
                "near, far = 1.0 / (1.0 + e), e / (1.0 + e)",
                "near, far = 1.0 / (1.0 + e), 1.0 - 1.0 / (1.0 + e)",
                "1 - sigmoid as a subtraction: no digits left in the tail",
            ),
            ("dgate = dy * u * (p + g * p * q * slope)", "dgate = dy * u * p", "the gate's own slope forgotten"),
            ("dup = dy * (g * p)", "dup = dy * p", "dup is the sigmoid, not the activation"),
            (
                "tl.store(y_ptr + n * F + f, (g * p * u)",
                "tl.store(y_ptr + n * F + f, ((g * p).to(y_ptr.dtype.element_ty).to(tl.float32) * u)",
                "rounded twice, as torch does",
            ),
            (
                "u = tl.load(up_ptr + n * stride_up + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)\n    p, _, _",
                "u = tl.load(up_ptr + n * stride_gate + f, mask=f < F, other=0.0).to(tl.float32)  # (BLOCK_F,)\n    p, _, _",
                "one stride for two tensors",
            ),
            (
                "return x if x.stride(1) == 1 else x.contiguous()",
                "return x",
                "a transposed projection read as if it were not",
            ),
        ],
    ),
    (
        "kernels/seq_logprob.py",
        "tests/test_seq_logprob.py",
        [
            ("_put(z, column, inside, z.new_full((), -math.inf))", "pass", "target counted among the others"),
            ("torch.maximum(m, z.amax(1))", "torch.maximum(m, 0 * z.amax(1))", "no running maximum"),
            ("s[:] = s * scale + e.sum(1)", "s[:] = s + e.sum(1)", "old sum not rescaled"),
            ("a[:] = (a + s * down) * scale", "a[:] = a * scale", "entropy sum not shifted to the new maximum"),
            ("state[:, 0] = info.min / 2", "state[:, 0] = -math.inf", "start from -inf"),
            ("torch.where(s == 0, UNDERFLOW, s.log())", "s.log()", "V = 1 has log 0"),
            (".clamp_min_(UNDERFLOW)", "", "-inf * 0 in the entropy"),
            (
                "logp = logsigmoid(margin)",
                "logp = gap - torch.logaddexp(log_s, gap)",
                "equation (1): logp of -1e-8 rounds to 0",
            ),
            ("logp.expm1() * (logp_m", "(logp.exp() - 1) * (logp_m", "1 - p_y cancels in the entropy"),
            ("logp.clamp_min(floor)", "logp", "0 * -inf for a banned target"),
            ("z_y >= m", "z_y > m", "ties are not top"),
            (
                "sums = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32",
                "sums = hidden.dtype",
                "logits in bf16",
            ),
            (
                "torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)",
                "torch.mm(a.to(out.dtype), b.to(out.dtype))",
                "autocast takes the logits to bf16",
            ),
            ("z.div_(options.temperature)", "z.mul_(options.temperature)", "temperature the wrong way"),
            (".tanh_().mul_(options.softcap)", ".tanh_()", "soft-cap does not scale back"),
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
            ("dlogp = dlogp / options.temperature", "dlogp = dlogp * 1", "no 1 / T in the gradient"),
            (
                "dentropy = dentropy / options.temperature if",
                "dentropy = dentropy * 1 if",
                "no 1 / T in the entropy's gradient",
            ),
            (
                "return (4 * t).div_((1 + t).square_())",
                "return 1 - ((1 - t) / (1 + t)).square_()",
                "1 - tanh^2 cancels",
            ),
            ("dz.mul_(slope)", "dz.mul_(1)", "no slope of the soft-cap in the gradient of the tiles"),
            ("e.mul_(slope)", "e.mul_(1)", "no slope of the soft-cap in G"),
            (
                "_cap(x, options).sub_(m).add_(logp_m)",
                "_cap(x, options).sub_(m - logp_m)",
                "one large number instead of two small",
            ),
            ("exp_().mul_(pull).neg_()", "exp_().mul_(pull)", "sign of the gradient"),
            ("_put(dz, *_find(targets, vocab), dz_y)", "pass", "target's own gradient forgotten"),
            (
                "dw = numbers.new_zeros(w.shape) if",
                "dw = numbers.new_zeros(w.shape, dtype=weight.dtype) if",
                "dweight summed in 16 bits",
            ),
            (
                "_addmm(dhidden[rows], dx, w)",
                "torch.mm(dx, w, out=dhidden[rows])",
                "only the last tile of the vocabulary",
            ),
            ("g[rows].mul_(scale[:, None])", "pass", "G not rescaled to the new maximum"),
            ("-logp.expm1() / options.temperature,", "(1 - logp.exp()) / options.temperature,", "1 - p_y cancels in G"),
            ("g.mul_(-others[:, None])", "g.mul_(others[:, None])", "sign of the others in G"),
            ("own = own * _slope(x_y, options.softcap)", "own = own * 1", "no slope of the target in G"),
            (
                "min(TILE // width, TALLEST) // ALIGN",
                "min(N, TILE // width, TALLEST) // ALIGN",
                "the product's shape follows N, and so do the bits",
            ),
            ("TALLEST) // ALIGN * ALIGN)", "TALLEST))", "blocks of 9 rows"),
            ("if odd := -weight.shape[1] % ALIGN:", "if odd := 0:", "rows that begin anywhere in memory"),
            ("if G and dentropy is None:", "if G:", "the entropy's gradient is dropped under a frozen head"),
            (
                "torch.float32 if hidden.dtype == torch.float16 else hidden.dtype",
                "hidden.dtype",
                "G stored in fp16: small ones are 0",
            ),
            ("keep = torch.is_grad_enabled() and hidden", "keep = hidden", "a scoring pass pays for G"),
            (
                "hidden.requires_grad and not weight.requires_grad",
                "hidden.requires_grad",
                "a trained head gets no gradient",
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
                'sums = torch.segment_reduce(column, "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)',
                "sums = torch.cat([values.new_zeros(1), values.cumsum(0)])[cu_seqlens.long()].diff()[:, None]",
                "cumulative sum: bits depend on neighbours",
            ),
        ],
    ),
    (
        "kernels/seq_logprob.py",
        "tests/test_seq_logprob_triton.py",
        [
            (
                'z = tl.where((v == y) | (v >= width), -float("inf"), z) - m',
                'z = tl.where(v >= width, -float("inf"), z) - m',
                "target counted among the others of a row",
            ),
            (
                "z = tl.where(z < UNDERFLOW, UNDERFLOW, z)  # not",
                "z = tl.where(z > UNDERFLOW, z, UNDERFLOW)  # not",
                "a nan becomes a probability of 0",
            ),
            ("s_old * scale + s)", "s_old + s)", "old sum of a row not rescaled"),
            ("(a_old + s_old * down) * scale + a)", "a_old * scale + a)", "entropy sum of a row not shifted"),
            (
                "mask=c[None, :] < C, other=0.0)  # (BLOCK_N, BLOCK_C)",
                "mask=c[None, :] < C + BLOCK_C, other=0.0)  # (BLOCK_N, BLOCK_C)",
                "hidden is read into the next row",
            ),
            (
                "mask=(v[None, :] < width) & (c[:, None] < C)",
                "mask=v[None, :] < width",
                "weight is read beyond its columns",
            ),
            (
                'z = tl.where(hit | (v[None, :] >= width), -float("inf"), z)',
                'z = tl.where(hit, -float("inf"), z)',
                "padding of the vocabulary is counted",
            ),
            ("_damped(e, x, softcap, SOFTCAP), mask=kept", "e, mask=kept", "no slope of the soft-cap in the epilogue"),
            ("4.0 * r * (1.0 - r)", "1.0 - (1.0 - 2.0 * r) * (1.0 - 2.0 * r)", "1 - tanh^2 cancels"),
            ("far = peak > FAR", "far = peak > 1e30", "exp overflows for targets far below the maximum"),
            (
                "_addmm(g, e[:, : len(w)], w)",
                "_addmm(g[:N], e[:N, : len(w)], w)",
                "the second product's shape follows N, and so do the bits",
            ),
            ("gap >= peak", "gap > peak", "ties are not top"),
            ("+ first_tile + tile", "+ tile", "parts of a later slice overwrite those of the first"),
            (
                "dz = tl.where(v == tl.load(targets_ptr + n) - start, tl.load(numbers_ptr + 5), dz)",
                "dz = dz * 1.0",
                "target's own gradient forgotten",
            ),
            (
                "pull = pull + tl.load(numbers_ptr + 4)",
                "pull = pull - tl.load(numbers_ptr + 4)",
                "sign of the entropy's gradient",
            ),
            ("shape[1] < EPILOGUE_BELOW", "shape[1] <= EPILOGUE_BELOW", "the wrong path at the very width"),
            ("s += tl.sum(tl.load(part + plane", "s = tl.sum(tl.load(part + plane", "only the last step of the parts"),
        ],
    ),
    (
        "tools/compile_kernels.py",
        "tests/test_compile_kernels.py",
        [
            (
                '    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),',
                '    "gfx942": (GPUTarget("hip", "gfx942", 64), 640 * 1024),',
                "AMD's shared memory limit is ten times too high",
            ),
            (
                'max(int(usage["STACK"]), int(usage["LOCAL"]))',
                'int(usage["LOCAL"])',
                "a spill is looked for where ptxas does not put it",
            ),
            (
                "* (result.spills > 0 and not job.may_spill)",
                "* (result.spills > 0 and job.may_spill)",
                "spills fail at odd widths and nowhere else",
            ),
            (
                "        new = {callee for name in new if name in kernels for callee in called_by(kernels[name])} - reached",
                "        new = set()",
                "functions that kernels call count as never launched",
            ),
            ("    return sorted(set(kernels) - reached)", "    return []", "a kernel that no case launches passes"),
            (
                '                errors.append(f"{current}: {type(error).__name__}: {error}")',
                "                pass",
                "an entry that raises is passed over",
            ),
            (
                'os.environ.pop("TRITON_INTERPRET", None)',
                'os.environ.get("TRITON_INTERPRET", None)',
                "under CI's TRITON_INTERPRET=1 nothing is compiled",
            ),
            (
                "                if job.key not in unique or unique[job.key].may_spill:",
                "                if True:",
                "a strict launch is forgotten after a lenient one of the same kind",
            ),
            (
                "source = ASTSource(job.kernel, job.signature, job.constants, job.attributes)",
                "source = ASTSource(job.kernel, job.signature, job.constants, {})",
                "pointers are compiled as if nothing were known of their alignment",
            ),
            (
                "    JITFunction.run, choice.INTERPRETED = caught, True\n    torch.use_deterministic_algorithms(True)",
                "    JITFunction.run, choice.INTERPRETED = caught, True",
                "an entry reads stale memory, another one every run",
            ),
            (
                "        JITFunction.run, choice.INTERPRETED = run, interpreted",
                "        JITFunction.run = run",
                "after recording, kernels on CPU tensors would be launched",
            ),
            ("    return 1 if failures else 0", "    return 0", "failures are printed and CI stays green"),
            (
                '    return failures + [f"{name} for {target}: is excused and compiles; delete the excuse" for name, target in needless]',
                "    return failures",
                "an excuse outlives its reason",
            ),
        ],
    ),
    (
        "benchmarks/kernels.py",
        "tests/test_benchmarks.py",
        [
            (
                'max(self.bytes / machine["bandwidth"], self.operations / machine["rate"])',
                'min(self.bytes / machine["bandwidth"], self.operations / machine["rate"])',
                "the floor is the faster of the two limits",
            ),
            (
                '    products, kind = (2, "forward + backward") if train else (1, "no gradient")',
                '    products, kind = (3, "forward + backward") if train else (1, "no gradient")',
                "the floor counts the product that G saves",
            ),
            (
                "    return N * K * (1 / 2 + 1 / 64 + 4 / (64 * 256))",
                "    return N * K * (1 / 2 + 4 / 64)",
                "NF4's floor reads fp32 scales",
            ),
            (
                "        except Exception as error:  # a peer that fails",
                "        except ImportError as error:  # a peer that fails",
                "a peer that runs out of memory takes the table with it",
            ),
            (
                'n: r["seconds"] for n, r in variants.items() if not n.startswith("ours") and',
                'n: r["seconds"] for n, r in variants.items() if n != "ours" and',
                "our own slower path counts as a rival",
            ),
            (
                "best = min(rivals.values(), default=None)",
                "best = max(rivals.values(), default=None)",
                "ours has only to beat the slowest",
            ),
            (
                "                finally:\n                    seq_logprob.EPILOGUE_BELOW = before",
                "                finally:\n                    pass",
                "a benchmark leaves its path switched on",
            ),
            (
                "extra = None if held is None else held - 2 * G",
                "extra = None if held is None else held - 3 * G",
                "17 MB of memory are not counted",
            ),
            (
                "    for compiling in (False, True)[: 1 + compiled]:",
                "    for compiling in (True, False)[: 1 + compiled]:",
                "torch.compile uses up the time of everything else",
            ),
            (
                "            z = z if softcap is None else softcap * torch.tanh(z / softcap)",
                "            z = z",
                "plain torch leaves out the soft-cap: another function, and faster",
            ),
            (
                "    return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs)",
                "    return 0.0",
                "variants that compute something else look equal",
            ),
        ],
    ),
    (
        "benchmarks/gpu_suite.py",
        "tests/test_benchmarks.py",
        [
            (
                "        os.killpg(child.pid, signal.SIGKILL)",
                "        child.kill()",
                "what a part started holds the pipe and the GPU",
            ),
            (
                '    passed = code == 0 and all(row.get("passed", True) for row in results)',
                "    passed = code == 0",
                "a failed check passes when the process ends well",
            ),
            ("    passed = code == 0 and all(", "    passed = code is not None and all(", "a part that crashed passes"),
            (
                "        with contextlib.nullcontext() if train else torch.no_grad():\n            logp, entropy",
                "        with torch.no_grad():\n            logp, entropy",
                "the check of the first ratio compares two passes without gradients",
            ),
            (
                '        save(out, "suite", facts',
                "        save(out, part, facts",
                "a file for each part and none of the whole",
            ),
            (
                '        print("gpu_suite.py: got no GPU',
                '        print("gpu_suite.py: no',
                "the message does not say what is missing",
            ),
            (
                '    assert sure >= 3, f"only {sure} rows',
                '    assert sure >= 300, f"only {sure} rows',
                "a check that can never pass",
            ),
            (
                '        row["passed"] = row["first_ratios_are_1"] and',
                '        row["passed"] = not row["first_ratios_are_1"] and',
                "the step passes when its first ratio is not 1",
            ),
        ],
    ),
    (
        "lessons/kernels/token_logp_v1.py",
        "tests/test_lesson_kernels_token_logp.py",
        [
            (
                "    lse = m + tl.log(tl.sum(tl.exp(x - m), axis=0))",
                "    lse = tl.log(tl.sum(tl.exp(x), axis=0))",
                "no maximum: exp overflows",
            ),
            (
                '    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=-float("inf")).to(tl.float32)  # (BLOCK_V,)\n    m =',
                "    x = tl.load(logits_ptr + n * stride_n + v, mask=v < V, other=0.0).to(tl.float32)  # (BLOCK_V,)\n    m =",
                "what lies behind the row's end counts as logits of 0",
            ),
            ("    if logits.shape[1] > MAX_V:", "    if False:", "rows that do not fit spill in silence"),
            (
                "    chosen = logits.gather(1, targets[:, None]).squeeze(1)  # (N,)",
                "    chosen = logits.amax(1)  # (N,)",
                "the reference scores the likeliest token",
            ),
        ],
    ),
    (
        "lessons/kernels/token_logp_v2.py",
        "tests/test_lesson_kernels_token_logp.py",
        [
            (
                "        top = tl.maximum(top, tl.load(row + v",
                '        top = tl.maximum(-float("inf"), tl.load(row + v',
                "the maximum of the last tile only",
            ),
            ("        total += tl.exp(", "        total = tl.exp(", "the sum of the last tile only"),
        ],
    ),
    (
        "lessons/kernels/token_logp_v3.py",
        "tests/test_lesson_kernels_token_logp.py",
        [
            (
                "        s = s * tl.exp(m - m_new) + tl.sum",
                "        s = s + tl.sum",
                "the sum is not rescaled when the maximum rises",
            ),
            ("        m = m_new\n", "        m = tl.max(x, axis=0)\n", "the maximum of the last tile only"),
            ("    m = -3.4028234663852886e38  #", '    m = -float("inf")  #', "a first tile of banned tokens is nan"),
            (
                "    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)",
                "    v = tl.arange(0, BLOCK_V)  # (BLOCK_V,)",
                "backward writes only the first tile",
            ),
            ("dlogp.contiguous()", "dlogp", "a gradient with stride 0 is read as if it were dense"),
        ],
    ),
]

MUTANTS = [Mutant(file, right, wrong, test, why) for file, test, rows in GROUPS for right, wrong, why in rows]
