"""An OpenAI-compatible server on this machine for tests: says what it is told to, and fails so.

    with AnswerServer(say) as server:
        server.fault = lambda number, body: "500" if number % 5 == 0 else None
        server.url, server.asked

say: (prompt ids or messages, seed or None, temperature, most tokens) -> token ids
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: what each fault answers with: status and words
REFUSALS = {
    "400": (400, "this model's maximum context length is 8 tokens"), "401": (401, "no such key"),
    "404": (404, "no such model"), "429": (429, "slow down"), "500": (500, "out of luck"),
    "503": (503, "loading"),
}  # fmt: skip
#: faults of one try, after which another may succeed
PASSING = ("429", "500", "503", "hang up", "half", "half a JSON", "twice", "two choices",
           "no choices", "aborted", "no tokens")  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self._reply(200, {"data": [{"id": name} for name in self.server.owner.models]})

    def do_POST(self):
        owner = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with owner.lock:
            number = owner.n
            owner.n += 1
            owner.headers, owner.paths[self.path] = dict(self.headers), body
        fault = owner.fault(number, body)
        owner.faults[fault] += 1
        if fault in REFUSALS:
            status, words = REFUSALS[fault]
            self._reply(status, {"error": {"message": words}}, {"Retry-After": "0"})
        elif fault == "hang up":
            self.close_connection = True
        else:
            self._answer(owner, body, fault)

    def _answer(self, owner, body, fault):
        if fault == "late":
            time.sleep(owner.late_s)
        prompt = body.get("prompt", body.get("messages"))
        tokens = owner.say(prompt, body.get("seed"), body["temperature"], body["max_tokens"])
        choice = {"index": 0, "finish_reason": "length"}
        if tokens and tokens[-1] in owner.eos:
            choice["finish_reason"] = "stop"
        if fault == "aborted":
            choice["finish_reason"] = "abort"
        if owner.gives == "ids":
            choice |= {"token_ids": [] if fault == "no tokens" else tokens, "text": ""}
        else:
            said = tokens[:-1] if choice["finish_reason"] == "stop" else tokens
            text = owner.decode([] if fault == "no tokens" else said)
            choice |= {"message": {"content": text}} if "messages" in body else {"text": text}
        read = owner.read(body)
        made = {"choices": [choice], "usage": {"prompt_tokens": read}}
        copies = {"no choices": 0, "two choices": 2}
        made["choices"] *= copies.get(fault, 1)
        self._reply(200, made, fault=fault)

    def _reply(self, status, body, headers=None, fault=None):
        data = json.dumps(body).encode()
        data = {"half a JSON": data[: len(data) // 2], "twice": data * 2}.get(fault, data)
        try:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        except OSError:  # who asked is gone
            pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        pass


class AnswerServer:
    def __init__(self, say, eos=(), decode=None, gives="ids", read=None):
        """decode: tokens -> text, for `gives` "text"; read: body -> how many tokens its prompt is
        said to have"""
        self.say, self.eos, self.decode, self.gives = say, set(eos), decode, gives
        self.read = read or (lambda body: None)
        self.fault = lambda number, body: None
        self.late_s, self.models = 1.0, ["target"]
        self.lock, self.n = threading.Lock(), 0
        self.faults, self.paths, self.headers = Counter(), {}, {}

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
