"""Wrong edits of nanogspo/layers/moe.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/layers/moe.py"
MUTANTS = {
    "tests/test_moe.py": [
        (
            "logits.softmax(-1, dtype=torch.float32).topk(k)",
            "logits.softmax(-1).topk(k)",
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
        ("torch._C._current_graph_task_id() < 0", "True", "gradient checkpointing counts tokens twice"),
        (
            "[z if weight else z.detach() for z in self.logits.values()]",
            "[z.detach() for z in self.logits.values()]",
            "a load-balancing loss without a gradient",
        ),
        ("        self.logits, k = {}, moe.k\n", "        k = moe.k\n", "a forward pass counts again when asked again"),
        ("self.tokens + p.shape[1]", "p.shape[1]", "entropy is divided by the last pass's tokens"),
        ("index = p.detach().topk(k)", "index = p.detach().topk(1)", "only the first expert of a token is counted"),
        (".sum() * p.shape[2] if weight", ".sum() if weight", "a loss without the factor E"),
        (
            "(load.mean(0) / p.shape[1] * p.mean((0, 1)))",
            "(load / p.shape[1] * p.mean(1)).mean(0)",
            "a product a layer, where transformers has one of means",
        ),
        (
            '"experts_unused": (self.load == 0)',
            '"experts_unused": (self.load <= 2)',
            "experts with few tokens count as unused",
        ),
        ("self.load.amax(1) / self.load.mean(1)", "self.load.amax(1) / self.load.sum(1)", "a share where 1 means even"),
        ("        self.__init__()\n", "", "updates are added up"),
    ],
}
