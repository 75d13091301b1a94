"""A server that a test plays: JSON answers, and nothing on the screen."""

import http.server
import json
from typing import Any


class Answering(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass

    def _reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
