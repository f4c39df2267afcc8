"""Wrong edits of nanogspo/rollout.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/rollout.py"
MUTANTS = {
    "tests/test_cuda_graph.py": [
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
        (
            "(tokens[:, None] == self.stop).any(1)",
            "torch.tensor([t in self.stop.tolist() for t in tokens.tolist()])",
            "a step that waits for the GPU",
        ),
        (
            "                next_step.forget()  # first of all: a graph holds memory\n",
            "",
            "the graph of rows that left",
        ),
    ],
    "tests/test_episodes.py": [
        (
            "streams=streams[first : first + per_slice]",
            "streams=streams[:per_slice]",
            "later turns draw alike in every slice",
        ),
        ("np.array([0, 0, answer, turn]", "np.array([answer, turn, 0, 0]", "streams of turns that overlap"),
        ("np.array([0, 0, answer, turn]", "np.array([0, 0, 0, turn]", "all answers draw alike from the second turn on"),
    ],
    "tests/test_router_replay.py": [
        ("field(default=None, compare=False)", "None", "two rollouts of a model with experts cannot be compared"),
        (
            "                batch.experts.copy_(routing.experts)\n",
            "                pass\n",
            "every token is said to be sent where the prompt's last one was",
        ),
        (
            "[row for rows, _ in routed for row in rows]).argsort(stable=True)",
            "[n for n, (rows, _) in enumerate(routed) for _ in rows]).argsort(stable=True)",
            "step by step instead of answer by answer",
        ),
        (
            "[first * group_size + row for row in rows], experts)]",
            "rows, experts)]",
            "every slice's experts go to the first one's answers",
        ),
        (
            "experts[last].repeat_interleave(group_size, dim=0)",
            "experts[last].repeat(group_size, 1, 1)",
            "answers begin with another prompt's experts",
        ),
        ("batch.experts[active].cpu()", "batch.experts[: len(active)].cpu()", "experts of rows that have finished"),
    ],
    "tests/test_rollout.py": [
        (
            "last = Routing(fused), segments.cu_seqlens[1:].long() - 1",
            "last = Routing(fused), segments.cu_seqlens[:-1].long()",
            "the first token is drawn after the prompt's first",
        ),
        (
            "                rows = [rows[n] for n in active]\n",
            "                rows = rows[: len(active)]\n",
            "answers mixed up once the batch shrinks",
        ),
        (
            "        self.cache.compact(kept)\n",
            "        self.cache.compact(kept - kept[0])\n",
            "rows go on in others' caches",
        ),
        ("self.uniforms[:, kept]", "self.uniforms[:, : len(rows)]", "draws that depend on who has finished"),
        ("if not active or not left:", "if not active or left == 1:", "an answer one token short"),
        ("before >= top_p", "before > top_p", "one token too many where the mass is met exactly"),
        ("end or len(answer.tokens) == max_new_tokens", "end", "answers that are cut off are never counted"),
        (
            "                return answers\n    if routed",
            "                break\n    if routed",
            "stopped, and the next slice of prompts begins",
        ),
        (
            "if on_step and on_step(complete,",
            "if on_step and not on_step(complete,",
            "every rollout ends at its first token",
        ),
        ("first_prompt=first_prompt + first,", "first_prompt=first_prompt,", "equal draws in every slice"),
        (
            "            **settings,\n        )",
            '            **settings | {"seed": settings.get("seed", 0) + first},\n        )',
            "an answer that depends on rollout_rows",
        ),
        ("[seed % 2**64, prompt_number % 2**64]", "[prompt_number % 2**64, 0]", "the same answers for every seed"),
        (
            "[seed % 2**64, prompt_number % 2**64]",
            "[(seed + prompt_number) % 2**64, 0]",
            "seed 1 draws for prompt 0 what seed 0 drew for prompt 1",
        ),
        (".view(steps, group_size)", ".view(group_size, steps).T", "a longer limit changes how an answer begins"),
    ],
}
