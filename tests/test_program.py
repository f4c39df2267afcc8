"""nanogspo/run/program.py: what a user sees when a program cannot go on, and a console that cannot end one.

Most programs here are a few lines in a file of their own, run in this process.

Run: python -m pytest tests/test_program.py
"""

import errno
import io
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from nanogspo.config import ROOT, SampleConfig
from nanogspo.run import program


class Console(io.RawIOBase):
    """The far end of a stream. fails: the error number that every write raises."""

    def __init__(self, encoding="utf-8", fails=0):
        self.data, self.fails, self.encoding = b"", fails, encoding

    def writable(self):
        return True

    def write(self, data):
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        self.data += bytes(data)
        return len(data)

    def stream(self, **settings):
        return io.TextIOWrapper(io.BufferedWriter(self), self.encoding, newline="\n", **settings)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(body of prog.py's `run(config)`, flags): exit code, stdout, stderr."""

    def start(body, *flags, check=lambda config: None, out=None, err=None, **settings):
        out, err = out or Console(), err or Console()
        file = tmp_path / "prog.py"
        file.write_text("import errno, os, signal, sys\ndef run(config):\n    " + body.replace("\n", "\n    "))
        streams = out.stream(), err.stream(line_buffering=True)  # as Python's own
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["prog.py", *flags])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as exit:
                program.main(str(file), SampleConfig, check, memory="lower --size", **settings)
            assert (sys.stdout, sys.stderr) == streams
        texts = (console.data.decode(console.encoding) for console in (out, err))
        return SimpleNamespace(**dict(zip(("code", "out", "err"), (exit.value.code, *texts), strict=True)))

    return start


# ----------------------------------------------------------------------------
# one line and an exit code


def test_a_process_of_several_ends_with_its_own_code(tmp_path):
    """Not with what is left of a collective: here a handler that aborts stands for its threads."""
    program = "import atexit, os\natexit.register(os.abort)\ndef run(config):\n    raise ValueError('got 1')\n"
    (tmp_path / "prog.py").write_text(program)
    start = "from nanogspo.run.program import main; from nanogspo.config import SampleConfig; import sys; "
    start += f"sys.argv = ['x']; main({str(tmp_path / 'prog.py')!r}, SampleConfig, lambda config: None, memory='')"
    command, there = [sys.executable, "-c", start], {**os.environ, "PYTHONPATH": str(ROOT)}
    several, one = (
        subprocess.run(command, env=there | {"WORLD_SIZE": count}, capture_output=True, text=True) for count in "21"
    )
    assert (several.returncode, several.stderr) == (2, "prog.py: got 1\n") and one.returncode not in (0, 2)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
@pytest.mark.parametrize("number", ["two", "", "-1", "1.5"])
def test_what_a_launcher_left_in_the_environment(run, monkeypatch, name, number):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, number)
    done = run("raise ValueError('got 1')") if not number else run("print(1)")
    line = f"got {name}={number!r} in the environment, want the number that torchrun sets, or none"
    assert (done.code, done.err) == (2, f"prog.py: {line if number else 'got 1'}\n")


def test_a_rank_alone_is_no_process_of_several(run, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("RANK", "1")
    assert run("pass", "--sed", "1").err.startswith("prog.py: ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("pass", "--sed", "1").err == ""  # process 0 says it
    assert run("raise ValueError('got 1')").err == "prog.py (process 1): got 1\n"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise ValueError('got 1,\\nwant 2')", 2, "got 1, want 2"),
        ("raise FloatingPointError('the norm is nan')", 2, "the norm is nan"),
        ("open('/absent/file')", 2, "[Errno 2] No such file or directory: '/absent/file'"),
        ("raise MemoryError", 2, "this machine is out of memory; lower --size"),
        ("raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))", 2, "this machine is out of memory; lower --size"),
        ("import torch; torch.empty(2**60, dtype=torch.uint8)", 2, "this machine is out of memory; lower --size"),
        (
            "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')",
            2,
            "the GPU is out of memory; lower --size",
        ),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, "stopped at once"),
    ],
)
def test_what_cannot_go_on_ends_in_one_line(run, body, code, line):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    try:
        done = run(body)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (done.code, done.out, done.err) == (code, "", f"prog.py: {line}\n")


def test_flags_reach_the_program_and_wrong_ones_do_not(run):
    def refuse(config):
        if config.seed > 1:
            raise ValueError("got a seed")

    body = "print(config.prompt, config.seed)"
    done = run(body, "hello", "--seed", "1", check=refuse)
    assert (done.code, done.out, done.err) == (0, "hello 1\n", "")
    assert vars(run(body, "--seed", "2", check=refuse)) == {"code": 2, "out": "", "err": "prog.py: got a seed\n"}
    done = run(body, "--sed", "1")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1) and "did you mean --seed?" in done.err


@pytest.mark.parametrize("bug", ["KeyError('x')", "RuntimeError('shapes differ')", "AssertionError('ratio')"])
def test_a_bug_keeps_its_traceback(run, bug):
    with pytest.raises((KeyError, RuntimeError, AssertionError)):
        run(f"raise {bug}")


# ----------------------------------------------------------------------------
# interrupts


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_an_interrupt_during_imports_is_one_line(tmp_path, name):
    """Parts of torch are C++, where a KeyboardInterrupt may abort the process: no such exception is raised."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt: os.abort()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, name], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: stopped at once\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows' shells start nothing with a signal ignored")
@pytest.mark.parametrize("how, code", [("2>&-", 130), ("2>&1 | :", 130), ("trap '' INT", 0)])
def test_an_interrupt_during_imports_has_its_code(tmp_path, how, code):
    """Without anybody to read the line; and none where the shell keeps Ctrl-C from a command in the background."""
    (tmp_path / "prog.py").write_text(
        "import os, signal, sys, time\n"
        "from nanogspo.config import SampleConfig\nfrom nanogspo.run.program import main\n"
        "if __name__ == '__main__':\n    main(__file__, SampleConfig, lambda config: None, memory='')\n"
        "time.sleep(0.2)\nos.kill(os.getpid(), signal.SIGINT)\ndef run(config): pass\n"
    )
    start = f"{sys.executable} {tmp_path / 'prog.py'}"
    line = (
        f"{how}; {start}; exit $?" if "trap" in how else f"{{ {start}; echo $? >&3; }} 3>code {how}; exit $(cat code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment, timeout=60, check=False)
    assert done.returncode == code


# ----------------------------------------------------------------------------
# the console


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(run, encoding):
    done = run("print('a ± b → c'); print('± →', file=sys.stderr)", out=Console(encoding), err=Console(encoding))
    want = "a ± b → c\n± →\n".encode(encoding, "replace").decode(encoding)
    assert (done.code, done.out + done.err) == (0, want)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EIO])
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x' * 10_000)\nprint('y')"])
def test_a_run_goes_on_without_a_console(run, body, number):
    err = Console()
    done = run(body + "\nprint('still here', file=sys.stderr)", out=Console(fails=number), err=err)
    line = f"prog.py: cannot write to stdout ({os.strerror(number)}); the run goes on without it\n"
    assert done.code == 0 and sorted(done.err.splitlines(True)) == sorted([line, "still here\n"])


@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)\nprint('never', file=sys.stderr)"])
def test_a_program_that_is_for_its_output_ends_with_it(run, body):
    done = run(body, out=Console(fails=errno.ENOSPC), needs_stdout=True)
    assert (done.code, done.err) == (2, "prog.py: cannot write to stdout (No space left on device)\n")
    for number in (errno.EPIPE, errno.EINVAL):  # what Windows says of a pipe that nobody reads
        done = run(body, out=Console(fails=number), needs_stdout=True)
        assert (done.code, done.err) == (141, "")


def test_a_full_stderr_changes_no_exit_code(run):
    assert run("print('x', file=sys.stderr)", err=Console(fails=errno.ENOSPC)).code == 0
    assert run("raise ValueError", out=Console(fails=errno.EPIPE), err=Console(fails=errno.EPIPE)).code == 2


def test_a_signal_handler_may_print_while_its_stream_is_written(run):
    """Python's buffers raise RuntimeError then; the handler's text is lost, and the run goes on."""

    class Interrupted(Console):
        def write(self, data):
            if bytes(data).startswith(b"outer"):
                print("inner", file=sys.stderr)
            return super().write(data)

    done = run("print('outer', file=sys.stderr)\nprint('after')", err=Interrupted())
    assert (done.code, done.out, done.err) == (0, "after\n", "outer\n")


def test_closed_streams_become_the_null_device(monkeypatch):
    """`<&- >&- 2>&-`: Python has None there."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    program.open_closed_streams()
    print("nowhere")
    print("nowhere", file=sys.stderr)
    assert sys.stdin.read() == "" and not sys.stdout.isatty()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here; the tests above need none")
def test_real_descriptors_say_nothing_at_exit():
    """Python flushes stdout once more as it ends, and would print "Exception ignored" and exit with 120."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reads, closed = os.pipe()
    os.close(reads)
    with open("/dev/full", "w") as full, open(closed, "w") as closed:
        for name, out, code, lines in (
            ("train.py", full, 0, 1),
            ("train.py", closed, 0, 1),
            ("sample.py", full, 2, 1),
            ("sample.py", closed, 141, 0),
        ):
            done = subprocess.run(
                [sys.executable, name, "--help"],
                cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr.count("\n")) == (code, lines), (name, done.stderr)
            assert "ignored" not in done.stderr
