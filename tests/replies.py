"""A local HTTP server that says what a test tells it to: for the client's side of HTTP, not vLLM's.

It knows no state and no rule; each route has a list of answers, the last of which stays.
"""

import json
import ssl
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: In place of an answer: the connection is closed without one.
CUT = object()

SERVED = {
    "safety_vector": "sv-a", "vector_digest": "blake3:aa", "plan_digest": "blake3:pa", "beta": 0.5
}  # fmt: skip
OTHER = {
    "safety_vector": "sv-b", "vector_digest": "blake3:bb", "plan_digest": "blake3:pb", "beta": 0.5
}  # fmt: skip


def status(active=None, *, epoch=3, **changes):
    """The document of a healthy server with one rank."""
    active = active or SERVED
    rank = {k: v for k, v in active.items() if k != "safety_vector"} | {"rank": 0, "epoch": epoch}
    return {
        "state": "serving",
        "ready": True,
        "reason": None,
        "weight_version": f"{active['safety_vector']}:1234",
        "epoch": epoch,
        "task_model": {"id": "tiny", "fingerprint": "blake3:tt"},
        "active": active,
        "disagreeing": 0,
        "engines": [{"engine": 0, "ranks": [rank]}],
        "said_by_a_newer_server": True,
    } | changes


def swapped(active, *, epoch=4, outcome="swapped"):
    return {
        "outcome": outcome,
        "from": "sv-a",
        "to": active["safety_vector"],
        "epoch": epoch,
        "weight_version": f"{active['safety_vector']}:1234",
        "active": active,
    }


def fault(code, message="what, where: expected this, got that.", fix="Do it."):
    return {"error": {"code": code, "message": message, "fix": fix}}


def listed(**changes):
    vector = {"name": "sv-b", "digest": "blake3:bb", "planned": True, "fault": None}
    return {"vectors": [vector | changes]}


class Replies:
    """Attributes: ``requests``, each (method, path, headers, body), as they came."""

    def __init__(self):
        self.requests = []
        self._answers = {}

    def on(self, method, path, *answers):
        """Each a document (200), (status, document), (status, document, headers), or `CUT`."""
        self._answers[method, path] = list(answers)

    def bodies(self, path):
        return [body for _, asked, _, body in self.requests if asked == path]

    def next(self, method, path):
        answers = self._answers.get((method, path), [(404, {"detail": "Not Found"})])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    @contextmanager
    def serve(self, context=None):
        """Yields the URL; with an SSL context, of a server with a certificate."""
        replies = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                replies.requests.append((self.command, self.path, dict(self.headers), body))
                answer = replies.next(self.command, self.path)
                if answer is CUT:
                    self.close_connection = True
                    return
                number, document, headers = (
                    (*answer, {})[:3] if isinstance(answer, tuple) else (200, answer, {})
                )
                text = document if isinstance(document, str) else json.dumps(document)
                self.send_response(number)
                for name, value in {**headers, "Content-Length": len(text.encode())}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            scheme = "http" if context is None else "https"
            yield f"{scheme}://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def certified(folder, name):
    """A certificate of its own authority, for a name: (its file, a server's context)."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", f"subjectAltName={name}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return certificate, context


def able(**said):
    """A server that serves ``sv-a`` and could serve ``sv-b``."""
    replies = Replies()
    replies.on("GET", "/v1/enchtable/status", status(**said))
    replies.on("GET", "/v1/enchtable/vectors", listed())
    replies.on("POST", "/v1/enchtable/swap", swapped(OTHER, outcome="dry_run"))
    return replies
