"""Wrong edits of nanogspo/run/process.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/process.py"
MUTANTS = {
    "tests/test_process.py": [
        ("        with writing(path):\n", "        if True:\n", "a full disk is an error without a file"),
        ("fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "two runs hold one folder"),
        ("os.path.samestat(os.fstat(file), os.stat(path))", "True", "a lock on a file that another run has removed"),
        (
            "        except FolderHeld:\n            continue",
            "        except OSError:\n            continue",
            "an automatic name that is taken ends the run",
        ),
        ("(made or locked) and not", "not", "without locks two runs share an empty folder"),
        (
            "    refuse_another_run()  # one that wrote",
            "    # one that wrote",
            "what a faster run wrote is written over",
        ),
        ("any(file.name != LOCK for file in", "any(file for file in", "a folder with only a lock is a run"),
        ("            path.unlink()\n", "            pass\n", "the lock stays when the run ends"),
        ("if folder.exists() and not (folder / LOCK).exists():", "if False:", "a lock in somebody else's folder"),
        ("        return False\n    return True", "        raise\n    return True", "no run where there are no locks"),
        ("if signal.getsignal(number) != signal.SIG_IGN:", "if True:", "nohup is not heeded"),
        ('"SIGTERM", "SIGHUP")', '"SIGTERM")', "a closed terminal kills the run"),
        (
            '        pathlib.Path("runs").mkdir(exist_ok=True)',
            '        pathlib.Path("runs").exists()',
            "no place for runs, no end",
        ),
        (
            "if self.asked and number == signal.SIGINT:",
            "if self.asked:",
            "the second signal of a closed terminal kills",
        ),
    ],
    "tests/test_planner.py": [
        ("for part in (group, *group.parents))", "for part in (group,))", "a limit of the group around is not seen"),
        ('or "memory" in controllers.split(",")', "or True", "another controller's group limits memory"),
    ],
    "tests/test_train.py": [
        ("        return math.nan\n", "        raise\n", "no run without the module resource"),
        ('if not hasattr(os, "sysconf"):', "if False:", "no run without os.sysconf"),
    ],
}
