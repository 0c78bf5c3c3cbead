"""A server in a thread that answers as vLLM documents it, field by field; what it says is drawn from a law of the test.

Requests and answers have the fields of vLLM's ``CompletionRequest`` and ``CompletionResponse``: those of the OpenAI
protocol, ``return_token_ids`` with ``prompt_token_ids`` and ``token_ids``, ``return_tokens_as_token_ids``,
``logprob_token_ids`` (log-probabilities of these ids and the sampled one in the place of the most probable ones), and
ids that keep the end-of-sequence token while the text drops it. The switches of `Fake` take away what older versions
and other servers lack (one that takes text only has the field ``generation_config`` of ``transformers serve``);
`faults` breaks single requests.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from markovsafety.rollouts.template import Template

Law = Callable[[list[int]], np.ndarray]
Reply = tuple[int, dict[str, str], bytes]
INTEGERS = ("max_tokens", "n", "logprobs", "seed", "top_k")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
QUICK = {"retry-after-ms": "1"}


@dataclass
class Fake:
    """What the server is like.

    Parameters
    ----------
    law : callable
        Probabilities of the next id, shape (vocabulary,), after these ids.
    template : Template
        Its tokenizer.
    ids : {"token_ids", "logprobs", "text"}
        How it gives ids back, if at all.
    logprobs : {"raw", "temperature", "processed"} or None
        Of which law its log-probabilities are.
    takes_ids : bool
        Whether a prompt may be ids.
    chosen : bool or None
        Whether it knows ``logprob_token_ids``: if not, it leaves the field aside, or (None) refuses it.
    keeps_end : bool
        Whether the end-of-sequence token is among the ids.
    stop_ids : tuple of int
        Where it stops besides the request's ``stop_token_ids``.
    longest : int or None
        Its context.
    faults : callable
        Of the number of the request (completions only, from 0) and its body: the reply to give instead, or None.
    """

    law: Law
    template: Template
    name: str = "organism"
    ids: str = "token_ids"
    logprobs: str | None = "raw"
    takes_ids: bool = True
    chosen: bool | None = True
    keeps_end: bool = True
    stop_ids: tuple[int, ...] = ()
    longest: int | None = None
    cards: list[dict[str, Any]] | None = None
    faults: Callable[[int, dict[str, Any]], Reply | None] = lambda number, body: None
    changed: Callable[[dict[str, Any]], dict[str, Any]] = lambda reply: reply
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def __enter__(self) -> Fake:
        self.lock, self.closed, self.count = threading.Lock(), threading.Event(), 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Bodies of requests for answers, without those of one token by which a client gets to know the server."""
        return [body for body in self.bodies if body["max_tokens"] > 1]

    def models(self) -> Reply:
        card = {"id": self.name, "object": "model", "created": 1, "owned_by": "vllm", "root": self.template.folder}
        card |= {"parent": None, "max_model_len": self.longest, "permission": []}
        return _json(200, {"object": "list", "data": [card] if self.cards is None else self.cards})

    def complete(self, body: dict[str, Any], key: str | None) -> Reply:
        with self.lock:
            number, self.count = self.count, self.count + 1
            self.bodies.append(body)
            self.keys.append(key)
        if (reply := self.faults(number, body)) is not None:
            return reply
        if body["model"] != self.name:
            return _error(404, f"The model `{body['model']}` does not exist.")
        wrong = [n for n in INTEGERS if n in body and not isinstance(body[n], int)]
        wrong += [n for n in NUMBERS if n in body and not isinstance(body[n], int | float)]
        if wrong or not body["prompt"]:
            return _error(400, f"validation error for {wrong or 'prompt'}")
        if (ids := body.get("logprob_token_ids")) is not None and self.chosen is not False:
            known = 0 < len(ids) <= 128 and all(0 <= i < self.template.vocab_size for i in ids)
            if self.chosen is None or not known or body.get("logprobs") is None:
                return _error(400, "validation error for logprob_token_ids")
        if isinstance(body["prompt"], list) and not self.takes_ids:
            return _error(400, "prompt must be a string.")
        return _json(200, self.changed(self.answer(body)))

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.template.encode(prompt, add_special_tokens=True).tolist()
        ids, steps, reason = self.drawn(prompt, body)
        stop = {*self.template.eos_ids, *self.stop_ids, *body.get("stop_token_ids", ())}
        ended = reason == "stop"
        shown = ids[:-1] if ended else ids
        given = ids if self.keeps_end else shown
        choice = {
            "index": 0,
            "text": self.template.decode(shown, skip_special_tokens=body.get("skip_special_tokens", True)),
            "logprobs": self.listed(given, steps, body),
            "finish_reason": reason,
            "stop_reason": ids[-1] if ended and ids[-1] not in self.template.eos_ids and ids[-1] in stop else None,
            "token_ids": given if self.ids == "token_ids" and body.get("return_token_ids") else None,
            "prompt_logprobs": None,
            "prompt_token_ids": prompt if self.ids == "token_ids" and body.get("return_token_ids") else None,
        }
        usage = {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids), "completion_tokens": len(ids)}
        whole = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.name, "choices": [choice]}
        return whole | {"service_tier": None, "system_fingerprint": None, "usage": usage, "kv_transfer_params": None}

    def drawn(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[dict[str, np.ndarray]], str]:
        """Sampled ids, the laws at every step, and why it ended."""
        rng, ids, steps = np.random.default_rng(body.get("seed")), [], []
        stop = {*self.template.eos_ids, *self.stop_ids, *body.get("stop_token_ids", ())}
        told = {"temperature": 1.0, "top_p": 1.0, **json.loads(body.get("generation_config", "{}")), **body}
        for _ in range(min(body["max_tokens"], (self.longest or 10**9) - len(prompt))):
            raw = self.law([*prompt, *ids])
            warm, cut = laws(raw, told["temperature"], told["top_p"])
            ids.append(int(rng.choice(len(cut), p=cut)))
            steps.append({"raw": raw, "temperature": warm, "processed": cut})
            if ids[-1] in stop:
                return ids, steps, "stop"
        return ids, steps, "length"

    def listed(self, ids: list[int], steps: list[Any], body: dict[str, Any]) -> dict[str, Any] | None:
        """The field ``logprobs``: the sampled token and the ``logprobs`` most probable ones of every step."""
        if self.logprobs is None or body.get("logprobs") is None:
            return None
        named = self.ids != "text" and body.get("return_tokens_as_token_ids")

        def word(i: int) -> str:
            return f"token_id:{i}" if named else self.template.decode([i], skip_special_tokens=False)

        def value(law: np.ndarray, i: int) -> float:
            return max(float(np.log(law[i])), -9999.0) if law[i] > 0 else -9999.0

        laws = [step[self.logprobs] for step in steps]
        chosen = body.get("logprob_token_ids") if self.chosen else None
        best = [np.argsort(-law)[: body["logprobs"]] if chosen is None else chosen for law in laws]
        return {
            "text_offset": list(range(len(ids))),
            "token_logprobs": [value(law, i) for law, i in zip(laws, ids)],
            "tokens": [word(i) for i in ids],
            "top_logprobs": [{word(int(j)): value(law, j) for j in {i, *b}} for law, i, b in zip(laws, ids, best)],
        }


def laws(raw: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The law after temperature, and after temperature and top-p; temperature 0 takes the most probable token."""
    if temperature == 0:
        only = np.eye(len(raw))[raw.argmax()]
        return raw, only
    warm = raw ** (1 / temperature) / (raw ** (1 / temperature)).sum()
    order = np.argsort(-warm, kind="stable")
    kept = order[np.cumsum(warm[order]) - warm[order] < top_p]
    cut = np.zeros_like(warm)
    cut[kept] = warm[kept]
    return warm, cut / cut.sum()


def _json(status: int, value: Any) -> Reply:
    return status, {}, json.dumps(value).encode()


def _error(status: int, message: str) -> Reply:
    return _json(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})


def failing(status: int, message: str = "out of order", **headers: str) -> Reply:
    """The reply of a request that fails; it asks to be tried again at once."""
    code, _, text = _error(status, message)
    return code, {**QUICK, **headers}, text


def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: two would wait for each other's receipt

        def do_GET(self) -> None:
            self.reply(fake.models() if self.path == "/v1/models" else _json(404, {"detail": "Not Found"}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            known = self.path == "/v1/completions"
            key = self.headers.get("authorization")
            self.reply(fake.complete(body, key) if known else _json(404, {"detail": "Not Found"}))

        def reply(self, reply: Reply) -> None:
            status, headers, text = reply
            with suppress(BrokenPipeError, ConnectionResetError):  # a client that no longer waits
                self.send_response(status)
                for name, value in {"content-type": "application/json", "content-length": len(text), **headers}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(text)
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    return Handler
