"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, out and in.

An adapter of another program is read only if it does here what it does in PEFT: any setting that would change the
result is refused by name.

Tests: tests/test_checkpoint.py
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import re

from torch import Tensor

from nanogspo.inputs import need, read_json, shown, some, tell
from nanogspo.lora import add_lora, lora_layers
from nanogspo.model import Transformer
from nanogspo.quant import STACKED, linear_layers
from nanogspo.storage.experts import each
from nanogspo.storage.files import ADAPTER, ADAPTER_WEIGHTS, atomic_write, resolve
from nanogspo.storage.names import PREFIXES, SKIP, our_name
from nanogspo.storage.safetensors import Stored, read_header, write_safetensors

PEFT_PREFIX = "base_model.model."


def save_adapter(model: Transformer, path: str | os.PathLike, *, base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors, as PEFT does (base_model.model.model.layers...).

    Names and targets are those of transformers' class for the base: of a multimodal one the text layers alone.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no LoRA adapter to save; save the model itself instead")
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PEFT_PREFIX}{model.config.module_prefix}{own.removesuffix('.weight')}.{part}.weight": weight
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
        for own, weight in _matrices(name, getattr(layer, part).weight).items()
    }
    write_safetensors(path / ADAPTER_WEIGHTS, tensors, {"format": "pt"})
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or str(getattr(model, "folder", "")),
        "r": first.r,
        "lora_alpha": first.scale * first.r,
        "lora_dropout": first.dropout,
        "target_modules": _short_targets(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    atomic_write(path / ADAPTER, json.dumps(config, indent=2))


def _owners(model: Transformer) -> dict[str, str]:
    """Layer as files name it -> layer of the model: a stacked one goes by E names."""
    linear = linear_layers(model).items()
    shapes = {name: (len(m.stack), 0, 0) if isinstance(m, STACKED) else () for name, m in linear}
    return {own.removesuffix(".weight"): name for name, shape in shapes.items() for own in each(name, shape)}


def _matrices(layer: str, weight: Tensor) -> dict[str, Tensor]:
    """Name in a file -> A or B of it. Experts are a layer each, mlp.experts.7.gate_proj, as PEFT wrote them over
    transformers 4 and as vLLM reads them; over transformers 5 PEFT converts them to its own when it reads them."""
    return dict(zip(each(layer, weight.shape), weight, strict=True)) if weight.ndim == 3 else {layer: weight}


def _short_targets(model: Transformer, names: list[str]) -> list[str] | str:
    """Leaf names where every layer of that leaf is wrapped, full names where only some are. PEFT compares the ends of
    names, and a tower has layers of the same leaf names: then a regular expression, which it matches as a whole."""
    leaves, prefix = sorted({name.rsplit(".", 1)[-1] for name in names}), model.config.module_prefix
    every = [name for name in linear_layers(model) if not name.endswith((".base", ".lora_A", ".lora_B"))]
    plain = prefix == "model."
    if any(name.rsplit(".", 1)[-1] in leaves for name in every):
        return sorted(name if plain else f"{prefix}{name}" for name in names)
    return leaves if plain else rf"{re.escape(prefix)}.*\.({'|'.join(leaves)})"


# Keys of adapter_config.json that are read, or that say how PEFT found and trained the layers. Any other changes the
# result when it is set: use_dora, modules_to_save, rank_pattern, alpha_pattern, lora_bias, what is yet to come.
NEUTRAL = {"init_lora_weights": (True, "gaussian", "eva", "orthogonal"), "bias": ("none",)}  # PiSSA subtracts from W


ADAPTER_NO_EFFECT = frozenset(
    """peft_type r lora_alpha use_rslora base_model_name_or_path auto_mapping ensure_weight_tying eva_config
    exclude_modules inference_mode layers_pattern layers_to_transform lora_dropout megatron_core peft_version
    qalora_group_size revision runtime_config target_modules task_type""".split()
)


def load_adapter(model: Transformer, path_or_repo: str | os.PathLike, *, dropout: float = 0.0) -> list[str]:
    """Put a PEFT LoRA adapter onto a model: ours, or one that PEFT, Unsloth or TRL saved. Returns the layers touched.

    Raises ValueError for what would silently change the result: DoRA, trained biases, extra saved modules, ranks that
    differ between layers, a tensor that fits no layer or that PEFT would leave aside, a layer with only one of its two
    matrices. Layers of a vision tower and another base than this model are reported on stderr.
    """
    folder = resolve(path_or_repo, want="adapter")
    config, file = read_json(folder / ADAPTER), folder / ADAPTER_WEIGHTS
    if not file.is_file():
        want = f"want one beside {ADAPTER} (a pickle is not read)"
        raise ValueError(f"{folder}: got no {ADAPTER_WEIGHTS}, {want}")
    where = f"{folder / ADAPTER}"
    kind = need(config, "peft_type", str, default="LORA", where=where)
    if kind.upper() != "LORA":
        raise ValueError(f"{folder}: got peft_type {shown(kind)}, want LORA")
    extras = {k: v for k, v in config.items() if v and k not in ADAPTER_NO_EFFECT and v not in NEUTRAL.get(k, ())}
    if extras:
        raise ValueError(f"{folder}: got {shown(extras)}, want a plain LoRA adapter without these")
    r = need(config, "r", int, low=1, high=2**16, where=where)
    alpha = need(config, "lora_alpha", float, low=0, high=1e6, where=where)
    scale = alpha / (math.sqrt(r) if need(config, "use_rslora", bool, default=False, where=where) else r)
    base = need(config, "base_model_name_or_path", str, default="", where=where)
    if base and hasattr(model, "folder") and not _same_model(base, model.folder):
        tell(f"{folder}: this adapter was trained over {some([base])}, the model here is {model.folder}")
    pairs = _adapter_pairs(file, model, r)
    prefixes = ["model."] if model.config.module_prefix == "model." else PREFIXES  # a wrapper's has changed
    owners = _owners(model)
    given = [name for name in owners if name in pairs]  # add_lora names those that are none of the model's
    if aside := [name for name in given if not any(_peft_wraps(config, f"{p}{name}", where) for p in prefixes)]:
        got = f"{file}: got {some(aside, 4)}, which {ADAPTER} does not name"
        raise ValueError(f"{got}: PEFT leaves them aside; mend it")
    targets = list(dict.fromkeys(owners.get(name, name) for name in pairs))
    if missing := [name for name, owner in owners.items() if owner in targets and name not in pairs]:
        raise ValueError(f"{file}: got no {some(missing, 1)}, want all experts of a layer or none of them")
    touched = add_lora(model, r=r, alpha=alpha, targets=targets, dropout=dropout, scale=scale)
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            for own, weight in _matrices(name, getattr(layer, part).weight.data).items():
                if not weight.is_meta:  # an outline, of which the plan is made
                    weight.copy_(pairs[own.removesuffix(".weight")][part].read())
    return touched


def _adapter_pairs(file: pathlib.Path, model: Transformer, r: int) -> dict[str, dict[str, Stored]]:
    """Layer -> lora_A, lora_B -> where it is in the file. All of it fits this model."""
    pairs: dict[str, dict[str, Stored]] = {}
    towers = []
    for name, stored in read_header(file)[0].items():
        match = re.fullmatch(r"(.+)\.(lora_[AB])(?:\.default)?\.weight", name)
        if not match:
            want = "want names that end in lora_A.weight or lora_B.weight"
            raise ValueError(f"{file}: got tensor {some([name])}, {want}")
        if SKIP.search(name):
            towers.append(name)
            continue
        pair = pairs.setdefault(our_name(match[1].removeprefix(PEFT_PREFIX)), {})
        if pair.setdefault(match[2], stored) is not stored:
            raise ValueError(f"{file}: got {some([name])} beside another tensor for the same layer, want one")
    if towers and not model.norm.weight.is_meta:  # said when the model is loaded, not of its outline
        tell(f"{file}: left aside {len(towers)} tensors, of no use for text: {some(towers)}")
    linear, owners = linear_layers(model), _owners(model)
    for name, pair in pairs.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{file}: layer {some([name])} has only {', '.join(pair)}, want lora_A and lora_B")
        if layer := linear.get(owners.get(name)):  # add_lora names those that are none of the model's
            for part, shape in (("lora_A", (r, layer.in_features)), ("lora_B", (layer.out_features, r))):
                if pair[part].shape != shape:
                    got = f"{file}: {name}.{part} has shape {shown(list(pair[part].shape))}"
                    raise ValueError(f"{got}, want {list(shape)}: another base or rank")
                if not pair[part].dtype.is_floating_point:
                    raise ValueError(f"{file}: {name}.{part} has dtype {pair[part].code}, want F32, F16 or BF16")
    return pairs


def _peft_wraps(config: dict, layer: str, where: str) -> bool:
    """Whether PEFT puts an adapter on this layer of its model. One that it does not gets none of the file's tensors."""

    def named(key: str, default: list[str]) -> bool:
        value = default if config.get(key) is None else config[key]
        if isinstance(value, list) and all(isinstance(end, str) for end in value):
            return any(f".{layer}".endswith(f".{end}") for end in value)
        with contextlib.suppress(TypeError, re.error, OverflowError, RecursionError):
            if len(value) <= 10_000 and _ways(value) < MOST_WAYS:
                return value == "all-linear" or bool(re.fullmatch(value, layer))
        raise ValueError(f"got {key}={shown(value)}, want a list of names or a simple regular expression in {where}")

    only = config.get("layers_to_transform")
    only = only if isinstance(only, list) else [only]
    chosen = only in ([], [None]) or int(re.search(r"\.(\d+)\.", layer)[1]) in only
    return chosen and named("target_modules", ["q_proj", "v_proj"]) and not named("exclude_modules", [])


MOST_WAYS = 10**8  # a second of matching; a regular expression is a stranger's, and "(.+)+Z" would take years


@functools.cache
def _ways(pattern: str) -> int:
    """How many ways a regular expression can try on a layer's name, about; MOST_WAYS for more. Choices multiply, and
    what is repeated chooses each time anew."""

    def ways(tree) -> int:
        product = 1
        for op, args in tree:
            lists = [arg if isinstance(arg, list) else [arg] for arg in (args if isinstance(args, tuple) else [args])]
            parts = [part for args in lists for part in args if isinstance(part, re._parser.SubPattern)]
            choices = sum(map(ways, parts)) or 1
            if op.name.endswith("_REPEAT"):
                choices = 1 + choices if args[1] <= 1 else 30 * choices ** min(args[1], 30)
            product = min(product * choices, MOST_WAYS)
        return product

    return ways(re._parser.parse(pattern))


def _same_model(name: str, folder: pathlib.Path) -> bool:
    """Whether a base's name, a path or a hub id, can mean this folder: itself, the hub's cache of it, a copy of it."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    same = os.path.realpath(os.path.expanduser(name)) == os.path.realpath(folder)
    cached = f"models--{name.replace('/', '--')}"
    return same or bool(hub and (folder.name == name.split("/")[1] or cached in folder.parts))
