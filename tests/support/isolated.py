"""Runs Python without a network: `python tests/support/isolated.py -m pytest …`.

Only loopback is left. A test that would reach out fails at once, instead of passing where there is
a network and hanging where there is none. Linux lets a process give its network up; where the
kernel or a container's rules refuse, and on other systems, the command runs as it is, after a line
that says so.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def isolate() -> None:
    """Moves this process into a network namespace of its own and brings its loopback up.

    Raises:
        OSError: If that is refused; the network is then as it was.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"{sys.platform} has no network namespaces")
    user, group = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        # Whoever is not root needs a user namespace too, in which he is still himself.
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def _unshare(flags: int) -> None:
    # os.unshare came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    try:
        isolate()
    except OSError as error:
        print(f"isolated.py: the network stays reachable: {error}", file=sys.stderr)
    else:
        os.environ["RLHF_ISOLATED"] = "1"
    # Google's libraries would look for a metadata server at its fixed address.
    os.environ["NO_GCE_CHECK"] = "true"
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
