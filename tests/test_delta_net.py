"""nanogspo/layers/delta_net.py and the families that have it, against transformers, and against laws.

Run: python -m pytest tests/test_delta_net.py
"""

import copy
import dataclasses

import pytest
import references
import torch
from peft import PeftModel
from references import VOCABULARY, Case
from test_train import TINY, interrupted_at, resume, steps_of, train, weights_of
from torch import Tensor, nn
from transformers.models import qwen3_5 as hub_3_5
from transformers.models import qwen3_5_moe as hub_moe
from transformers.models import qwen3_next as hub_next

from kernels.attention import Segments
from nanogspo import checkpoint, tiny
from nanogspo.cache import KVCache, Recurrent
from nanogspo.config import ARCHITECTURES, TrainConfig, check
from nanogspo.families import model_config
from nanogspo.fast.fused_linear import FusedLinears
from nanogspo.layers.delta_net import causal_conv, causal_conv_step, last_inputs
from nanogspo.layouts import Decode
from nanogspo.lora import add_lora, lora_layers
from nanogspo.model import Transformer, separate
from nanogspo.packing import Example, pack, score
from nanogspo.quant import packed_layers
from nanogspo.rollout import generate
from nanogspo.run.planner import layer_bytes, memory_parts
from nanogspo.storage import interleaved
from nanogspo.storage.names import SKIP
from nanogspo.storage.safetensors import read_header

EPS = torch.finfo(torch.float32).eps
# two value heads to a key head, of other widths, and 4 channels of 16 turned. eps: without it, what is read of a memory
# that holds little is divided by next to nothing, and the last bits of both sides with it
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
          "head_dim": 16, "num_hidden_layers": 3, "rms_norm_eps": 1e-2}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0],
        "mrope_interleaved": True}  # fmt: skip
MIXED = ["linear_attention", "full_attention", "linear_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 24}  # fmt: skip
CASES = {
    "qwen3_5": Case(
        hub_3_5.Qwen3_5TextConfig, hub_3_5.Qwen3_5ForCausalLM, {**LINEAR, "layer_types": MIXED, "rope_parameters": ROPE}
    ),
    "qwen3_5_multimodal": Case(
        hub_3_5.Qwen3_5Config,
        hub_3_5.Qwen3_5ForConditionalGeneration,
        {**LINEAR, "num_hidden_layers": 4, "attention_bias": True, "rope_parameters": ROPE},
        {"vision_config": {**references.QWEN_TOWER, "num_position_embeddings": 4}, "tie_word_embeddings": True,
         **references.QWEN_TOKENS},
    ),
    # one dense layer of three; and experts in all of them, whose weights always sum to 1
    "qwen3_next": Case(
        hub_next.Qwen3NextConfig,
        hub_next.Qwen3NextForCausalLM,
        {**LINEAR, **EXPERTS, "layer_types": MIXED, "mlp_only_layers": [1], "norm_topk_prob": False,
         "rope_parameters": {k: v for k, v in ROPE.items() if not k.startswith("mrope")}},
    ),
    "qwen3_5_moe": Case(
        hub_moe.Qwen3_5MoeTextConfig,
        hub_moe.Qwen3_5MoeForCausalLM,
        {**LINEAR, **EXPERTS, "layer_types": MIXED, "rope_parameters": ROPE},
    ),
}  # fmt: skip


def moved(name: str) -> nn.Module:
    """A tiny random model of transformers whose memories last and whose convolutions bend."""
    model = references.draw(CASES[name], len(name), attn_implementation="sdpa")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("A_log"):  # memories of one token would be divided by how near their key is to their query
                p.sub_(3)
            if n.endswith("conv1d.weight"):  # drawn with 0.15 its values are so small that silu is a line
                p.mul_(4)
    return model


reference, folder, ours = references.families(moved)


def in_our_terms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By our names, projections taken apart: two value heads of 12 to each of 2 key heads of 8."""
    found = {}
    for n, t in tensors.items():
        owner, _, leaf = checkpoint.our_name(n).removesuffix(".weight").rpartition(".")
        if leaf == "in_proj_qkvz":
            *qkv, z = (part.flatten(0, 1) for part in t.unflatten(0, (2, 64)).split([8, 8, 24, 24], dim=1))
            found |= {f"{owner}.in_proj_qkv.weight": torch.cat(qkv), f"{owner}.in_proj_z.weight": z}
        elif leaf == "in_proj_ba":
            b, a = (part.flatten(0, 1) for part in t.unflatten(0, (2, 4)).split(2, dim=1))
            found |= {f"{owner}.in_proj_b.weight": b, f"{owner}.in_proj_a.weight": a}
        elif leaf == "gate_up_proj":
            gate, up = t.chunk(2, dim=1)
            found |= {f"{owner}.gate_proj.weight": gate, f"{owner}.up_proj.weight": up}
        else:
            found[f"{owner}.{leaf}.weight" if "experts" in owner else checkpoint.our_name(n)] = t
    return found


def text_parameters(name: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in reference(name).named_parameters() if not SKIP.search(n)}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_transformers(name):
    """70 positions, past a chunk of 64. Logits are around 5: 2e-5 is 30 roundings of them, through sums made in another
    order. Gradients: sums over 140 positions of what went through three layers, and a triangular solve each."""
    tokens = references.tokens(2, 70)
    direction = torch.randn(2, 70, VOCABULARY, generator=torch.Generator().manual_seed(1))
    model, theirs = ours(name), text_parameters(name)
    want = reference(name)(input_ids=tokens).logits
    got = model.logits(model(tokens))
    assert (got - want).abs().max() <= 2e-5
    want = dict(zip(theirs, torch.autograd.grad((want * direction).sum(), theirs.values()), strict=True))
    parameters = dict(model.named_parameters())
    got = dict(zip(parameters, torch.autograd.grad((got * direction).sum(), parameters.values()), strict=True))
    want = in_our_terms(want)
    assert set(want) == set(got)
    for n, d in want.items():
        assert d.abs().max() > 0, f"{n}: the reference cannot see this parameter"
        assert (got[n] - d).abs().max() <= 5e-5 * d.abs().max(), n


def test_bf16_rounds_where_transformers_does():
    """Same places, other sums: on an average within a tenth of a bf16 ulp at 4, which is 0.03."""
    tokens, name = references.tokens(2, 70), "qwen3_5"
    model = checkpoint.load(folder(name), dtype=torch.bfloat16)
    with torch.no_grad():
        want = references.open_reference(folder(name), name, torch.bfloat16)(
            input_ids=tokens, output_hidden_states=True
        ).hidden_states[-1]
        got = model(tokens)
    assert (got - want).float().abs().mean() <= 3e-3


def decode(model: Transformer, row: list[int], prompt: int) -> Tensor:
    """Logits (T, V) of a row of which `prompt` tokens are prefilled, beside another prompt, and the rest are steps."""
    segments = Segments.build([3, prompt])
    cache = KVCache(model.config, segments, 2, len(row) - prompt, dtype=model.norm.weight.dtype)
    with torch.no_grad():
        hidden = [model(torch.tensor([[5, 6, 7, *row[:prompt]]]), segments=segments, cache=cache)[0, 3:]]
        for token in row[prompt : prompt + 5]:
            hidden.append(model(torch.tensor([[4, 9, 4, token]]), cache=cache)[0, -1:])
        cache.compact(torch.tensor([1, 3]))  # one row of the other prompt, and this one
        for token in row[prompt + 5 :]:
            hidden.append(model(torch.tensor([[9, token]]), cache=cache)[0, -1:])
    return model.logits(torch.cat(hidden))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prompt", [2, 66])
def test_cached_decoding_is_the_full_forward(name, prompt):
    """As near to it as transformers' own decoding, and 1e-5. Two tokens are fewer than the convolution sees."""
    row, model = references.tokens(1, prompt + 12)[0].tolist(), ours(name)
    tokens = torch.tensor([row])
    with torch.no_grad():
        full, theirs = model.logits(model(tokens))[0], reference(name)(input_ids=tokens).logits[0]
        state = reference(name)(input_ids=tokens[:, :prompt], use_cache=True)
        steps = [state.logits[0]]
        for t in range(prompt, len(row)):
            state = reference(name)(input_ids=tokens[:, t : t + 1], past_key_values=state.past_key_values)
            steps.append(state.logits[0])
    bound = (torch.cat(steps) - theirs).abs().max()
    assert (decode(model, row, prompt) - full).abs().max() <= bound + 1e-5


def test_greedy_answers_are_those_of_transformers():
    prompts = [references.tokens(1, n, seed=n)[0].tolist() for n in (1, 5, 30)]
    answers = generate(ours("qwen3_5"), prompts, max_new_tokens=12, temperature=0)
    for prompt, answer in zip(prompts, answers, strict=True):
        want = reference("qwen3_5").generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.tokens == want[0, len(prompt) :].tolist()


def test_a_packed_row_is_its_sequences_and_shares_prompts():
    """Hidden states and the gradients of all parameters; answers stand once behind their prompt."""
    model, gen = ours("qwen3_5"), torch.Generator().manual_seed(3)
    prompt, answers, other = (
        references.tokens(1, 20)[0],
        [references.tokens(1, n, n)[0] for n in (1, 2, 70)],
        references.tokens(1, 9, 9)[0],
    )
    segments = Segments.build([20, 1, 2, 70, 9], [-1, 0, 0, 0, -1])
    packed = model(torch.cat((prompt, *answers, other))[None], segments=segments)[0]  # (S, C)
    direction = torch.randn(packed.shape, generator=gen)
    apart = [model(torch.cat((prompt, a))[None])[0] for a in answers]
    rows = torch.cat((apart[0][:20], *(a[20:] for a in apart), model(other[None])[0]))  # (S, C)
    assert (packed - rows).abs().max() <= 2e-5
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad((x * direction).sum(), parameters, allow_unused=True) for x in (packed, rows)]
    for (n, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert a is b is None or (a - b).abs().max() <= 5e-5 * b.abs().max(), n


def test_the_convolution_sees_its_own_sequence_alone():
    """Against a loop over tokens in float64, with prompts and answers shorter than the taps; and steps go on."""
    gen, lengths, parents = torch.Generator().manual_seed(0), [2, 1, 3, 0, 5, 0, 4], [-1, 0, 0, 0, -1, -1, 5]
    x = torch.randn(sum(lengths), 3, generator=gen, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    histories, want, t = [], [], 0
    for length, parent in zip(lengths, parents, strict=True):
        seen = [x.new_zeros(3)] * 3 if parent < 0 else list(histories[parent])
        for _ in range(length):
            seen.append(x[t])
            want.append(nn.functional.silu(sum(weight[:, 0, w] * seen[w - 4] for w in range(4))))
            t += 1
        histories.append(seen)
    segments, want = Segments.build(lengths, parents), torch.stack(want)
    got = causal_conv(x, weight, segments)
    assert torch.allclose(got, want, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, weight)) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)
    tails = last_inputs(x, 3, segments)
    assert torch.equal(tails, torch.stack([torch.stack(seen[-3:], 1) for seen in histories]))
    with torch.no_grad():
        rows, new = tails.clone(), torch.randn(len(lengths), 3, generator=gen, dtype=torch.float64)
        y = causal_conv_step(new, weight, rows)
    assert torch.allclose(y, nn.functional.silu((torch.cat((tails, new[..., None]), 2) * weight[:, 0]).sum(2)))
    assert torch.equal(rows, torch.cat((tails[..., 1:], new[..., None]), 2))


def test_padding_on_the_right_changes_nothing():
    model, tokens = ours("qwen3_5"), references.tokens(2, 70)
    with torch.no_grad():
        assert (model(tokens)[:, :30] - model(tokens[:, :30])).abs().max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_saved_folder_is_what_was_loaded(name, tmp_path):
    """Tensors byte for byte, and a config that transformers opens as the same model."""
    checkpoint.save(ours(name), tmp_path)
    theirs = references.open_reference(tmp_path, name)
    for n, p in reference(name).state_dict().items():
        assert torch.equal(theirs.state_dict()[n], p), n
    again = checkpoint.load(tmp_path, dtype=torch.float32)
    assert again.config == ours(name).config
    tokens = references.tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(again(tokens), ours(name)(tokens))
        assert (theirs(input_ids=tokens).logits - reference(name)(input_ids=tokens).logits).abs().max() <= 1e-5


def test_a_projection_of_a_file_is_taken_apart_and_written_as_one(tmp_path, monkeypatch):
    """Rows can be read in parts; a matrix of another shape is left as it is, to be named as unexpected; the index of
    shards counts the bytes that are in them."""
    [file], config = folder("qwen3_next").glob("*.safetensors"), ours("qwen3_next").config
    name = "layers.0.linear_attn.in_proj_qkvz.weight"
    stored = read_header(file)[0][f"model.{name}"]
    parts = interleaved.split(name, stored, config)
    assert [p.shape for p in parts.values()] == [(2 * 16 + 48, 64), (48, 64)]
    for part in parts.values():
        assert torch.equal(torch.cat((part.read(slice(3)), part.read(slice(3, None)))), part.read())
    assert list(interleaved.split(name, dataclasses.replace(stored, shape=(127, 64)), config)) == [name]
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1)
    checkpoint.save(ours("qwen3_next"), tmp_path)
    written = sum(x.nbytes for shard in tmp_path.glob("*.safetensors") for x in read_header(shard)[0].values())
    index = references.json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == written


def test_a_cache_keeps_a_memory_of_each_row_and_no_slots():
    """The bytes of a linear layer do not grow with the capacity."""
    model = ours("qwen3_5")
    segments = Segments.build([4, 2])
    cache = KVCache(model.config, segments, 3, 100, dtype=torch.float32)
    with torch.no_grad():
        model(references.tokens(1, 6), segments=segments, cache=cache)
    first, _, last = cache.layers
    assert isinstance(first, Recurrent) and first.tail.shape == (6, 2 * 16 + 48, 3)
    assert last.state.shape == (6, 4, 8, 12) and last.state.dtype == torch.float32
    assert torch.equal(last.state[0], last.state[2]) and not torch.equal(last.state[2], last.state[3])


def test_configs_say_what_does_not_fit():
    raw = references.json.loads((folder("qwen3_5") / "config.json").read_text())
    bare = {k: v for k, v in raw.items() if k != "layer_types"}
    assert model_config({**bare, "num_hidden_layers": 8}).layer_types == (*["linear"] * 3, "full") * 2
    assert model_config({**bare, "full_attention_interval": 2}).layer_types == ("linear", "full", "linear")
    assert model_config(raw).rotary_dim == 4 and model_config(raw).unread == ()
    hub = {k: v for k, v in bare.items() if not k.startswith("linear_") and k not in ("rope_parameters", "head_dim")}
    config = model_config({**hub, "num_hidden_layers": 4, "rope_theta": 1e7})
    assert (config.head_dim, config.rotary_dim, config.linear_key_heads, config.linear_value_heads) == (256, 64, 16, 32)
    assert set(model_config({**raw, "layer_types": ["linear_attention"] * 3}).rope) == {"full"}
    for change, match in (
        ({"linear_num_value_heads": 3}, "want a multiple"),
        ({"linear_conv_kernel_dim": 1}, "at least 2"),
        ({"layer_types": ["sliding_attention"] * 3}, "linear_attention"),
    ):
        with pytest.raises(ValueError, match=match):
            model_config({**raw, **change})


# ---------------------------------------------------------------------------------------------------------------------
# what the rest of the program does with such a model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_ratio_is_exactly_1(dtype, recompute):
    """Old log-probs are scored without a graph, new ones with one, perhaps in checkpoints: the same bits. Answers share
    a prompt of 20 tokens in the packed row, one stands alone."""
    model = checkpoint.load(folder("qwen3_5"), dtype=dtype)
    model.gradient_checkpointing = recompute
    prompt = references.tokens(1, 20)[0].tolist()
    examples = [Example.answered(prompt, references.tokens(1, n, n)[0].tolist()) for n in (3, 9, 70)]
    [batch] = pack([*examples, Example.answered([5, 6], [7, 8, 9])], max_tokens=1000)
    assert batch.segments.parents == (-1, 0, 0, 0, -1)
    with torch.no_grad():
        old, *_ = score(model, batch)
    new, *_ = score(model, batch)
    assert torch.equal(old, new)
    assert all(p.grad is None for p in model.parameters())
    new.sum().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters())


ADAPTED = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]


def test_adapters_beside_its_projections(tmp_path):
    """Where they are asked for; the default targets find attention and MLP alone. Saved, loaded, merged."""
    model = checkpoint.load(folder("qwen3_5"), dtype=torch.float32)
    names = add_lora(model, r=2, alpha=4, targets=ADAPTED)
    assert {n.rsplit(".", 1)[1] for n in names} == set(ADAPTED) and len(names) == 10
    gen = torch.Generator().manual_seed(0)
    for layer in lora_layers(model).values():
        layer.lora_B.weight.data.normal_(generator=gen)
    tokens = references.tokens(1, 9)
    checkpoint.save_adapter(model, tmp_path / "adapter")
    checkpoint.save(model, tmp_path / "merged")
    again = checkpoint.load(folder("qwen3_5"), dtype=torch.float32)
    checkpoint.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        want = model(tokens)
        assert torch.equal(again(tokens), want) and not torch.allclose(ours("qwen3_5")(tokens), want)
        merged = checkpoint.load(tmp_path / "merged", dtype=torch.float32)
        assert (merged(tokens) - want).abs().max() <= 1e-4 * want.abs().max()
    peft = PeftModel.from_pretrained(copy.deepcopy(reference("qwen3_5")), tmp_path / "adapter")
    with torch.no_grad():
        assert (peft(input_ids=tokens).logits - model.logits(want)).abs().max() <= 1e-4
    assert len(add_lora(checkpoint.load(folder("qwen3_5")), r=2, alpha=4)) == 4 + 3 * 3


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_packed_weights(quant):
    """Every projection is packed as any linear layer; what is computed is what the unpacked weights compute."""
    model = checkpoint.load(folder("qwen3_5"), dtype=torch.float32, quant=quant)
    packed = packed_layers(model)
    assert {n.rsplit(".", 1)[1] for n in packed if ".0." in n} >= set(ADAPTED)
    plain, tokens = checkpoint.load(folder("qwen3_5"), dtype=torch.float32), references.tokens(1, 9)
    for name, layer in packed.items():
        plain.get_submodule(name).weight.data = layer.unpack(torch.float32)
    with torch.no_grad():
        assert (model(tokens) - plain(tokens)).abs().max() <= 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_fused_projections_sample_the_same(lora):
    """What a rollout multiplies with: prepacked, or adapters side by side."""
    model = checkpoint.load(folder("qwen3_5"), dtype=torch.float32)
    if lora:
        add_lora(model, r=2, alpha=4, targets=ADAPTED)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B.weight)
    tokens, fused = references.tokens(2, 9), FusedLinears(model)
    mixer = model.layers[0].linear_attn
    assert (mixer, mixer.INPUTS) in fused._fused and (mixer, mixer.OUTPUT) in fused._fused
    with torch.no_grad():
        assert (model(tokens, linear=fused) - model(tokens)).abs().max() <= 1e-4


def test_a_decode_step_reads_no_number(monkeypatch):
    """What a CUDA graph needs: nothing of the layer asks a tensor for its value, and its memory stays where it is."""
    model = ours("qwen3_5")
    cache = KVCache(model.config, Segments.build([5, 5]), 2, 4, dtype=torch.float32)
    with torch.no_grad():
        model(references.tokens(1, 10), segments=Segments.build([5, 5]), cache=cache)
        layer, block = cache.layers[0], model.layers[0]
        where = layer.tail.data_ptr(), layer.state.data_ptr()
        decoding = Decode(cache)
        for read in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
            monkeypatch.setattr(Tensor, read, lambda *_: pytest.fail("a number was read"))
        block.linear_attn(torch.ones(1, 4, 64), None, None, decoding, separate)
    assert where == (layer.tail.data_ptr(), layer.state.data_ptr())


def test_a_run_that_is_interrupted_and_resumed_is_the_whole_run(tmp_path, monkeypatch):
    """The tiny model with this architecture, from the command line: SFT's warm-up, then GSPO in four updates a
    rollout, stopped at the second. All bytes of the weights."""
    monkeypatch.setattr("nanogspo.run.curves.draw_curves", lambda *args, **kwargs: None)
    flags = [*TINY, *"--architecture qwen3_5 --steps 6 --gradient-checkpointing on --lr 1e-3".split()]
    train(tmp_path / "whole", *flags)
    with interrupted_at(2):
        train(tmp_path / "run", *flags)
    resume(tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    assert checkpoint.load(tmp_path / "run" / "model").config.layer_types == ("linear", "linear", "full")
    assert steps_of(tmp_path / "run")[0]["ratio_min"] == steps_of(tmp_path / "run")[0]["ratio_max"] == 1


def test_a_real_model_states_its_architecture():
    with pytest.raises(ValueError, match="which states its own"):
        check(TrainConfig(model="some/folder", architecture="qwen3_5"))
    assert set(ARCHITECTURES) == set(tiny.CONFIGS)


def test_the_plan_counts_what_is_kept():
    """A rollout's cache to the byte; what autograd keeps of a linear layer within a sixth."""
    model = ours("qwen3_5")
    config = TrainConfig(lora_r=0, prompts_per_rollout=2, group_size=3, max_new_tokens=5, micro_batch_tokens=256)
    parts = memory_parts(config, model, longest_prompt=4)
    cache, segments = KVCache(model.config, Segments.build([4, 4]), 3, 4, dtype=torch.float32), Segments.build([4, 4])
    with torch.no_grad():
        model(references.tokens(1, 8), segments=segments, cache=cache)
    first, attention, last = cache.layers
    kept = [attention.k, attention.v, attention.prefix_k, attention.prefix_v]
    kept += [first.tail, first.state, last.tail, last.state]
    assert parts["KV cache of a rollout"] == sum(x.nbytes for x in kept)
    _, model = tiny.build("abc", seed=0, architecture="qwen3_5")  # of usual widths
    storages, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}
    held = []  # or an address would be used twice

    def keep(x: Tensor) -> Tensor:
        held.append(x)
        if x.untyped_storage()._cdata not in weights:
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(references.tokens(1, 256) % 4, segments=Segments.build([256]))
    estimate = sum(256 * layer_bytes(config, model.config, 4, kind) for kind in model.config.layer_types)
    assert 5 / 6 <= estimate / sum(storages.values()) <= 6 / 5
