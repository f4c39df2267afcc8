"""Wrong edits of nanogspo/storage/files.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/storage/files.py"
MUTANTS = {
    "tests/test_state.py": [
        ("        left.unlink(missing_ok=True)", "        pass", "each kill leaves a half-written file for ever"),
    ],
    "tests/test_checkpoint.py": [
        (
            'with writing(path), open(temporary, "wb") as f:',
            'with open(temporary, "wb") as f:',
            "a full disk is an error without a file",
        ),
        ("        if e.filename is not None:", "        if True:", "a full disk is said without the file's name"),
        (
            'if getattr(e, "filename", None):',
            "if False:",
            "a cache that may not be written reads like a broken network",
        ),
        (
            'path.with_name(f".{path.name}.{os.getpid()}.tmp")',
            'path.with_name(f".{path.name}.0.tmp")',
            "two writers' bytes in one file",
        ),
        (
            "pathlib.Path(os.path.expanduser(path_or_repo))",
            "pathlib.Path(path_or_repo).expanduser()",
            "the ~ of an unknown user is a traceback",
        ),
        (
            "(folder / INDEX).exists() and not (folder / SINGLE).exists()",
            "(folder / INDEX).exists()",
            "of two sets of weights the stale shards win",
        ),
        (
            '    if want in ("model", "config") and not is_model:',
            "    if False:",
            "an adapter given as --model has no config.json: fetch it again",
        ),
        (
            "        error = error.__cause__ or error.__context__",
            "        error = None",
            "the hub's 429 reads like a broken network",
        ),
        ("errors.HTTPError, ImportError) as e:", "errors.HTTPError) as e:", "a SOCKS proxy ends in a traceback"),
        (
            "if isinstance(e, errors.GatedRepoError):",
            "if isinstance(e, errors.DisabledRepoError):",
            "a gated repository looks like an unknown one",
        ),
        (
            'if any(re.search(r"[/\\\\\\0]|^\\.*$|.{256}", name) for name in names):',
            "if False:",
            "an index may point outside its folder",
        ),
    ],
}
