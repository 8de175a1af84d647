"""python sandbox.py PARENT < JOB: becomes a Python program that can reach nothing but itself, or has limits alone.

Where `isolated`, it has a user, a network, processes and a root of its own: Python's files and the system's libraries,
read-only, and an empty /tmp in memory. It may start threads and no process. All of it ends with who started it.
Linux 5.12 and later. A script of its own, of the standard library, so that it starts quickly.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys

REFUSED = 98  # exit code: the system gives no namespaces; why is in stdout
_USER = 65534  # within
_ROOT = "/sys"  # where the program's root is put together: a folder that every system has, and none needs here
_PROGRAM = "program.py"
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
_NAMESPACES = 0x10000000 | 0x20000 | 0x40000000 | 0x20000000 | 0x8000000 | 0x4000000  # user, mount, net, pid, ipc, uts
_PRIVATE, _BIND, _RECURSIVE, _DETACH = 1 << 18, 1 << 12, 1 << 14, 2
_READ_ONLY, _NO_SUID, _AT_RECURSIVE, _MOUNT_SETATTR = 1, 2, 0x8000, 442
_PDEATHSIG, _NO_NEW_PRIVS, _SECCOMP = 1, 38, 22
# AUDIT_ARCH; numbers of clone, and of fork, vfork, unshare, shmget and memfd_create: processes, privileges, and memory
# that no limit counts
_CALLS = {"x86_64": (0xC000003E, 56, (57, 58, 272, 29, 319)), "aarch64": (0xC00000B7, 220, (97, 194, 279))}
_CLONE3, _CLONE_THREAD, _X32 = 435, 0x10000, 0x40000000
_ALLOW, _KILL, _DENY, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x50000, 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args) -> None:
    """A function of libc, which raises where it fails."""
    if getattr(_libc, name)(*(arg.encode() if isinstance(arg, str) else arg for arg in args)) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def end_with_parent(parent: int, signum: int = signal.SIGKILL) -> None:
    """Has the system end this process, by a signal, with the thread that started it, in the process `parent`."""
    _call("prctl", _PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


def isolate(prefixes: list[str]) -> None:
    """Leaves the system behind. What goes on from here, as a child of a child, sees only what is put here, and has no
    rights any more once its image is replaced.

    Args:
        prefixes: Python's folders.
    """
    user, group = os.geteuid(), os.getegid()
    _call("unshare", _NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{_USER} {user} 1"), ("gid_map", f"{_USER} {group} 1")):
        _write(f"/proc/self/{name}", text)
    _go_on_as_child()  # the first of its namespace, with which all others end
    _call("mount", None, "/", None, _PRIVATE | _RECURSIVE, None)
    _call("mount", "tmpfs", _ROOT, "tmpfs", 0, "mode=755,size=1m")
    os.mkdir(f"{_ROOT}/old")
    os.mkdir(f"{_ROOT}/tmp")
    _call("mount", "tmpfs", f"{_ROOT}/tmp", "tmpfs", 0, "mode=755,size=64m,nr_inodes=1k")
    for path in (*_SYSTEM, *prefixes):
        _put(path, _ROOT + path)
    for path, flags, on, off in ((_ROOT, _AT_RECURSIVE, _READ_ONLY | _NO_SUID, 0), (f"{_ROOT}/tmp", 0, 0, _READ_ONLY)):
        _call("syscall", _MOUNT_SETATTR, -1, path, flags, struct.pack("4Q", on, off, 0, 0), 32)
    _call("pivot_root", _ROOT, f"{_ROOT}/old")
    os.chdir("/tmp")
    _call("umount2", "/old", _DETACH)
    _go_on_as_child()


def _go_on_as_child() -> None:
    """This process waits for its child, and ends as it does; the child ends with it."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(code if code >= 0 else 128 - code)
    _call("prctl", _PDEATHSIG, signal.SIGKILL)


def _put(path: str, inside: str) -> None:
    """Makes a file or folder of the system, or the same link, visible in the new root."""
    if os.path.lexists(inside) or not os.path.exists(path):
        return
    os.makedirs(os.path.dirname(inside), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), inside)
        return
    os.mkdir(inside) if os.path.isdir(path) else _write(inside, "")
    _call("mount", path, inside, None, _BIND | _RECURSIVE, None)


def _write(path: str, text: str) -> None:
    with open(path, "wb") as file:
        file.write(text.encode("utf-8", "replace"))


def forbid_processes() -> None:
    """From now on this process may start threads and nothing else (seccomp)."""
    arch, clone, others = _CALLS[os.uname().machine]
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06  # of BPF

    def denied(number: int, error: int = _EPERM) -> list[tuple[int, int, int, int]]:
        return [(equal, 0, 1, number), (give, 0, 0, _DENY | error)]

    program = [
        (load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, _KILL),
        (load, 0, 0, 0), (at_least, 0, 1, _X32), (give, 0, 0, _KILL),
        *denied(_CLONE3, _ENOSYS),  # upon which libc takes clone, whose flags can be seen here
        *(step for number in others for step in denied(number)),
        (equal, 0, 3, clone), (load, 0, 0, 16), (has, 1, 0, _CLONE_THREAD), (give, 0, 0, _DENY | _EPERM),
        (give, 0, 0, _ALLOW),
    ]  # fmt: skip
    steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _SECCOMP, 2, struct.pack("HxxxxxxP", len(program), ctypes.addressof(steps)))


def limit(seconds: float, memory: int) -> None:
    """Bounds what this process, and what it becomes, may use; `memory` in bytes."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: 1 << 24,
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def main() -> None:
    """Of the job, a line: program, stdin (null: what follows the line, once the program runs), timeout (seconds),
    memory (bytes), isolated, prefixes, environment."""
    end_with_parent(int(sys.argv[1]))
    job = json.loads(sys.stdin.readline())
    try:
        if job["isolated"]:
            isolate(job["prefixes"])
    except OSError as error:
        print(error.strerror, flush=True)
        os._exit(REFUSED)
    _write(_PROGRAM, job["program"])
    if job["stdin"] is not None:
        given = os.memfd_create("stdin")
        os.write(given, job["stdin"].encode("utf-8", "replace"))
        os.lseek(given, 0, os.SEEK_SET)
        os.dup2(given, 0)
    limit(job["timeout"], job["memory"])
    if job["isolated"]:
        forbid_processes()
    os.execve(sys.executable, [sys.executable, "-I", "-B", _PROGRAM], job["environment"])


if __name__ == "__main__":
    main()
