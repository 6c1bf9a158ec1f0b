"""Compiling, caching and loading C code: whatever the cache and the compiler do, it is the library or a reason."""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chatglm2 import c_library
from conftest import ROOT, until

SOURCE = "void answer(int *x) { *x = 42; }"
PROGRAM = f"""
import ctypes, sys
sys.path.insert(0, {str(ROOT)!r})
import c_library
c_library.LIMIT = float(sys.argv[1])
library, reason = c_library.load("answer", lambda kind: {SOURCE!r}, {{"answer": [ctypes.c_void_p]}})
x = ctypes.c_int()
if library:
    library.answer(ctypes.byref(x))
print(x.value or reason)
"""
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not c_library.instructions() or not shutil.which("gcc"), reason="needs Linux and gcc"
)


@pytest.fixture
def folder(tmp_path):
    """The cache folder of `start(tmp_path)`."""
    return tmp_path / "chatglm2"


def start(cache, limit=60, before=(), **environment):
    environment = {**os.environ, "CC": "gcc", "XDG_CACHE_HOME": str(cache), **environment}
    command = [*before, sys.executable, "-c", PROGRAM, str(limit)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(*arguments, **environment):
    """What a new process gets: "42", or the reason why it has no library."""
    process = start(*arguments, **environment)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    return output.strip()


# The cache


def without_symbol(path, digest):
    """A good library of other code."""
    subprocess.run(["gcc", "-shared", "-xc", "-o", path, "/dev/null"], check=True)
    return path.read_bytes() + (hashlib.sha256(path.read_bytes()).digest() if digest else b"")


DAMAGES = {
    "empty": lambda content, path: b"",
    "one page": lambda content, path: content[:4096],  # its header asks for more: SIGBUS
    "the end is missing": lambda content, path: content[:-1],
    "zeroed": lambda content, path: bytes(len(content)),
    "one bit": lambda content, path: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "without the symbol": lambda content, path: without_symbol(path, digest=False),
    "without the symbol, whole": lambda content, path: without_symbol(path, digest=True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_library_is_built_again(damage, tmp_path, folder):
    assert answer(tmp_path) == "42"
    (library,) = folder.iterdir()
    whole = library.read_bytes()
    library.write_bytes(DAMAGES[damage](whole, tmp_path / "other.so"))
    assert answer(tmp_path) == "42"
    assert [library] == list(folder.iterdir()) and library.read_bytes() == whole
    made = library.stat().st_mtime_ns
    assert answer(tmp_path, CC="gcc") == "42" and library.stat().st_mtime_ns == made


def test_library_writable_by_others_is_built_again(tmp_path, folder):
    answer(tmp_path)
    (library,) = folder.iterdir()
    library.chmod(0o722)
    assert answer(tmp_path) == "42"
    assert library.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "kind", ["itself", "parent", "parent of a link", "link", "another's", "sticky parent", "private link"]
)
def test_cache_that_others_can_replace_is_not_used(kind, tmp_path, monkeypatch):
    """Every folder and every link on the way counts; in a sticky folder others cannot rename what is ours."""
    real, cache = tmp_path / "a" / "b" / "chatglm2", tmp_path / "a" / "b"
    real.mkdir(parents=True)
    if kind.endswith("link"):
        cache = tmp_path / "links" / "cache"
        cache.parent.mkdir()
        cache.symlink_to("../a/b")
    changed = {"itself": real, "link": tmp_path / "links", "private link": None}.get(kind, tmp_path / "a")
    if kind == "another's":
        if os.getuid():
            pytest.skip("only root can give a folder to another user")
        os.chown(changed, 12345, -1)
    elif changed:
        changed.chmod(0o1777 if kind == "sticky parent" else 0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    found = c_library.cache_folder()
    assert (found == str(cache / "chatglm2")) == (kind in ("sticky parent", "private link"))
    if found != str(cache / "chatglm2"):
        os.rmdir(found)


@pytest.mark.parametrize("home", ["~", "relative", ""])
def test_without_a_home_the_cache_is_temporary(home, tmp_path, monkeypatch):
    """os.path.expanduser returns "~" if there is none; a relative path would depend on the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/cache")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    found = c_library.cache_folder()
    assert os.path.isabs(found) and os.stat(found).st_mode & 0o777 == 0o700 and not list(tmp_path.iterdir())
    os.rmdir(found)


def test_relative_XDG_CACHE_HOME_is_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert c_library.cache_folder() == str(tmp_path / "home" / ".cache" / "chatglm2")


def test_cache_on_a_noexec_file_system(tmp_path):
    mount = f"mount -t tmpfs -o noexec none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("only root can mount one")
    process = start(tmp_path, before=["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"])
    assert "mounted noexec, set XDG_CACHE_HOME to a folder on another one" in process.communicate()[0]


# The compiler

VERSION = '[ "$1" = --version ] && exit 0'
COMPILERS = {  # script -> the reason
    "exit 0": "wrote no library: set CC to a C compiler",
    r"printf '\377\n\377'; exit 3": "failed with exit status 3: \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}",
    "sleep 1000; exit 0": r"was killed by signal 9 \(time limit: 1.0 s\)",
    "yes; exit 3": "failed with exit status 3: .* y y",
    f"{VERSION}; kill -9 $$": r"was killed by signal 9 \(time limit: 1.0 s\)",
    f"{VERSION}; sleep 1000": r"was killed by signal 9 \(time limit: 1.0 s\)",
    f"{VERSION}; for last; do :; done; yes | head -9000 > $last": "invalid ELF header",
}


def running(group):
    """The processes of a group that have not ended."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, number = file.read_text().rpartition(")")[2].split()[:3]
            found += [file.parent.name] if number == group and state != "Z" else []
    return found


@pytest.mark.parametrize("script", COMPILERS)
def test_broken_compiler_is_a_reason(script, tmp_path, folder):
    """One line, after at most the time limit. Nothing is left in the cache, and nothing goes on running."""
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\n{script}\n")
    path.chmod(0o700)
    reason = answer(tmp_path, 1.0, CC=str(path))
    assert re.search(COMPILERS[script], reason) and "\n" not in reason
    assert not folder.exists() or not list(folder.iterdir())
    assert not running((tmp_path / "pid").read_text().strip())
    assert answer(tmp_path) == "42"


@pytest.mark.skipif(len(c_library.instructions()) < 2, reason="there are no slower instructions than this CPU's")
def test_older_compiler_compiles_for_slower_instructions(tmp_path):
    """One that does not know the option of the fastest, such as GCC 9 and -mavx512bf16."""
    path, option = tmp_path / "cc", c_library.instructions()[0][1][-1]
    path.write_text(f'#!/bin/sh\ncase " $* " in *" {option} "*) echo unknown {option}; exit 1;; esac; exec gcc "$@"\n')
    path.chmod(0o700)
    assert answer(tmp_path, CC=str(path)) == "42"


@pytest.mark.parametrize("command", ['gcc "', "''", "/nowhere/gcc", "/tmp", b"gcc\xff"])
def test_CC_that_is_no_compiler(command, tmp_path):
    assert "CC" in answer(tmp_path, CC=command)


def test_what_a_killed_process_left_is_deleted(tmp_path, folder):
    """kill -9 while it compiles; a folder that another process may be using stays."""
    path = tmp_path / "cc"
    path.write_text(f'#!/bin/sh\n{VERSION}\necho > "$TMPDIR/cc.s"\necho $$ > {tmp_path}/pid\nexec sleep 1000\n')
    path.chmod(0o700)
    process = start(tmp_path, CC=str(path))
    until((tmp_path / "pid").exists, "no compiler was started")
    process.kill()
    process.communicate()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (left,) = folder.iterdir()
    assert sorted(os.listdir(left)) == ["cc.s", "kernel.c"]
    assert answer(tmp_path, CC="gcc -O1") == "42" and left.exists()
    os.utime(left, (0, 0))
    assert answer(tmp_path, CC="gcc -O2") == "42" and not left.exists()
    assert {file.suffix for file in folder.iterdir()} == {".so"}
