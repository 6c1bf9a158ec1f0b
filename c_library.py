"""Compile C code at first use, keep the library in the user's cache, and load it with ctypes: Linux on x86-64.

`load(name, source, functions)` is all that a kernel's file needs. A library in the cache ends in the SHA-256 of the
bytes before it, which is checked before the library is mapped: a truncated one would kill the process with SIGBUS.
"""

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable, Dict, List, Optional, Sequence, Set, Tuple

ADDRESS, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float  # for `load`'s `functions`
FLAGS = ("-O3", "-fPIC", "-fopenmp", "-mavx2", "-mf16c", "-mfma")
AVX512 = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512vl": "-mavx512vl", "avx512_vnni": "-mavx512vnni"}
LIMIT = 120  # seconds for one call of the compiler; it takes a few
OUTPUT = 1 << 20  # bytes of its output that are read
BUILD = "build-"  # the beginning of the names of folders to compile in


class CompileError(OSError):
    """The compiler refused the code: with other options it may take it."""


def load(name: str, source: Callable[[str], str], functions: Dict[str, Sequence]) -> Tuple[Optional[ctypes.CDLL], str]:
    """Return (the library, "") or (None, the reason and the remedy in one line).

    The library's `instructions` is what it was compiled for, "avx512" or "avx2", with the compiler's `options`.

    Args:
        name: of the library's file in the cache.
        source: "avx512" or "avx2" -> the C code, for each of `instructions()` until one compiles.
        functions: name -> ctypes of its arguments, for every function that is called. They return nothing.

    Nothing that the compiler, the cache or the file system does raises an exception.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"the C kernels need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    reason = "this CPU has neither AVX512-VNNI nor AVX2"
    try:
        compiler, version = find_compiler()
        folder = cache_folder()
        for kind, flags in instructions():
            text = source(kind).encode()
            key = hashlib.sha256(b"\0".join((text, version, *map(os.fsencode, (*compiler, *flags))))).hexdigest()[:16]
            path = os.path.join(folder, f"{name}-{key}.so")
            try:
                library = cached(path, functions) or build(path, text, compiler, flags, functions)
                library.instructions, library.options = kind, flags
                return library, ""
            except CompileError as error:  # an older compiler may support only the slower instructions
                reason = str(error)
    except (OSError, ValueError) as error:
        reason = str(error)
    return None, reason


def instructions() -> List[Tuple[str, Tuple[str, ...]]]:
    """Return ("avx512" or "avx2", compiler options) for each instruction set of this CPU, fastest first."""
    known, found = cpu_flags(), []
    if known >= AVX512.keys():
        flags = (*FLAGS, *AVX512.values())
        if "avx512_bf16" in known:
            found.append(("avx512", (*flags, "-mavx512bf16")))  # GCC 10 and later
        found.append(("avx512", flags))
    if known >= {"avx2", "avx_vnni", "f16c", "fma"}:
        found.append(("avx2", (*FLAGS, "-mavxvnni")))  # GCC 11 and later
    if known >= {"avx2", "f16c", "fma"}:
        found.append(("avx2", FLAGS))
    return found


def cpu_flags() -> Set[str]:
    """What /proc/cpuinfo calls this CPU's features."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()


# ---- the cache ------------------------------------------------------------------------------------------------------


def cache_folder() -> str:
    """A directory that only this user can write to, because the libraries in it are executed."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # to be ignored, says the XDG specification
        base = os.path.expanduser("~/.cache")
    folder = os.path.join(base, "chatglm2")
    with contextlib.suppress(OSError):
        if os.path.isabs(folder):  # "~" stays where a user has no home
            os.makedirs(folder, mode=0o700, exist_ok=True)
            status = os.stat(folder)
            own = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK)
            if own and is_private(folder):
                return folder
    folder = tempfile.mkdtemp(prefix="chatglm2-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def is_private(path: str) -> bool:
    """Whether only this user and root can replace what `path`, absolute, leads to. Parents and links count."""
    status, parent = os.lstat(path), os.path.dirname(path)
    if status.st_uid not in (0, os.getuid()):
        return False
    if stat.S_ISLNK(status.st_mode):
        if not is_private(os.path.join(parent, os.readlink(path))):
            return False
    elif status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        return False  # in a sticky directory, such as /tmp, others cannot replace what this user owns
    return parent == path or is_private(parent)


def cached(path: str, functions: Dict[str, Sequence]) -> Optional[ctypes.CDLL]:
    """The library at `path`; None if it is not there, damaged, or not loadable."""
    with contextlib.suppress(OSError):  # it is built again: if its folder is to blame, that reports it
        with open(path, "rb") as file:
            content = file.read()
        if is_private(path) and hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return opened(path, functions)
    return None


def opened(path: str, functions: Dict[str, Sequence]) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        hint = "if its file system is mounted noexec, set XDG_CACHE_HOME to a folder on another one"
        raise OSError(f"{error}: {hint}") from None
    for name, arguments in functions.items():
        if not hasattr(library, name):
            raise OSError(f"{path} has no function {name}")
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    return library


# ---- the compiler ---------------------------------------------------------------------------------------------------


def find_compiler() -> Tuple[List[str], bytes]:
    """The compiler's command, and what it says of its version."""
    given = os.environ.get("CC", "")
    try:
        compiler = shlex.split(given) or [shutil.which("gcc") or shutil.which("cc") or "gcc"]
    except ValueError as error:
        raise ValueError(f"CC={given!r} is not a command ({error}): set it to a C compiler") from None
    if not shutil.which(compiler[0]):
        raise OSError(f"no C compiler {compiler[0]!r} found: install gcc, or set CC to a compiler")
    return compiler, run([*compiler, "--version"])


def build(
    path: str, text: bytes, compiler: List[str], flags: Sequence[str], functions: Dict[str, Sequence]
) -> ctypes.CDLL:
    """Compile a library, load it, and keep it at `path`. Processes may overlap: each renames a complete file."""
    sweep(os.path.dirname(path))
    if sys.stderr and sys.stderr.isatty():
        print("Compiling C kernels for this CPU: a few seconds, once", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=BUILD, dir=os.path.dirname(path)) as folder:
        code, object_file, library = (os.path.join(folder, "kernel." + suffix) for suffix in ("c", "o", "so"))
        with open(code, "wb") as file:
            file.write(text)
        # Not linked against an OpenMP runtime: the symbols resolve to the one that torch has loaded.
        run([*compiler, *flags, "-c", code, "-o", object_file], folder)
        run([*compiler, "-shared", "-Wl,-Bsymbolic", object_file, "-o", library], folder)  # its own functions first
        if not os.path.exists(library):
            raise OSError(f"{compiler[0]!r} wrote no library: set CC to a C compiler")
        os.chmod(library, 0o700)
        with open(library, "r+b") as file:
            file.write(hashlib.sha256(file.read()).digest())
            file.flush()
            os.fsync(file.fileno())
        loaded = opened(library, functions)
        os.replace(library, path)
    return loaded


def sweep(folder: str) -> None:
    """Delete what processes that were killed while compiling have left."""
    for entry in os.scandir(folder):
        if entry.name.startswith(BUILD) and entry.stat(follow_symlinks=False).st_mtime < time.time() - 10 * LIMIT:
            shutil.rmtree(entry.path, ignore_errors=True)


def run(command: List[str], folder: Optional[str] = None) -> bytes:
    """The output of a compiler, which puts its temporary files into `folder`. After LIMIT seconds it is killed.

    Raises:
        CompileError: its exit status is not 0.
        OSError: it could not run, or was killed.
    """
    environment = {**os.environ, "TMPDIR": folder} if folder else None
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment, start_new_session=True)  # fmt: skip

    def kill():  # and all that it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(LIMIT, kill)
    timer.start()
    try:
        with process.stdout:
            output = process.stdout.read(OUTPUT)
        status = process.wait()
    except BaseException:  # Ctrl-C
        kill()
        raise
    finally:
        timer.cancel()
    if status:
        text = " ".join(output.decode(errors="replace").split())[-300:]
        if status < 0:
            raise OSError(f"{command[0]!r} was killed by signal {-status} (time limit: {LIMIT} s) {text}".rstrip())
        raise CompileError(f"{command[0]!r} failed with exit status {status}: {text}")
    return output
