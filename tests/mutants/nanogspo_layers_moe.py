"""Wrong edits of nanogspo/layers/moe.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/layers/moe.py"
MUTANTS = {
    "tests/test_moe.py": [
        (
            "p = logits.softmax(-1, dtype=torch.float32)  # (T, E)",
            "p = logits.softmax(-1)  # (T, E)",
            "softmax in the model's dtype",
        ),
        ("    if norm_topk:\n", "    if True:\n", "Qwen 2 MoE's weights renormalised"),
        ("    if norm_topk:\n", "    if False:\n", "Qwen 3's weights not renormalised"),
        ("return weights.to(logits.dtype), index", "return weights, index", "weights stay in fp32"),
        ("glu(gate, up, activation", "glu(up, gate, activation", "gate and up change places"),
        (
            "self.norm_topk = config.experts_per_token, config.norm_topk",
            "self.norm_topk = config.experts_per_token, True",
            "a setting of the file that is not used",
        ),
        (
            "torch.sigmoid(opens[0]) * self.shared_expert(x, linear)",
            "self.shared_expert(x, linear)",
            "the shared expert without its gate",
        ),
        ("torch.sigmoid(opens[0]) * self.shared_expert(x, linear)", "torch.sigmoid(opens[0]) * 0", "no shared expert"),
        (
            "[z if weight else z.detach() for z in scores]",
            "[z.detach() for z in scores]",
            "a load-balancing loss without a gradient",
        ),
        ("        routing.scores = None  # their graph\n", "", "a forward pass counts again when asked again"),
        (
            "self.sums = self.sums.to(p.device) + torch.cat(",
            "self.sums = torch.cat(",
            "an update is its last forward pass",
        ),
        ("torch.full_like(entropy, T)]", "torch.full_like(entropy, 4)]", "entropy is divided by a pass's tokens"),
        (
            ".transpose(0, 1).flatten(1)  # (L, T k)",
            "[:, :, :1].transpose(0, 1).flatten(1)",
            "only the first expert of a token is counted",
        ),
        (".sum() * E if weight", ".sum() if weight", "a loss without the factor E"),
        (
            "(load.mean(0) / T * p.mean((0, 1)))",
            "(load / T * p.mean(1)).mean(0)",
            "a product a layer, where transformers has one of means",
        ),
        (
            '"experts_unused": (load == 0)',
            '"experts_unused": (load <= 2)',
            "experts with few tokens count as unused",
        ),
        ("load.amax(1) / load.mean(1)", "load.amax(1) / load.sum(1)", "a share where 1 means even"),
        ("        self.sums = torch.zeros_like(self.sums)\n", "", "updates are added up"),
        ("        if not len(self.sums):\n            return {}\n", "", "a dense model has means of nothing"),
    ],
    "tests/test_router_replay.py": [
        (
            "if layer == len(self.chosen):  # else",
            "if True:  # else",
            "gradient checkpointing runs layers twice, and counts them twice",
        ),
        (
            "(p.gather(-1, index), index)",
            "(torch.ones_like(index, dtype=p.dtype), index)",
            "replayed experts count alike, and no router learns",
        ),
        (
            "return moe.route(logits, self.before[:, layer].long()) if self.replay else (weights, index)",
            "return weights, index",
            "nothing is replayed",
        ),
        ("self.before[:, layer]", "self.before[:, 0]", "every layer replays the first one's experts"),
        (
            "layer = self.layers.setdefault(moe, len(self.layers))",
            "layer = len(self.chosen) % len(self.before[0]) if self.replay else len(self.chosen)",
            "checkpointing, whose backward pass begins with the last layer, replays the first one's experts there",
        ),
        (
            "torch.stack(self.chosen, 1).to(torch.int16)",
            "torch.stack(self.chosen[::-1], 1).to(torch.int16)",
            "layers in the wrong order",
        ),
        (
            "(one.sort(-1).values != other.sort(-1).values).any(-1)",
            "(one != other).any(-1)",
            "a set in another order counts as flipped",
        ),
        (
            "!= other.sort(-1).values).any(-1)",
            "!= other.sort(-1).values).all(-1)",
            "one expert of two may change unseen",
        ),
        ("(before.long() if routing.replay else chosen)", "chosen", "the load of experts that were not used"),
        ("flips(chosen, chosen if before is None else before)", "flips(chosen, chosen)", "no token is ever flipped"),
        (
            "sums = distributed.total(self.sums).float()",
            "sums = self.sums.float()",
            "experts that only another process meets are unused",
        ),
        (", replay and before is not None", ", replay", "the first update of a rollout has nothing to replay"),
    ],
}
