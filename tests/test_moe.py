"""nanogspo/layers/moe.py against transformers: routing, values, gradients, cache, the load-balancing loss; and what a
router's metrics say.

References are tiny and random, with every 1-D parameter moved: 5 experts (a prime), 2 a token, widths of their own for
MLP, experts and shared expert.

Run: python -m pytest tests/test_moe.py
"""

import math

import pytest
import references
import torch
import transformers
from references import Case
from torch import nn
from torch.nn import functional as F

from kernels.attention import Segments
from nanogspo import checkpoint
from nanogspo.cache import KVCache
from nanogspo.families import model_config
from nanogspo.layers.moe import MoE, Routers, route
from nanogspo.model import Transformer, separate
from nanogspo.rollout import generate
from nanogspo.storage.experts import STACK, each
from nanogspo.storage.names import SKIP

E, K = 5, 2
SIZES = references.SIZES | {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 24, "head_dim": 32}
SIZES |= {"num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
TOWER = {**references.QWEN_TOWER, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
CASES = {
    "qwen2_moe": Case(
        transformers.Qwen2MoeConfig,
        transformers.Qwen2MoeForCausalLM,
        {"shared_expert_intermediate_size": 40, "head_dim": None, "decoder_sparse_step": 2, "use_sliding_window": True,
         "sliding_window": references.WINDOW, "max_window_layers": 2},
    ),
    "qwen3_moe": Case(
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True},
    ),
    "qwen3_moe_sliding": Case(
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": references.WINDOW},
    ),
    "qwen3_vl_moe": Case(
        transformers.Qwen3VLMoeConfig,
        transformers.Qwen3VLMoeForConditionalGeneration,
        {"rope_parameters": ROPE, "tie_word_embeddings": True},
        {"vision_config": TOWER, "tie_word_embeddings": True, **references.QWEN_TOKENS},
    ),
}  # fmt: skip
NAMES = list(CASES)


def moved(name: str) -> nn.Module:
    sdpa = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    model, gen = references.draw(CASES[name], NAMES.index(name), SIZES, **sdpa), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2 and len(p) == E:  # routers start at 0: all experts would tie
                p.normal_(0, 0.15, generator=gen)
    return model


reference, folder, ours = references.families(moved)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_those_of_transformers(name):
    """1e-5: 4 eps of logits around 5, times a handful of layers; of gradients, relative to the largest entry. A missed
    renormalisation, a wrong layer or expert moves logits by more than 0.1."""
    tokens = references.tokens(2, 20)
    direction = torch.randn(2, 20, references.VOCABULARY, generator=torch.Generator().manual_seed(1))
    model, theirs = ours(name), reference(name)
    named = {n: p for n, p in theirs.named_parameters() if not SKIP.search(n)}
    out = theirs(input_ids=tokens).logits
    want = dict(zip(named, torch.autograd.grad((out * direction).sum(), list(named.values())), strict=True))
    logits, parameters = model.logits(model(tokens)), dict(model.named_parameters())
    assert (logits - out).abs().max() <= 1e-5
    got = torch.autograd.grad((logits * direction).sum(), list(parameters.values()))
    got, seen = dict(zip(parameters, got, strict=True)), set()
    for n, dw in want.items():
        name = checkpoint.our_name(n)
        assert dw.abs().max() > 0, f"{n}: the reference cannot see this parameter"
        if name.endswith("experts.gate_up_proj"):
            names = [name.replace("gate_up_proj", f"{part}_proj.weight") for part in ("gate", "up")]
            mine = torch.cat([got[part] for part in names], 1)
        else:
            names = [name if name in got else f"{name}.weight"]
            mine = got[names[0]]
        seen |= set(names)
        assert (mine - dw).abs().max() <= 1e-5 * dw.abs().max(), n
    assert seen == set(got)


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_bf16_follows_transformers_in_all_but_the_last_bits(name):
    """They round each product of a weight and an expert's output, and each sum of these; here the sum is rounded once.
    So each differs from fp32 by its own roundings, about 2^-9 of values around 1 a layer, and by tokens at a tie that
    these send elsewhere: as much as theirs (ours: 1.03 and 0.97 times as much), where one wrong rule is off by 0.3."""
    tokens = references.tokens(2, 30)
    model = checkpoint.load(folder(name), dtype=torch.bfloat16)
    theirs = CASES[name].model.from_pretrained(folder(name), dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with torch.no_grad():
        truth, rounded = (m(input_ids=tokens).logits.float() for m in (reference(name), theirs))
        off = (model.logits(model(tokens)) - truth).abs().mean()
        assert off <= 1.2 * (rounded - truth).abs().mean() <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_is_the_full_forward(name):
    """Prompts of 9 and 1 tokens as one packed row, then 12 single steps of both."""
    model, tokens, lengths = ours(name), references.tokens(2, 21), (9, 1)
    with torch.no_grad():
        want = model.logits(model(tokens))  # (2, 21, V)
        segments = Segments.build(lengths, (-1, -1))
        cache = KVCache(model.config, segments, 1, 16, dtype=torch.float32)
        prompts = torch.cat([row[:n] for row, n in zip(tokens, lengths, strict=True)])
        got = model.logits(model(prompts[None], segments=segments, cache=cache))[0]  # (10, V)
        assert (got[:9] - want[0, :9]).abs().max() <= 1e-5 and (got[9] - want[1, 0]).abs().max() <= 1e-5
        for step in range(12):
            new = torch.stack([row[n + step] for row, n in zip(tokens, lengths, strict=True)])[None]
            got = model.logits(model(new, cache=cache))[0]  # (2, V)
            for row, n in enumerate(lengths):
                assert (got[row] - want[row, n + step]).abs().max() <= 1e-5


def test_greedy_answers_are_those_of_transformers():
    prompts = [references.tokens(1, n, seed=n)[0].tolist() for n in (3, 8)]
    answers = generate(ours("qwen2_moe"), prompts, max_new_tokens=12, temperature=0.0)
    for prompt, answer in zip(prompts, answers, strict=True):
        want = reference("qwen2_moe").generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, suppress_tokens=None
        )
        assert answer.tokens == want[0, len(prompt) :].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# laws


def test_routing_picks_of_all_experts_in_fp32_and_rounds_last():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = logits.double().softmax(-1)
    for renormalised in (False, True):
        w, index = route(logits, 3, renormalised)
        want, places = p.sort(-1, descending=True)
        want = want[:, :3] / (want[:, :3].sum(-1, keepdim=True) if renormalised else 1)
        distinct = (p.sort(-1).values.diff(dim=-1) > 0).all(-1)  # bf16 logits tie now and then
        assert distinct.sum() > 30
        assert torch.equal(index[distinct], places[distinct, :3]) and w.dtype == torch.bfloat16
        assert torch.equal(w[distinct], want[distinct].bfloat16())  # rounded once: bf16 sums would miss by an ulp


def test_checkpointing_changes_no_bit_and_counts_nothing_twice():
    model, tokens = ours("qwen2_moe"), references.tokens(1, 15)
    results = []
    for model.gradient_checkpointing in (False, True):
        routers = Routers(model.config)
        for _ in range(2):
            loss = model(tokens, linear=routers.watch(separate)).square().sum() + routers.balance()
            grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append((grads, routers.metrics()))
    model.gradient_checkpointing = False
    (a, facts), (b, again) = results
    assert facts == again and all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_the_balance_loss_is_that_of_transformers(name):
    tokens, routers = references.tokens(2, 20), Routers(ours(name).config)
    want = reference(name)(input_ids=tokens, output_router_logits=True)
    module = transformers.models.qwen3_moe.modeling_qwen3_moe
    want = module.load_balancing_loss_func(want.router_logits, E, K)
    ours(name)(tokens, linear=routers.watch(separate))
    got = routers.balance()
    assert (got - want).abs() <= 1e-5
    gate = next(m for m in ours(name).modules() if isinstance(m, MoE)).gate.weight
    assert torch.autograd.grad(got, gate)[0].abs().max() > 0


def test_metrics_of_routers_that_are_known():
    """Two layers of 4 experts, 1 a token, 12 tokens in passes of 4 and 8: one even, one sends all to expert 2."""
    config = model_config({"model_type": "qwen3_moe", "vocab_size": 5, "hidden_size": 4, "intermediate_size": 4,
                           "num_hidden_layers": 2, "num_attention_heads": 1, "head_dim": 2, "num_experts": 4,
                           "num_experts_per_tok": 1, "moe_intermediate_size": 2})  # fmt: skip
    even, stuck = (block.mlp for block in Transformer(config).layers)
    even.gate.weight.data.copy_(torch.eye(4) * 50)
    stuck.gate.weight.data.copy_(torch.eye(4)[[1, 1, 2, 1]] * 0)
    stuck.gate.weight.data[2] = 3.0
    dense = Routers(model_config(config.source | {"mlp_only_layers": [0, 1]}))
    dense.watch(separate)
    assert dense.balance() == 0.0 and dense.metrics() == {}
    routers = Routers(config)

    def one_pass(*layers, times=1):
        routing = routers.watch(separate)
        for moe in layers:
            routing.route(moe, routing(moe, ("gate",), torch.eye(4).repeat(times, 1))[0])

    for times in (1, 2):
        one_pass(even, stuck, times=times)
        loss = routers.balance().item()
        assert routers.balance() == 0.0  # asked for once
    assert routers.sums[:, :4].tolist() == [[3, 3, 3, 3], [0, 0, 12, 0]]
    facts = routers.metrics()
    assert not routers.sums.any()  # each is of the tokens since the last
    one_pass(stuck, even)
    assert routers.balance(0.0) == 0.0 and routers.metrics()["experts_unused"] == 0.375  # of the pass since then
    p = torch.tensor([0.0, 0, 3, 0]).softmax(0)
    entropy = -(p * p.log()).sum()
    assert facts["experts_unused"] == 3 / 8 and facts["experts_max_load"] == 2.5
    assert facts["experts_unused_by_layer"] == [0, 0.75] and facts["experts_max_load_by_layer"] == [1, 4]
    assert facts["router_entropy_by_layer"] == pytest.approx([0, entropy.item()], abs=1e-5)
    assert facts["experts_flipped_by_layer"] == [0, 0]  # there was nothing to compare with
    assert math.isclose(facts["router_entropy"], entropy / 2, rel_tol=1e-5)
    f, P = torch.tensor([1, 1, 5, 1]) / 8, (torch.full((4,), 0.25) + p) / 2
    assert math.isclose(loss, 4 * (f * P).sum(), rel_tol=1e-5)


def test_fresh_weights_reach_every_expert():
    config = model_config(checkpoint.read_config(folder("qwen2_moe")))
    model = Transformer(config).init_weights(0)
    for name, p in model.named_parameters():
        if p.ndim == 3:
            assert len(each(name, p.shape)) == E and STACK.fullmatch(name)
            residual = 0.02 / math.sqrt(2 * config.num_layers) if "down_proj" in name else 0.02
            assert all(abs(w.std() / residual - 1) < 0.1 for w in p), name
    x = torch.randn(64, config.hidden_size)
    moe = next(m for m in model.modules() if isinstance(m, MoE))
    _, index = route(F.linear(x, moe.gate.weight), K, False)
    assert len(index.unique()) == E
