"""An OpenAI-compatible server on loopback that answers by a rule: for the asking side, not vLLM's.

It speaks just enough of `docs/http-api.md` to be swapped, too: what it answers may depend on β.
"""

import json
import math
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "org/tiny-task"
REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Sure, here is how. First, "


class Answering:
    """Attributes: ``asked``, the prompts of chat requests; ``bodies``, of all POSTs by path.

    Args:
        rule: Called with the last user message and this server: the answer.
        key: The API key that it wants.
    """

    def __init__(self, rule=None, *, key=None):
        self.rule, self.key = rule or (lambda *_: REFUSAL), key
        self.asked, self.bodies = [], []
        self.vector, self.beta, self.epoch, self.history = "sv-a", 0.5, 3, []
        self.swaps, self.refused_vectors = [], set()
        self.failures = []  # of the next chat requests: HTTP numbers
        self.broken = set()  # prompts that never get an answer
        self.plain = False  # a server that is not ours
        self.remade = ""  # part of its vectors' digests
        self.plan = ""  # part of the served plan's digest
        self.root_plan = ""  # and of that of what is swapped in
        self.deaf = False  # to what β it is asked for
        self.state = "serving"
        self.dissents_after = None  # a vector: a rank stays behind when it is swapped away
        self.disagreeing = 0
        self.dies_in = None  # a vector: a swap to it fails half-way
        self.error = {"message": "not now", "type": "x", "code": "x"}  # of chat requests
        self.tokens = None  # called with a body that asks for logprobs: [(token, share)]
        self.lock = threading.Lock()

    def chat(self, body):
        messages = body["messages"]
        prompt = messages[-1]["content"]
        if not isinstance(prompt, str):
            prompt = "".join(part["text"] for part in prompt)
        with self.lock:
            self.asked.append(prompt)
            failure = self.failures.pop(0) if self.failures else None
        if failure is not None or prompt in self.broken:
            return failure or 500, {"error": self.error}
        choice = {"index": 0, "finish_reason": "stop"}
        if body.get("logprobs"):
            told = [
                {"token": token, "logprob": math.log(share), "bytes": None, "top_logprobs": []}
                for token, share in self.tokens(body)
            ]
            content = [told[0] | {"top_logprobs": told[: body["top_logprobs"]]}]
            choice |= {"logprobs": {"content": content}, "finish_reason": "length"}
            text = told[0]["token"]
        else:
            text = self.rule(prompt, self)
        choice["message"] = {"role": "assistant", "content": text}
        return 200, {
            "id": "1", "object": "chat.completion", "created": 1, "model": body["model"],
            "choices": [choice],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip

    def complete(self, body):
        return 200, {
            "id": "1", "object": "text_completion", "created": 1, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop",
                         "text": self.rule(body["prompt"], self)}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }  # fmt: skip

    def active(self):
        none = self.vector == "@none"
        return {
            "safety_vector": self.vector,
            "vector_digest": None if none else f"blake3:{self.vector}{self.remade}",
            "plan_digest": None if none else f"blake3:p{self.vector}{self.plan}",
            "beta": None if none else self.beta,
        }

    def status(self):
        active = self.active()
        rank = {k: v for k, v in active.items() if k != "safety_vector"}
        return {
            "state": self.state, "ready": self.state == "serving",
            "weight_version": f"{self.vector}:{self.beta}",
            "epoch": self.epoch, "task_model": {"id": MODEL, "fingerprint": "blake3:tt"},
            "active": active, "disagreeing": self.disagreeing,
            "rolls_back_to": self.history[-1][0] if self.history else None,
            "engines": [{"engine": 0, "ranks": [rank | {"rank": 0, "epoch": self.epoch}]}],
        }  # fmt: skip

    def swap(self, body):
        name = body["safety_vector"]
        if body.get("expected_epoch") not in (None, self.epoch):
            return 409, {"error": {"code": "wrong_epoch", "message": "m.", "fix": "f."}}
        if name in self.refused_vectors:
            return 404, {"error": {"code": "unknown_vector", "message": "m.", "fix": "f."}}
        before = (self.vector, self.beta, self.plan)
        wanted = (name, 0.5 if self.deaf else body.get("beta") or 0.5, self.root_plan)
        if body.get("dry_run"):
            self.vector, self.beta, self.plan = wanted
            answer = self._swapped("dry_run", before[0])
            self.vector, self.beta, self.plan = before
            return 200, answer
        self.swaps.append((name, body.get("beta")))
        if name == self.dies_in:
            self.state = "failed"
            return 500, {"error": {"code": "failed", "message": "m.", "fix": "f."}}
        self.state = "serving"
        self.disagreeing = int(self.vector == self.dissents_after != name)
        self.history.append(before)
        self.vector, self.beta, self.plan = wanted
        self.epoch += 1
        return 200, self._swapped("swapped", before[0])

    def rollback(self, body):
        if body.get("expected_epoch") not in (None, self.epoch) or not self.history:
            return 409, {"error": {"code": "nothing_to_roll_back", "message": "m.", "fix": "f."}}
        before = self.vector
        self.vector, self.beta, self.plan = self.history.pop()
        self.epoch += 1
        return 200, self._swapped("rolled_back", before)

    def _swapped(self, outcome, before):
        return {
            "outcome": outcome, "from": before, "to": self.vector, "epoch": self.epoch,
            "weight_version": f"{self.vector}:{self.beta}", "active": self.active(),
        }  # fmt: skip

    def answer(self, method, path, body, headers):
        if self.key and headers.get("Authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "no key", "type": "x", "code": "x"}}
        ours = "/enchtable/" in path
        if ours and self.plain:
            return 404, {"detail": "Not Found"}
        vectors = [
            {"name": name, "digest": f"blake3:{name}{self.remade}", "planned": True, "fault": None}
            for name in ("sv-a", "sv-b")
        ]
        match method, path:
            case "GET", "/v1/models":
                return 200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            case "GET", "/v1/enchtable/status":
                return 200, self.status()
            case "GET", "/v1/enchtable/vectors":
                return 200, {"vectors": vectors}
            case "POST", "/v1/enchtable/swap":
                return self.swap(body)
            case "POST", "/v1/enchtable/rollback":
                return self.rollback(body)
            case "POST", "/v1/chat/completions":
                return self.chat(body)
            case "POST", "/v1/completions":
                return self.complete(body)
        return 404, {"detail": "Not Found"}

    @contextmanager
    def serve(self, address=("127.0.0.1", 0), context=None):
        """Yields the URL; https with a context."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self):
                with suppress(ConnectionResetError):  # the asking side was killed
                    super().handle()

            def do_GET(self):
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                if self.command == "POST":
                    server.bodies.append((self.path, body))
                number, document = server.answer(self.command, self.path, body, self.headers)
                text = json.dumps(document).encode()
                with suppress(BrokenPipeError, ConnectionResetError):  # the asking side is gone
                    self.send(number, text)

            def send(self, number, text):
                self.send_response(number)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        http = ThreadingHTTPServer(address, Handler)
        if context is not None:
            http.socket = context.wrap_socket(http.socket, server_side=True)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            scheme = "http" if context is None else "https"
            yield f"{scheme}://{address[0]}:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()
            http.server_close()
