"""Out: merged weights that are compared with the model they came from, and --push-to-hub.

    check_merged(model, folder / "model", prompt)      raises where the saved logits are not the model's
    push(config, folder, repo)                         adapter/ or model/, a model card, curves, settings: one commit

Tests: tests/test_hub.py
"""

import platform
from pathlib import Path

import torch
import yaml

from nanogspo import checkpoint, distributed, policy, sharding
from nanogspo.config import TrainConfig, dump
from nanogspo.data import Data
from nanogspo.model import Transformer
from nanogspo.run.log import read_rows
from nanogspo.run.process import available_memory

# Of the logits' standard deviation, on average. Merged weights are rounded to their dtype: 2^-9 of each in bf16, which
# grows with depth to about 0.02; another sign or scale of an adapter is as large as what it has learned
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.05}


def save_weights(model: Transformer, config: TrainConfig, data: Data, folder: Path) -> None:
    """policy.save, and where it has merged an adapter a look at what was written."""
    policy.save(model, config, folder, data.chat.tokenizer)
    if config.lora_r and (config.save_merged or config.model == "tiny"):
        tokens = data.rows[0].tokens if data.rows else data.chat.prompt(data.task.train_problem(0, config.seed))
        with sharding.gathered(model):
            print(distributed.first(lambda: check_merged(model, folder / "model", tokens[:64])))


@torch.no_grad()
def check_merged(model: Transformer, folder: Path, tokens: list[int]) -> str:
    """Load `folder` again and compare its logits with those of the model and its adapter. Returns a line to print.

    tokens  ids of a text
    Raises ValueError where they differ by more than CLOSE. Without memory for a second model nothing is compared.
    """
    weight = model.norm.weight
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if needed > available_memory(weight.device.type) / 2:
        return f"{folder}: not compared with the model, which would take {needed / 1e9:.1f} GB more"
    merged = checkpoint.load(folder, device=weight.device, dtype=weight.dtype)
    row = torch.tensor([tokens], device=weight.device)  # (1, T)
    was_training = model.training
    want, got = (m.logits(m(row)) for m in (model.eval(), merged))  # (1, T, V), without dropout
    model.train(was_training)
    apart = ((want - got).abs().mean() / want.std()).item()
    if not apart <= CLOSE[weight.dtype]:
        raise ValueError(
            f"{folder}: got merged weights whose logits are {apart:.2g} of a standard deviation off, want at most "
            f"{CLOSE[weight.dtype]}; the adapter in {folder.parent / 'adapter'} is whole"
        )
    return f"{folder}: merged; its logits are within {apart:.1e} of a standard deviation of the model's"


def check_login(repo: str) -> None:
    """Before a run: can this machine push to the hub at all? ValueError says what to do. "": nothing is pushed."""
    if not repo:
        return
    if repo.count("/") != 1:
        raise ValueError(f"got --push-to-hub {repo}, want OWNER/NAME")
    import huggingface_hub as hub  # 0.3 s to import, and most runs do not need it

    try:
        hub.HfApi().whoami()
    except (hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError, OSError) as e:
        raise ValueError(f"got --push-to-hub {repo}, but the hub says: {first_line(e)}; want `hf auth login`") from e


def push(config: TrainConfig, folder: Path) -> None:
    """Upload what the run has made, and print where, or what failed: training is not lost with the network."""
    if not config.push_to_hub:
        return
    import huggingface_hub as hub

    repo, part = config.push_to_hub, folder / ("adapter" if config.lora_r and not config.save_merged else "model")
    files = {file.name: file for file in sorted(part.iterdir()) if file.is_file()}
    files |= {name: folder / name for name in ("curves.png", "config.yaml") if (folder / name).exists()}
    files = {"training.yaml" if name == "config.yaml" else name: file for name, file in files.items()}
    files["README.md"] = model_card(config, folder, part.name).encode()
    try:
        api = hub.HfApi()
        api.create_repo(repo, exist_ok=True, private=True)
        operations = [hub.CommitOperationAdd(name, file) for name, file in files.items()]
        url = api.create_commit(repo, operations, commit_message=f"{config.algo} with nanogspo").commit_url
    except (hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        return print(f"not pushed to {repo}: {first_line(error)}; once mended: hf upload {repo} {part}")
    print(f"pushed {part} to {url} (private; its page can make it public)")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def model_card(config: TrainConfig, folder: Path, kind: str) -> str:
    """README.md of a hub repository: task, results, recipe, versions. kind: adapter or model."""
    evals = [row for row in read_rows(folder / "metrics.jsonl") if "eval_exact" in row or "eval_loss" in row]
    base = f"base_model: {config.model}\n" if config.model.count("/") == 1 and not Path(config.model).exists() else ""
    library = "peft" if kind == "adapter" else "transformers"
    task = config.environment or config.data or ", ".join(config.task)
    lines = [f"---\n{base}library_name: {library}\npipeline_tag: text-generation\ntags: [{config.algo}, nanogspo]\n---"]
    lines += [
        f"# {config.model}, trained with {config.algo}",
        f"Task: {task}. Steps: {config.steps}. Seed: {config.seed}.",
    ]
    lines += ["## Held-out results", "| update | phase | result | of |\n|---|---|---|---|"] if evals else []
    for row in evals:
        exact = "eval_exact" in row
        result = f"{row['eval_exact']:.1%} exact" if exact else f"loss {row['eval_loss']:.4f}"
        interval = f" ({row['eval_low']:.1%} to {row['eval_high']:.1%})" if exact else ""
        lines[-1] += f"\n| {row['step']} | {row['phase']} | {result}{interval} | {row['eval_count']} |"
    lines += ["![curves](curves.png)"] if (folder / "curves.png").exists() else []
    usual = yaml.safe_load(dump(TrainConfig()))
    told = {name: value for name, value in yaml.safe_load(dump(config)).items() if value != usual[name]}
    recipe = yaml.safe_dump(told, sort_keys=False)
    lines += [
        "## Recipe",
        f"What differs from the defaults; `training.yaml` has every setting.\n\n```yaml\n{recipe}```",
    ]
    lines += ["## Versions", f"Python {platform.python_version()}, torch {torch.__version__}, nanogspo."]
    return "\n\n".join(lines) + "\n"
