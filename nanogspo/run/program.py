"""How a program starts and ends: its flags, its console, its exit code. Imports no torch.

    if __name__ == "__main__":
        main(__file__, TrainConfig, check, memory="lower --micro-batch-tokens")

Flags are read before the program's own imports, which take seconds: --help and a wrong flag answer at once. Whatever
ends a program, an interrupt during its imports too, comes to the one handler below.

Exit codes: 0 done, or stopped by request and saved · 2 with one line on stderr: bad input, out of memory, a disk or a
gradient that failed · 130 interrupted · 141 nobody reads what the program is for · 1 with a traceback: a bug of ours.

Reading order: main, explain, Stream.       Tests: tests/test_program.py
"""

import contextlib
import errno
import os
import pathlib
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from nanogspo.config import parse
from nanogspo.inputs import launched

state: pathlib.Path | None = None  # what this process saved or resumed from last; train.py sets it


def main(
    file: str, config_class: type, check: Callable[[Any], None], *, memory: str, needs_stdout: bool = False
) -> NoReturn:
    """Read the flags, call `run(config)` of the program in `file`, and exit. Raises SystemExit, or a bug's exception.

    memory        what to lower when memory runs out
    needs_stdout  end when nothing can be printed any more; otherwise say so on stderr and go on
    """
    global state
    process, processes = 0, 1  # of those that torchrun has started
    prog, state, code = os.path.basename(file), None, 0
    open_closed_streams()
    interrupt = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: Any) -> NoReturn:  # torch's own start-up aborts on a KeyboardInterrupt
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"{prog}: stopped at once\n".encode())
        os._exit(130)  # nothing is open yet

    def stdout_failed(error: OSError) -> None:
        if not needs_stdout:
            print(f"{prog}: cannot write to stdout ({error.strerror}); the run goes on without it", file=sys.stderr)
        elif error.errno in (errno.EPIPE, errno.EINVAL):  # `| head` has seen enough; EINVAL is what Windows calls it
            sys.exit(141)
        else:
            sys.exit(print(f"{prog}: cannot write to stdout ({error.strerror})", file=sys.stderr) or 2)

    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout, stdout_failed), Stream(sys.stderr, lambda error: None)
    try:
        processes = launched("WORLD_SIZE", 1)
        process = launched("RANK", 0) if processes > 1 else 0
        prog += f" (process {process})" * (process > 0)
        if interrupt != signal.SIG_IGN:  # else it is meant for others: `train.py &` in a script
            signal.signal(signal.SIGINT, interrupted)
        with contextlib.redirect_stderr(open(os.devnull, "w")) if process else contextlib.nullcontext():
            config, _ = parse(config_class, sys.argv[1:], prog)  # which one process may say for all
            check(config)
        program = runpy.run_path(file, run_name=pathlib.Path(file).stem)  # once more, as a module: imports and `run`
        signal.signal(signal.SIGINT, interrupt)
        program["run"](config)
    except (Exception, KeyboardInterrupt) as error:
        line, code = explain(error, memory)
        on_a_new_line = code == 130 and sys.stderr.isatty()  # after the terminal's own ^C
        sys.stderr.write("\n" * on_a_new_line + f"{prog}: {line}\n")  # at once: other processes have theirs
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout, sys.stderr = streams
            signal.signal(signal.SIGINT, interrupt)
    if code and processes > 1:
        sys.stderr.flush()
        os._exit(code)  # threads that wait for other processes may abort the interpreter's own end, with another code
    sys.exit(code)


def explain(error: BaseException, memory: str) -> tuple[str, int]:
    """(line, exit code) of what is no bug of ours; anything else is raised again. memory: what to lower."""
    intact = f"; the last saved state is intact (--resume {state.parent.parent})" if state else ""
    text = " ".join(str(error).splitlines())
    if isinstance(error, KeyboardInterrupt):
        return "stopped at once" + intact, 130
    if isinstance(error, MemoryError | RuntimeError | OSError) and out_of_memory(error):
        place = "the GPU" if "CUDA" in text or "HIP" in text else "this machine"
        return f"{place} is out of memory; {memory}{intact}", 2
    if isinstance(error, FloatingPointError | OSError):
        return text + intact, 2
    if isinstance(error, ValueError):
        return text, 2
    raise error


def out_of_memory(error: Exception) -> bool:
    """Only on a GPU has torch an exception of its own for it; on a CPU it is a RuntimeError like any other."""
    words = "out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def open_closed_streams() -> None:
    """A stream that the caller has closed (`>&-`) becomes the null device. Python has None for it, and the next file to
    be opened would get its descriptor, and with it whatever a library writes there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


class Stream:
    """stdout or stderr, which reports only its first failed write.

    A character that the terminal cannot show is replaced. A failed write (nobody reads the pipe, the disk is full)
    calls `failed` once, and from then on the descriptor is the null device: the flush at exit would fail again.
    """

    def __init__(self, stream: Any, failed: Callable[[OSError], None]):
        self.stream, self.failed = stream, failed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            failed, self.failed = self.failed, lambda error: None
            with contextlib.suppress(OSError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self.stream.fileno())
            failed(error)
        except RuntimeError:  # a signal handler prints while this very stream is being written: its text is lost
            pass
