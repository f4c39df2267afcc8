"""The process around a run: its folder, its memory, and how it is asked to stop.

Tests: tests/test_process.py, tests/test_train.py
"""

import contextlib
import errno
import itertools
import math
import mmap
import os
import pathlib
import signal
import sys
from collections.abc import Iterator

from nanogspo.config import TrainConfig
from nanogspo.storage.files import writing

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCK = ".lock"  # in every run folder while a run writes there


@contextlib.contextmanager
def run_folder(config: TrainConfig) -> Iterator[pathlib.Path]:
    """Where this run writes, held for it alone while the context lasts.

    A folder that holds a run is never written over: it is resumed, or another is taken. Nothing is written into a
    folder that is not held. An empty one, such as an interrupted start leaves, is as good as a new one.
    """
    with contextlib.ExitStack() as held:
        yield _given_folder(config, held) if config.resume or config.out else _free_folder(config, held)


def _given_folder(config: TrainConfig, held: contextlib.ExitStack) -> pathlib.Path:
    folder = pathlib.Path(config.resume or config.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"got --{'resume' if config.resume else 'out'} {folder}, which is a file; want a folder")
    if config.resume and not folder.exists():
        raise ValueError(f"got --resume {folder}, which is no folder here; want the folder of an earlier run")

    def refuse_another_run() -> None:
        if not config.resume and _in_use(folder):
            raise ValueError(
                f"{folder} holds another run or other files; want an empty --out, or --resume {folder} to go on with it"
            )

    if folder.exists() and not (folder / LOCK).exists():
        refuse_another_run()  # without a lock of ours in it: that would be writing into it
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}); want another --out") from error
    held.enter_context(hold(folder))
    refuse_another_run()  # one that wrote and ended before the folder was held
    return folder


def _free_folder(config: TrainConfig, held: contextlib.ExitStack) -> pathlib.Path:
    """The first of runs/NAME, runs/NAME-2, ... that is new or empty, and that no other run takes at this moment."""
    name = "tiny" if config.model == "tiny" else pathlib.Path(config.model).name
    name += "" if name == "tiny" and config.algo == "gspo" else f"-{config.algo}"
    try:
        pathlib.Path("runs").mkdir(exist_ok=True)  # alone, because below a name that exists is a run's folder
    except OSError as error:
        raise ValueError(f"cannot make the folder runs ({error.strerror}); want another --out") from error
    for n in itertools.count(1):
        folder, made = pathlib.Path("runs", name if n == 1 else f"{name}-{n}"), True
        try:
            folder.mkdir()
        except FileExistsError:
            made = False
            if _in_use(folder):
                continue
        except OSError as error:
            raise ValueError(f"cannot make the folder {folder} ({error.strerror}); want another --out") from error
        try:
            locked = held.enter_context(hold(folder))
        except FolderHeld:
            continue
        if (made or locked) and not _in_use(folder):  # without locks an empty folder may be another run's new one
            return folder
        held.close()


def _in_use(folder: pathlib.Path) -> bool:
    return not folder.is_dir() or any(file.name != LOCK for file in folder.iterdir())


class FolderHeld(ValueError):
    """Another run writes into the folder."""


@contextlib.contextmanager
def hold(folder: pathlib.Path) -> Iterator[bool]:
    """Hold the operating system's lock on folder/.lock, which ends with its process, however that ends.

    Yields False, and prints a line, on a file system that has no locks. Raises FolderHeld, a ValueError, when another
    run holds it. The file is removed at the end; one that a kill left is locked by nobody, and is used again.
    """
    path = folder / LOCK
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"cannot write into {folder} ({error.strerror}); want another folder") from error
        try:
            locked = _lock(file)
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        except BlockingIOError:
            owner = os.read(file, 20).decode("ascii", "replace").strip()
            os.close(file)
            raise FolderHeld(
                f"{folder} is being written by another run (process {owner or 'not known yet'}); "
                "want another folder, or wait until it ends"
            ) from None
        except FileNotFoundError:
            pass
        os.close(file)  # the run that held it has ended and removed it, so it locks nothing any more: once more
    if not locked:
        print(f"{folder}: this file system has no locks; do not start a second run in this folder")
    try:
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        with writing(path):
            os.write(file, str(os.getpid()).encode())
        yield locked
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file: there it stays, locked by nobody
            path.unlink()
        os.close(file)


def _lock(file: int) -> bool:
    """True: locked. False: there are no locks here. BlockingIOError: another run has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, 2**20, os.SEEK_SET)  # Windows keeps others from reading what is locked: not the process id
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            os.lseek(file, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            os.lseek(file, 0, os.SEEK_SET)
            raise BlockingIOError from error
        return False
    return True


def peak_memory(device: str) -> float:
    """Bytes: the most the GPU held, or the most this process ever had resident; nan where nothing says."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(device: str, root: str = "/") -> float:
    """Bytes that this process can hold, those included that it holds already: of the GPU; as Linux estimates them, and
    no more than a container is allowed; elsewhere all that the machine has; inf, with a notice, where nothing says."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    top = pathlib.Path(root)
    try:
        facts = dict(line.split(":") for line in (top / "proc/meminfo").read_text().splitlines())
        resident, shared = (int(n) for n in (top / "proc/self/statm").read_text().split()[1:3])
        # pages shared with files are available: they can be read again
        available = int(facts["MemAvailable"].split()[0]) * 1024 + (resident - shared) * mmap.PAGESIZE
    except (OSError, KeyError):
        if not hasattr(os, "sysconf"):  # Windows
            print("this system does not say how much memory is free: the plan is not compared with it")
            return math.inf
        available = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    for limit in _cgroup_limits(top):
        if limit.is_file() and (words := limit.read_text().strip()).isdigit():  # "max": none
            available = min(available, int(words))
    return available


def _cgroup_limits(top: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files that may limit this process's memory: of its control group and of each group around it.

    A line of /proc/self/cgroup is NUMBER:CONTROLLERS:PATH; 0 is version 2, which has one tree for all controllers.
    """
    try:
        lines = (top / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for number, controllers, path in (line.split(":", 2) for line in [*lines, "0::/", "1:memory:/"]):
        folder, name = top / "sys/fs/cgroup", "memory.max"
        if number != "0":
            folder, name = folder / "memory", "memory.limit_in_bytes"
        if number == "0" or "memory" in controllers.split(","):
            group = pathlib.PurePosixPath(path.lstrip("/"))
            yield from (folder / part / name for part in (group, *group.parents))


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: two


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """What they did before is what they do afterwards: in a notebook Ctrl-C is for the next cell again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not set


class StopRequest:
    """True after Ctrl-C, SIGTERM or SIGHUP (the terminal was closed): the update at hand is finished and saved.

    A second Ctrl-C stops at once. A second SIGTERM or SIGHUP changes nothing: a terminal and its shell may both send
    one. A signal that was ignored at the start stays ignored: SIGHUP under nohup, SIGINT of `train.py &` in a script.
    """

    def __init__(self):
        self.asked = False
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, number, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            print("\nstopping after this update (Ctrl-C once more to stop at once)", file=sys.stderr)
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked
