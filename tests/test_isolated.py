"""`make test` has no network but loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "isolated.py"
REACH_OUT = """
import os, socket
print(os.environ.get("RLHF_ISOLATED"), os.environ["NO_GCE_CHECK"], os.getuid())
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), timeout=5).close()
try:
    # A public address, and not a name: looking one up would already be reaching out.
    socket.create_connection(("8.8.8.8", 53), timeout=5)
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@pytest.mark.skipif("RLHF_ISOLATED" not in os.environ, reason="runs with a network")
def test_this_very_run_reaches_nothing_but_loopback() -> None:
    with pytest.raises(OSError, match="unreachable"):  # and not "timed out"
        socket.create_connection(("8.8.8.8", 53), timeout=5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_command_runs_without_network_or_says_that_it_could_not() -> None:
    command = [sys.executable, str(SCRIPT), "-c", REACH_OUT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    first, *last = run.stdout.splitlines()
    if first.startswith("None"):
        assert run.stderr.startswith("isolated.py: the network stays reachable: ")
        pytest.skip(run.stderr)
    assert first == f"1 true {os.getuid()}"
    assert last == [f"OSError {101}"]  # ENETUNREACH


def test_the_exit_code_is_the_commands() -> None:
    command = [sys.executable, str(SCRIPT), "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, capture_output=True, timeout=600).returncode == 7
