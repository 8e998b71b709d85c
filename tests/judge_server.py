"""A server on the loopback that speaks as much of the OpenAI interface as a judge needs, and can misbehave."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], bytes]


def chat(text: str, usage: Any = None) -> Reply:
    """A whole chat completion that says a text."""
    usage = {"prompt_tokens": 10, "completion_tokens": 3} if usage is None else usage
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


class JudgeServer:
    """Answers each request by `answer(body, number)`; use as a context manager.

    Attributes:
        url: of the endpoint.
        requests: bodies as they came.
        headers: of each request.
        most: requests that were open at the same time.
        drip: seconds between the bytes of a reply.
    """

    def __init__(self, answer: Callable[[dict, int], Reply]) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.most = self._open = 0
        self.drip = 0.0
        self._answer, self._lock = answer, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server._open += 1
                    server.most = max(server.most, server._open)
                try:
                    self._send(*server._answer(body, number))
                except OSError:  # the client has gone
                    pass
                finally:
                    with server._lock:
                        server._open -= 1

            do_GET = do_POST

            def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                for byte in content if server.drip else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(server.drip)
                if not server.drip:
                    self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "JudgeServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
