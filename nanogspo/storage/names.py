"""The names of weights in files -> the names of Transformer's parameters.

The modules carry the hub's names, so only prefixes differ. What a text model does not use is skipped by name.
"""

import pathlib
import re

from nanogspo.inputs import some

# Names on the way in: the first prefix that matches is stripped. Multimodal wrappers put the text part deeper.
PREFIXES = ("thinker.model.", "thinker.", "model.language_model.", "language_model.model.", "language_model.", "model.")
# Parts of multimodal checkpoints that a text model does not use, and buffers that old files carry
SKIP = re.compile(
    r"(^|\.)(visual|vision_tower|audio_tower|multi_modal_projector|embed_vision|embed_audio|mtp|talker|code2wav)\."
    r"|rotary_emb\.inv_freq$"
)
# What a name gains when a wrapped model is saved instead of the model -> who wraps
FOREIGN = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
}
FOREIGN_PART = re.compile(rf"(?<![^.])({'|'.join(map(re.escape, FOREIGN))})")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def our_name(name: str) -> str:
    """Checkpoint tensor name -> parameter name of Transformer."""
    return next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)


def refuse_foreign_names(folder: pathlib.Path, unexpected: list[str], wanted: dict[str, tuple]) -> None:
    """Raises for a wrapped model's names, grouped by who wrapped it."""
    groups: dict[str, list[str]] = {}
    for name in unexpected:
        if (match := FOREIGN_PART.search(name)) and our_name(FOREIGN_PART.sub("", name)) in wanted:
            groups.setdefault(match[0], []).append(name)
    if groups:
        found = "; ".join(f"{part!r} of {FOREIGN[part]} in {len(n)} names ({some(n, 1)})" for part, n in groups.items())
        raise ValueError(f"{folder}: got {found}, want the model's own names: save the model inside the wrapper")
