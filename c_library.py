"""Compile C code at first use, keep the library in the user's cache, and load it with ctypes: Linux on x86-64.

`load(name, source, functions)` is all that a kernel's file needs.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from typing import Callable, Dict, List, Optional, Sequence, Tuple

FLAGS = ("-O3", "-fPIC", "-fopenmp", "-mavx2", "-mf16c", "-mfma")
AVX512 = {"avx512f": "-mavx512f", "avx512bw": "-mavx512bw", "avx512vl": "-mavx512vl", "avx512_vnni": "-mavx512vnni"}


def load(name: str, source: Callable[[str], str], functions: Dict[str, Sequence]) -> Tuple[Optional[ctypes.CDLL], str]:
    """Return (the library, "") or (None, the reason and the remedy in one line); it never raises.

    Args:
        name: of the library's file in the cache.
        source: "avx512" or "avx2" -> the C code, for each of `instructions()` until one compiles and loads.
        functions: name -> ctypes of its arguments, for every function that is called. They return nothing.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return None, f"the C kernels need Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    reason = "this CPU has neither AVX512-VNNI nor AVX2"
    for kind, flags in instructions():  # an older compiler may support only the slower ones
        try:
            library = ctypes.CDLL(compiled(name, source(kind), flags))
            break
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(error)
    else:
        return None, reason
    for function, arguments in functions.items():
        getattr(library, function).argtypes = arguments
        getattr(library, function).restype = None
    return library, ""


def cache_folder() -> str:
    """A directory that only this user can write to, because the library loaded from it is executed."""
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "chatglm2")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.stat(folder)
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = tempfile.mkdtemp(prefix="chatglm2-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def instructions() -> List[Tuple[str, Tuple[str, ...]]]:
    """Return ("avx512" or "avx2", compiler options) for each instruction set of this CPU, fastest first."""
    try:
        with open("/proc/cpuinfo") as file:
            known = set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        known = set()
    found = []
    if known >= AVX512.keys():
        found.append(("avx512", (*FLAGS, *AVX512.values())))
    if known >= {"avx2", "avx_vnni", "f16c", "fma"}:
        found.append(("avx2", (*FLAGS, "-mavxvnni")))  # GCC 11 and later
    if known >= {"avx2", "f16c", "fma"}:
        found.append(("avx2", FLAGS))
    return found


def compiled(name: str, text: str, flags: Tuple[str, ...]) -> str:
    """Compile the library and return its path. Processes may overlap: each renames a complete file into place."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc") or "gcc"]
    if not shutil.which(compiler[0]):
        raise OSError(f"no C compiler {compiler[0]} found: install gcc, or set CC to a compiler")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256("\n".join((text, *compiler, version, *flags)).encode()).hexdigest()[:16]
    path = os.path.join(cache_folder(), f"{name}-{key}.so")
    if not os.path.exists(path):
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            code, object_file, library = (os.path.join(folder, "kernel." + suffix) for suffix in ("c", "o", "so"))
            with open(code, "w") as file:
                file.write(text)
            # Not linked against an OpenMP runtime: the symbols resolve to the one that torch has loaded.
            for command in ([*flags, "-c", code, "-o", object_file], ["-shared", object_file, "-o", library]):
                done = subprocess.run([*compiler, *command], capture_output=True, text=True)
                if done.returncode:
                    raise OSError(f"{compiler[0]} could not compile the kernel: {done.stderr.strip()[-300:]}")
            os.replace(library, path)
    return path
