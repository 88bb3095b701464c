"""Run Python without a network: `python tests/support/isolated.py -m pytest …`.

Only loopback is left. A test that tries to reach out fails at once, instead of passing with a
network and hanging without one. Linux lets a process give up its network; where the kernel or a
container's rules refuse, and on other systems, the command runs anyway, after a line that says so.
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
    """Move this process into its own network namespace and bring loopback up there.

    Raises:
        OSError: If that is refused; the network is then unchanged.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"{sys.platform} has no network namespaces")
    user, group = os.getuid(), os.getgid()
    try:
        _unshare(CLONE_NEWNET)
    except PermissionError:
        # A user other than root needs a user namespace too, mapped to the same user.
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
    # Otherwise Google's libraries look for a metadata server at its fixed address.
    os.environ["NO_GCE_CHECK"] = "true"
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
