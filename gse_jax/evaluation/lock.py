"""One writer per name: a lock that the death of its owner releases.

The kernel's file lock goes with the process, also after kill -9. Where the file system does not
carry it to other machines, the owner's heartbeat (the file's time stamp) tells whether it lives.
"""

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

from gse_jax.evaluation.durable import StoreError

HEARTBEAT_SECONDS = 10.0
# A writer on another machine that was not seen for so long is dead; six heartbeats, because the
# time stamps of network file systems lag.
STALE_SECONDS = 60.0

_LONG_AGO = 3600.0  # dead without a wait, whatever the clocks say
_FIRST_LOOK: dict[Path, tuple[float, float]] = {}  # time stamp of a lock file, and when we saw that

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class WriterLock:
    """Holds the right to write as `writer` in a run directory; a context manager.

    Entering raises `StoreError` where another process holds the same name, or one whose samples
    overlap with ours.
    """

    def __init__(self, folder: Path, writer: str, residue: tuple[int, int]):
        """Prepare the lock.

        Args:
            folder: where the lock files are.
            writer: name of the writer.
            residue: (i, n): the writer takes samples i, i + n, i + 2 n ...
        """
        self._folder, self._writer, self._residue = folder, writer, residue
        self._path = folder / f"{writer}.lock"
        self._file: int | None = None
        self._stop = threading.Event()

    def __enter__(self):
        for path in self._folder.glob("*.lock"):  # of all at once: their owners are waited for together
            _FIRST_LOOK[path] = path.stat().st_mtime, time.monotonic()
        # Not unlinked afterwards: a process that waits on an unlinked file would lock a ghost.
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            carried = _lock(self._file, shared=False)
            if carried is None or _alive(self._path, trust_processes=carried):
                raise StoreError(_held_message(self._writer, _owner(self._path)))
            me = {"host": _host(), "pid": os.getpid(), "residue": list(self._residue)}
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            os.write(self._file, json.dumps(me).encode())
            self._refuse_overlaps()
        except BaseException:
            os.close(self._file)
            raise
        threading.Thread(target=self._beat, name="gse-jax heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        os.ftruncate(self._file, 0)  # An empty file is a free lock.
        os.close(self._file)

    def _beat(self):
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self._path)
            except OSError:  # The writer itself reports what is wrong with the directory.
                continue

    def _refuse_overlaps(self):
        for path in sorted(self._folder.glob("*.lock")):
            owner = _owner(path)
            if path == self._path or owner is None or not _overlap(owner["residue"], self._residue):
                continue
            if _is_held(path):
                os.ftruncate(self._file, 0)
                raise StoreError(_held_message(path.stem, owner))


def _lock(file: int, *, shared: bool) -> bool | None:
    """Try to lock, alone or beside others who only look: None where another process has it, False where the system cannot tell."""
    try:
        import fcntl
    except ImportError:  # No such module on Windows.
        return False
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _is_held(path: Path) -> bool:
    """Tell whether a process holds the lock file `path`, without keeping it."""
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # Shared: writers that begin together look at the same dead one, and wait for its heartbeat.
        carried = _lock(file, shared=True)
        return carried is None or _alive(path, trust_processes=carried)
    finally:
        os.close(file)


def _alive(path: Path, *, trust_processes: bool) -> bool:
    """Tell from the file's content whether its owner lives; waits for a heartbeat if in doubt."""
    owner = _owner(path)
    if owner is None:
        return False
    if owner["host"] == _host():
        if trust_processes or owner["pid"] == os.getpid():
            # The kernel's lock was free, so on this machine nobody holds it.
            return False
        if os.name != "nt":  # Windows has no signal that only asks: there its heartbeat tells.
            return _process_lives(owner["pid"])
    last, begin = _FIRST_LOOK.get(path) or (path.stat().st_mtime, time.monotonic())
    if path.stat().st_mtime != last:
        return True
    # Clocks of two machines differ by minutes, so only what is hours old is dead without a wait.
    while time.time() - last < _LONG_AGO and time.monotonic() - begin < STALE_SECONDS:
        time.sleep(1.0)
        if path.stat().st_mtime != last:
            return True
    return False


def _owner(path: Path) -> dict | None:
    try:
        owner = json.loads(path.read_text())
        index, count = map(int, owner["residue"])
        known = {"host": str(owner["host"]), "pid": int(owner["pid"]), "residue": (index, count)}
        return known if count > 0 else None
    except (ValueError, TypeError, KeyError, OSError):  # Free, or torn by a crash.
        return None


def _process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}".strip()


def _overlap(a, b) -> bool:
    """Tell whether two residue classes (i modulo n) share a number."""
    import math

    return (a[0] - b[0]) % math.gcd(a[1], b[1]) == 0


def _held_message(writer, owner):
    who = f"process {owner['pid']} on {owner['host'].partition(' ')[0]}" if owner else "another process"
    return (f"run directory: {who} is working in it as {writer!r}; wait for it or stop it, or give "
            "both their own part with --shard I/N")
