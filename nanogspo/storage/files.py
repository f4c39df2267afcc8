"""Where a checkpoint's files are, and how a file is written whole. Imports no torch: `--help` and the tokenizer use it.

A checkpoint is a folder or a hub repository `owner/name`, which huggingface_hub fetches into its own cache. Of a
repository only what is read is fetched. Nothing is ever unpickled and no code comes from a checkpoint.

Reading order: resolve, weight_files, whole_file.       Tests: tests/test_checkpoint.py
"""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator
from typing import BinaryIO

from nanogspo.inputs import need, read_json, shown, some

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# All that Tokenizer.save writes. merges.txt and tokenizer.model are not read but kept for other programs.
TOKENIZER_FILES = tuple(
    """tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja chat_template.json
    added_tokens.json vocab.json merges.txt tokenizer.model""".split()
)
SMALL_FILES = ("config.json", "generation_config.json", ADAPTER, INDEX, *PROCESSOR_FILES, *TOKENIZER_FILES)
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))  # the disk, a limit of the system, a quota
HUB_STATUS = {
    401: "it wants a token, or another one: run `hf auth login`",
    403: "this token may not read it: ask for access on its page, or run `hf auth login` with another token",
    404: "there is no such repository or file: check the name",
    429: "too many requests: wait some minutes, or run `hf auth login` for a higher limit",
}


def resolve(path_or_repo: str | os.PathLike, *, want: str = "checkpoint") -> pathlib.Path:
    """The local folder of a checkpoint: itself, or the hub repository `owner/name` fetched into the hub's own cache.

    want  "model" or "adapter": a folder of the other kind, or of a run that holds one, is refused and the right flags
          are named. "config": a model, and no weights are fetched. "checkpoint": either. "tokenizer": either, and no
          weights are fetched

    Only what is needed is fetched: config and tokenizer files, and the safetensors that are read.
    Raises ValueError with one line to act on: no such folder, unknown or gated repository, no network, disk full.
    """
    path = pathlib.Path(os.path.expanduser(path_or_repo))  # which leaves the ~ of an unknown user as it is
    if path.is_dir():
        _refuse_other_folder(path, want)
        return path
    name, adapter = str(path_or_repo), want == "adapter"
    if path.exists():
        kind = "a checkpoint folder (config.json, *.safetensors) or a hub id owner/name"
        kind = f"an adapter's folder ({ADAPTER}, {ADAPTER_WEIGHTS})" if adapter else kind
        raise ValueError(f"got the file {name}, want {kind}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        got, kind = ("adapter", "an adapter's") if adapter else ("model", "a checkpoint")
        raise ValueError(f"got {got} {shown(name)}, which is no folder here; want {kind} folder or a hub id owner/name")
    folder = _fetch(name, want)
    _refuse_other_folder(folder, want)
    return folder


def _refuse_other_folder(folder: pathlib.Path, want: str) -> None:
    """Raises for an adapter or a run given as a model, and for a model or a run given as an adapter."""

    def flags(adapter: pathlib.Path) -> str:
        base = need(read_json(adapter / ADAPTER), "base_model_name_or_path", str, default="", where=ADAPTER)
        return f"--model {some([base or 'ITS_BASE'])} --adapter {adapter}"

    is_adapter, is_model = (folder / ADAPTER).exists(), (folder / "config.json").exists()
    if want in ("model", "config") and not is_model:
        if is_adapter:
            raise ValueError(f"{folder} is an adapter: give {flags(folder)}")
        if (folder / "model" / "config.json").exists():
            raise ValueError(f"{folder} is a run's folder: give --model {folder / 'model'}")
        if (folder / "adapter" / ADAPTER).exists():
            raise ValueError(f"{folder} is a run's folder: give {flags(folder / 'adapter')}")
    if want == "adapter" and not is_adapter:
        if (folder / "adapter" / ADAPTER).exists():
            raise ValueError(f"{folder} is a run's folder: give --adapter {folder / 'adapter'}")
        hint = "; this is a model: give --model" if is_model else ""
        raise ValueError(f"{folder}: got no {ADAPTER}, want an adapter's folder{hint}")


def _fetch(repo: str, want: str) -> pathlib.Path:
    import huggingface_hub as hub  # 0.3 s to import, and most runs do not need it
    from huggingface_hub import errors

    weights = {"model": [SINGLE], "adapter": [ADAPTER_WEIGHTS], "checkpoint": [SINGLE, ADAPTER_WEIGHTS]}.get(want, [])
    try:
        folder = pathlib.Path(hub.snapshot_download(repo, allow_patterns=[*SMALL_FILES, *weights]))
        if SINGLE in weights and not (folder / SINGLE).exists() and (folder / INDEX).exists():
            shards = sorted(file.name for file in shard_files(folder))
            folder = pathlib.Path(hub.snapshot_download(repo, allow_patterns=[*SMALL_FILES, *shards]))
        return folder
    # a full disk, connection errors and LocalEntryNotFoundError are OSErrors; a time-out within a file is an HTTPError;
    # ImportError: of the HTTP client, when a proxy needs a package that is not there
    except (OSError, errors.HTTPError, ImportError) as e:
        local = f"or give a local folder with {'--adapter' if want == 'adapter' else '--model'} DIR"
        raise ValueError(f"{_advice(e, repo)}, {local}") from e


def _advice(e: Exception, repo: str) -> str:
    """Why a repository could not be fetched, and what to do."""
    from huggingface_hub import errors

    if isinstance(e, errors.GatedRepoError):
        return f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then run `hf auth login`"
    if isinstance(e, errors.RepositoryNotFoundError):
        return f"the hub has no repository {repo} (or it is private): check the name, run `hf auth login`"
    if isinstance(e, ImportError):
        proxies = sorted(k for k in os.environ if k.upper().endswith("_PROXY") and "socks" in os.environ[k].lower())
        proxy = f"cannot reach the hub through the SOCKS proxy of {some(proxies) or 'this system'}"
        unset = " ".join(proxies) or "it"
        return f"{proxy}, which needs a package that is missing: pip install socksio, or unset {unset}"
    if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
        return f"the disk is full while fetching {repo}: free some space or set HF_HOME to another disk"
    if getattr(e, "filename", None):  # a file of the cache, and nothing of the network
        return f"cannot write {e.filename} ({e.strerror}) to fetch {repo}: set HF_HOME to a folder of yours"
    status = _status(e)
    if why := HUB_STATUS.get(status) or ("the hub has a fault of its own: try again later" if status >= 500 else ""):
        return f"the hub answers {status} for {repo}: {why}"
    return f"cannot reach the hub for {repo} and it is not in the cache: check the network"


def _status(error: BaseException | None) -> int:
    """The HTTP status behind an error or behind what it was raised from; 0: none."""
    while error is not None:
        if status := getattr(getattr(error, "response", None), "status_code", 0):
            return status
        error = error.__cause__ or error.__context__
    return 0


def read_config(folder: pathlib.Path) -> dict:
    return read_json(folder / "config.json")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """An OSError from within says which file, and a full disk what to do. One of an open or a rename knows its file."""
    try:
        yield
    except OSError as e:
        if e.filename is not None:
            raise
        want = "; want free space on its disk" * (e.errno in FULL)
        raise OSError(f"{path}: cannot be written ({e}){want}") from e


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Write a whole file or nothing: a temporary neighbour, then a rename. A kill in between leaves the old file.

    What a kill left is removed by the next writer of the file. Of two writers at a time, which only a folder that no
    run holds can have, the first fails at its rename, since the name has its process's number: no file is of both.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    try:
        with writing(path), open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    with whole_file(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors of a checkpoint folder: model.safetensors, else those that the index names."""
    files = shard_files(folder) if (folder / INDEX).exists() and not (folder / SINGLE).exists() else [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            got = f"{folder}: got {some(pickles)}, pickles that can run code when opened; want safetensors"
            code = "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR)"
            raise ValueError(f"{got} (convert with transformers: {code})")
        line = f"{folder}: missing weight files {some(missing)}"
        raise ValueError(f"{line}; fetch them again (a repository of pickles has none)")
    return files


def shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that a folder's index names."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{folder / INDEX}: got no weight_map, want tensor name -> file name")
    names = sorted(set(weight_map.values()))
    if any(re.search(r"[/\\\0]|^\.*$|.{256}", name) for name in names):
        raise ValueError(f"{folder / INDEX}: got a file name that leaves the folder, want plain names")
    return [folder / name for name in names]
