"""What --resume reads: one safetensors file with weights, optimiser, cursor and the rollout in progress.

One file, written atomically, because half a state is worse than none: a kill at any moment leaves the last whole one.
Tensors go in as tensors, everything else as JSON in the file's metadata; nothing is pickled.

The JSON also says what the run was made of, its configuration and a hash of every input file, so that a resumed run is
the run that was stopped or says what has changed; and it has a checksum of every tensor, so that a damaged state is
refused. The program's own version is not part of it: an update of it is no other run. States of versions that saved
the rollout's tokens as JSON are refused.

A sharded model's state is that of a whole one: its rows are gathered tensor by tensor as they are written, and each
process reads its own. So a run goes on sharded or not, and between rollouts by any number of processes.

Reading order: Progress, inputs, save_state, load_state, resume.       Tests: tests/test_state.py
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import zlib

import torch
from torch import Tensor, nn

from nanogspo import distributed, sharding
from nanogspo.config import MAY_CHANGE, TrainConfig, load_yaml
from nanogspo.experience import Experience, from_state
from nanogspo.inputs import named, some
from nanogspo.optimizer import Optimizer
from nanogspo.packing import Example
from nanogspo.storage.files import ADAPTER, ADAPTER_WEIGHTS, SMALL_FILES, resolve, weight_files
from nanogspo.storage.safetensors import Stored, raw_bytes, read_header, write_safetensors

MODEL, OPTIMIZER, ROLLOUT, REFERENCE = "model.", "optimizer.", "rollout.", "reference."
TOKENS, LENGTHS = "rollout.tokens", "rollout.lengths"  # of each example: all its tokens, those of its prompt


@dataclasses.dataclass
class Progress:
    """Where a run stands; saved with its state. Every draw of data and randomness is a function of these numbers."""

    phase: int = 0
    phase_step: int = 0  # updates done in this phase
    phase_done: bool = False  # the warm-up has reached its share of right answers
    step: int = 0  # updates done in all
    update: int = 0  # minibatches of the rollout at hand that are done
    sft_cursor: int = 0  # SFT examples drawn so far
    rl_cursor: int = 0  # problems drawn for rollouts so far
    clip: float = 0.0  # clip_low as --clip auto has measured it; 0: not measured


# ---------------------------------------------------------------------------------------------------------------------
# what a run is made of

WHOLE, PIECES, PIECE = 64 * 2**20, 256, 2**16
# the file in a --task, --reward or --environment: name:FILE of those that read one, and FILE.py:name
NAMED = re.compile(
    r"(?:gsm8k|conversation):(.+?)(?:=[\d.]+)?|judge:([^,]+?)(?:,.*|=[-+.\de]+)?|(.+?\.py)(?:[:=].*)?", re.DOTALL
)


def inputs(config: TrainConfig, *given: object) -> dict[str, dict]:
    """The settings a resumed run must share, and a hash of every file it reads, as save_state and resume take them.
    given: a task and rewards from Python, by their names, so that no resumed run goes on without them."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    settings = json.loads(json.dumps(settings))  # as a saved state has them: lists for tuples
    here = config.data and not config.data.startswith("hf:")  # a data set of the hub is pinned by its cache only
    files = {"data": pathlib.Path(config.data)} if here else {}
    if here and not files["data"].is_file():  # its rows have been read, and what is hashed now would be nothing
        raise ValueError(f"got a pipe as --data ({config.data}), want a file: a resumed run reads it again")
    found = filter(None, map(NAMED.fullmatch, (*config.task, *config.reward, config.environment)))
    paths = [pathlib.Path(match[match.lastindex]) for match in found]
    files |= {f"{'code' if path.suffix == '.py' else 'read'}/{path}": path for path in paths if path.is_file()}
    for kind, name in (("model", config.model), ("adapter", config.adapter)):
        if name and (kind, name) != ("model", "tiny"):
            folder = resolve(name, want=kind)
            names = SMALL_FILES if kind == "model" else (ADAPTER, ADAPTER_WEIGHTS)
            paths = {*(folder / name for name in names), *(weight_files(folder) if kind == "model" else ())}
            files |= {f"{kind}/{path.name}": path for path in sorted(paths) if path.exists()}
    objects = {f"python/{getattr(x, '__name__', type(x).__name__)}": "" for x in given if x is not None}
    return {"config": settings, "files": objects | {name: fingerprint(path) for name, path in files.items()}}


def fingerprint(path: pathlib.Path) -> str:
    """The size and SHA-256 of a file; of one above 64 MiB, of 256 evenly spread pieces of 64 KiB, both ends included.

    A model's weights are tens of GB. Training moves every tensor, so another training of the same model shows in any
    piece; an edit of a few bytes in the middle of a large file may not.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= WHOLE:
            while block := file.read(2**20):
                digest.update(block)
        else:
            for i in range(PIECES):
                file.seek(i * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return f"{size}-{digest.hexdigest()[:32]}"


def changes(then: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """What differs between the inputs of a saved run and of this one, each in a few words. What only one version of
    the program knows, a field or a kind of file, is not compared."""
    old, new = then["config"], now["config"]
    differ = [name for name in new if name in old and old[name] != new[name]]
    config = [f"--{name.replace('_', '-')} ({some([old[name]])} -> {some([new[name]])})" for name in differ]
    kinds = {name.split("/")[0] for name in then["files"]}
    known = then["files"].keys() | {name for name in now["files"] if name.split("/")[0] in kinds}
    return config + sorted(name for name in known if then["files"].get(name) != now["files"].get(name))


# ---------------------------------------------------------------------------------------------------------------------
# out


def save_state(
    path: pathlib.Path,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict,
    rollout: dict | None,
    made_of: dict[str, dict] | None = None,
    frozen: dict[str, Tensor] | None = None,
) -> None:
    """progress: JSON-able counters. rollout: None, or {"examples": [...], "tensors": {...}, "facts": {...}}. made_of:
    what `inputs` returned when the run started. frozen: the policy at the start of RL, where a copy of it is kept.

    All processes call it, and process 0 writes."""
    tensors = {MODEL + name: p.detach().to(sharding.dtype(model, p)) for name, p in sharding.trained(model).items()}
    tensors |= {OPTIMIZER + name: t for name, t in optimizer.state().items()}
    tensors |= {REFERENCE + name: t for name, t in (frozen or {}).items()}
    facts = {"progress": progress, **(made_of or {"config": {}, "files": {}})}
    if rollout:
        examples = rollout["examples"]
        tensors |= {ROLLOUT + name: t for name, t in rollout["tensors"].items()}
        prompts = [e.loss_mask.index(True) for e in examples]
        kept = [  # ~token: one after the prompt that is not scored, of an episode's other turns
            token if scored or i < prompt else ~token
            for e, prompt in zip(examples, prompts, strict=True)
            for i, (token, scored) in enumerate(zip(e.tokens, e.loss_mask, strict=True))
        ]
        tensors[TOKENS] = torch.tensor(kept)  # (tokens of all,)
        tensors[LENGTHS] = torch.tensor([[len(e.tokens), p] for e, p in zip(examples, prompts, strict=True)])  # (N, 2)
        facts["rollout"] = rollout["facts"]
    write_state(path, tensors, facts)


def write_state(path: pathlib.Path, tensors: dict[str, Tensor], facts: dict) -> None:
    if distributed.rank():  # which has nothing to say but its rows
        tensors = {name: t for name, t in tensors.items() if sharding.is_sharded(t)}
    # the header comes before the tensors, so each is read once more for its checksum: 1 s per GB, of a save of several
    text = json.dumps({**facts, "checksums": {name: _checksum(t) for name, t in tensors.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    # one entry: the package writes several in no fixed order
    write_safetensors(path, tensors, {"state": _sealed(text)})
    distributed.agree(False)  # nobody reads it before it is written


def _sealed(text: str) -> str:
    """A JSON object with its own checksum as the last entry, of 22 characters."""
    return f'{text[:-1]}, "crc32": "{zlib.crc32(text.encode()):08x}"}}'


def _checksum(t: Tensor) -> int:
    """CRC-32 of a tensor's bytes: against damage, not against forgery."""
    return zlib.crc32(raw_bytes(t))


# ---------------------------------------------------------------------------------------------------------------------
# in


def load_state(path: pathlib.Path, model: nn.Module, optimizer: Optimizer) -> tuple[dict, dict | None]:
    """Put weights and optimiser back in place; return (progress, rollout).

    Raises ValueError when the file is missing or damaged, or holds other parameters than the model trains. The model
    and its optimiser are then as they were.
    """
    header, facts = read_facts(path)
    wanted = {MODEL + name: p for name, p in sharding.trained(model).items()}
    differ = sorted({n for n in header if n.startswith(MODEL)} ^ set(wanted))
    for name in sorted(wanted.keys() & header.keys()):
        kind = header[name].dtype, header[name].shape
        differ += [name] if kind != (sharding.dtype(model, wanted[name]), tuple(wanted[name].shape)) else []
    if differ:
        raise ValueError(f"{path}: it trained other parameters ({some(differ, 4)}); resume with its own flags")
    # one tensor at a time: once for its checksum, once to its place
    sums = lambda: [n for n, stored in header.items() if _checksum(stored.read()) != facts["checksums"][n]]  # noqa: E731
    _refuse(path, distributed.first(sums))
    tensors = {n: s.read() for n, s in header.items() if n.startswith(ROLLOUT)}
    rollout = None
    if "rollout" in facts:
        examples = _examples(path, tensors.pop(TOKENS), tensors.pop(LENGTHS))
        numbers = {name.removeprefix(ROLLOUT): t for name, t in tensors.items() if name.startswith(ROLLOUT)}
        rollout = {"examples": examples, "tensors": numbers, "facts": facts["rollout"]}
    moments = {name.removeprefix(OPTIMIZER): s for name, s in header.items() if name.startswith(OPTIMIZER)}
    with named(path):
        kinds = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in moments.items()}
        optimizer.load_state(kinds, lambda name, into: sharding.fill(into, moments[name].read))
    for name, p in wanted.items():
        if p.dtype == header[name].dtype:  # else it is a master, which the optimiser has put in place
            sharding.fill(p, header[name].read)
    return facts["progress"], rollout


def load_frozen(path: pathlib.Path, model: nn.Module) -> dict[str, Tensor]:
    """The `frozen` that save_state was given, on the model's device; {} for none. Its checksums are load_state's."""
    header, _ = read_facts(path)
    trained = {REFERENCE + name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name: (s.dtype, s.shape) for name, s in header.items() if name.startswith(REFERENCE)}
    fits = kinds == {name: (p.dtype, tuple(p.shape)) for name, p in trained.items()}
    _refuse(path, ["reference"] if kinds and not fits else [])
    return {n.removeprefix(REFERENCE): header[n].read().to(p.device) for n, p in trained.items() if kinds}  # in order


def _examples(path: pathlib.Path, tokens: Tensor, lengths: Tensor) -> list[Example]:
    """The inverse of what save_state does; each has at least a token of a prompt and one of an answer."""
    sound = tokens.dtype == lengths.dtype == torch.int64 and tokens.ndim == 1 and lengths.shape[1:] == (2,)
    sound = sound and bool(((lengths[:, 1] > 0) & (lengths[:, 1] < lengths[:, 0])).all())
    sound = sound and lengths[:, 0].sum() == len(tokens)
    _refuse(path, [] if sound else [TOKENS, LENGTHS])
    pairs = [*zip(tokens.split(lengths[:, 0].tolist()), lengths[:, 1].tolist(), strict=True)]
    _refuse(path, [] if all((part[: prompt + 1] >= 0).all() for part, prompt in pairs) else [TOKENS])
    return [
        Example(
            [token if token >= 0 else ~token for token in part.tolist()],
            [i >= prompt and token >= 0 for i, token in enumerate(part.tolist())],
        )
        for part, prompt in pairs
    ]


def read_facts(path: pathlib.Path) -> tuple[dict[str, Stored], dict]:
    """The tensors of a saved state as read_header gives them, and its JSON, every entry of the type it is saved as."""
    if not path.exists():
        raise ValueError(f"{path}: no state to resume from; want the folder of a run that has saved at least once")
    header, metadata = read_header(path, want="it is incomplete or damaged; want a whole copy")
    if "state" not in metadata:
        raise ValueError(f"{path}: got a safetensors file that no run saved as its state; want one of this program")
    text = metadata["state"]
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        facts = None
    if "crc32" in metadata or (isinstance(facts, dict) and ("examples" in facts or "checksums" not in facts)):
        raise ValueError(f"{path}: an older version of this program saved it; finish the run with that version")
    _refuse(path, ["state"] if not isinstance(facts, dict) or text != _sealed(text[:-22] + "}") else [])
    dicts = ("config", "files", "checksums", "progress", *(["rollout"] if "rollout" in facts else []))
    _refuse(path, [name for name in dicts if not isinstance(facts.get(name), dict)])
    _refuse(path, sorted(facts["checksums"].keys() ^ header.keys()))
    _refuse(path, [name for name in (TOKENS, LENGTHS) if (name in header) != ("rollout" in facts)])
    return header, facts


def _refuse(path: pathlib.Path, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(f"{path}: {some(wrong, 4)} is not what was saved, the file is damaged; want a whole copy")


def resume(
    path: pathlib.Path,
    config: TrainConfig,
    made_of: dict[str, dict],
    model: nn.Module,
    optimizer: Optimizer,
    phases: int,
) -> tuple[Progress, Experience | None, list[str]]:
    """Go on from RUN/state/state.safetensors: what load_state does, and the rest of the run's memory.

    returns  where the run stands, the rollout at hand, and what has changed since (only with config.accept_changes)
    Raises ValueError with one line for a state that is damaged or does not fit, and for a change that is not accepted.
    """
    _, facts = read_facts(path)
    changed = changes(facts, made_of)
    if changed and not config.accept_changes:
        got = f"got --resume {path.parent.parent} with other inputs than it was saved with: {some(changed)}"
        want = "want them as they were, or --accept-changes, which goes on with these and notes it in metrics.jsonl"
        raise ValueError(f"{got}; {want}")
    saved, rollout = load_state(path, model, optimizer)
    saved = {"clip": 0.0} | saved  # states of versions without --clip auto
    kinds = {field.name: field.type for field in dataclasses.fields(Progress)}
    _refuse(path, sorted(f"progress.{name}" for name in saved.keys() ^ kinds.keys()))
    _refuse(path, [f"progress.{n}" for n, value in saved.items() if type(value) is not kinds[n] or value < 0])
    progress = Progress(**saved)
    if progress.phase >= phases:
        raise ValueError(f"{path}: got phase {progress.phase + 1} of a run of {phases}; want its own --warm-steps")
    if not progress.update:
        return progress, None, changed  # the next update samples a new one
    then = load_yaml(path.parent.parent / "config.yaml", TrainConfig, "the folder of an earlier run")
    cut = then.get("updates_per_rollout", TrainConfig.updates_per_rollout)
    if config.updates_per_rollout != cut:
        got = f"got --updates-per-rollout {config.updates_per_rollout} with --resume in the middle of a rollout"
        raise ValueError(f"{got} that was cut into {cut}; want {cut}")
    sizes = {name: (t.ndim, t.dtype) for name, t in (rollout or {"tensors": {}})["tensors"].items()}
    needed = {"--algo": "old_logp"} if config.algo != "reinforce" else {}
    needed |= {"--beta": "ref_logp"} if config.beta else {}
    if sizes and changed and (missing := [flag for flag, name in needed.items() if name not in sizes]):
        got = f"got another {missing[0]} in the middle of a rollout, which was scored for the run's own"
        raise ValueError(f"{got}; want that one until the rollout's updates are made")
    names = {"advantages", *needed.values(), *(sizes.keys() & {"old_logp", "ref_logp"})}
    routed = {name: (3, torch.int16) for name in sizes if name == "experts"}
    sound = sizes == dict.fromkeys(names, (1, torch.float32)) | routed
    sound = sound and len(rollout["tensors"]["advantages"]) == len(rollout["examples"])
    _refuse(path, [] if sound and progress.update < cut <= len(rollout["examples"]) else ["rollout"])
    return progress, from_state(rollout, updates=cut, max_tokens=config.micro_batch_tokens), changed
