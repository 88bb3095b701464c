"""What loopback servers with faults have in common."""

import socket
from http.server import BaseHTTPRequestHandler
from typing import Any


class LoopbackHandler(BaseHTTPRequestHandler):
    """A handler of requests that answers at once, logs nothing, and may hang up."""

    protocol_version = "HTTP/1.1"
    # Head and body in separate packets would wait 40 ms for each other.
    disable_nagle_algorithm = True
    wbufsize = 2**16

    def hang_up(self) -> None:
        self.close_connection = True
        # shutdown, or buffers and other references keep the connection open.
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the client is gone

    def log_message(self, *args: Any) -> None:
        pass
