"""Wrong edits of nanogspo/run/program.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/program.py"
MUTANTS = {
    "tests/test_program.py": [
        ("if processes > 1 else 0", "if True else 0", "a RANK that something else has set silences the program"),
        (
            ".encode())\n        os._exit(130)",
            ".encode())\n        raise KeyboardInterrupt",
            "an interrupt inside C++ aborts",
        ),
        (
            "            signal.signal(signal.SIGINT, interrupted)\n",
            "            pass\n",
            "an interrupt during imports as Python ends it",
        ),
        ("if interrupt != signal.SIG_IGN:", "if True:", "a Ctrl-C that the shell keeps from the run ends it"),
        (
            "        with contextlib.suppress(OSError):  # nobody",
            "        with contextlib.nullcontext():  # nobody",
            "an interrupt that nobody reads of has another code",
        ),
        (
            "        os._exit(code)",
            "        sys.exit(code)",
            "torch's threads decide the exit code of a process of several",
        ),
        ("        check(config)\n", "", "a wrong setting is found after the imports"),
        ('" ".join(str(error).splitlines())', "str(error)", "an error of several lines"),
        ("isinstance(error, MemoryError) or any", "any", "Python's own MemoryError is a bug"),
        ('"allocate memory", ', "", "torch out of memory on a CPU is a bug"),
        ("isinstance(error, FloatingPointError | OSError)", "isinstance(error, OSError)", "a diverged run is a bug"),
        ("    raise error\n", "    return text, 2\n", "a bug hides its traceback"),
        ("if not needs_stdout:", "if True:", "answers for nobody"),
        ("(errno.EPIPE, errno.EINVAL)", "(errno.EPIPE,)", "a closed pipe on Windows is an error"),
        ("            sys.stdout.flush()\n", "            pass\n", "what is still in the buffer fails unnoticed"),
        ('stream.reconfigure(errors="replace")', "pass", "a character ends the run"),
        (
            "            failed, self.failed = self.failed, lambda error: None\n",
            "            failed = self.failed\n",
            "a line on stderr for every line on stdout",
        ),
        (
            "                os.dup2(null.fileno(), self.stream.fileno())\n",
            "                pass\n",
            "the flush at exit fails again",
        ),
        ("        except RuntimeError:", "        except ZeroDivisionError:", "a handler that prints ends the run"),
        ("        if getattr(sys, name) is None:", "        if False:", "a closed stream stays None"),
    ],
    "tests/test_train.py": [
        ("    global state\n", "", "an earlier run's state is promised"),
    ],
}
