"""What two ledgers share (tools/mutate.py, tools/compile_kernels.py): one JSON object a line, and which lines to doubt.

One a line, sorted: a diff reads well, and entries of two branches merge line by line (.gitattributes).
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path


def read(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in dict.fromkeys(lines)]  # a merge may have doubled some


def write(path: Path, entries: list[dict]) -> None:
    """Replaces the file at once: killed here, the old one stays."""
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    fresh.replace(path)


def drawn_again(root: Path, keys: list[str], one_in: int = 20) -> set[str]:
    """A part of what is proven that differs from commit to commit: it is run again, whatever the ledger says."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout
    digests = {key: hashlib.sha256((commit + key).encode()).digest() for key in keys}
    return {key for key, digest in digests.items() if int.from_bytes(digest) % one_in == 0}
