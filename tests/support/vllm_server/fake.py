"""A small HTTP server that speaks vLLM's formats and answers with a tiny real model; and fails when it is told to.

Formats as vLLM 0.32 gives them (its own answers were compared): /v1/models, /tokenize, /v1/completions,
/inference/v1/generate, /v1/load_lora_adapter, /v1/unload_lora_adapter, /health; and those of VLLM_SERVER_DEV_MODE=1:
/weight_info, /collective_rpc (reload_weights), /reset_prefix_cache, /update_weight_version, /sleep, /wake_up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gzip
import json
import socket
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel


class Answer(Exception):  # noqa: N818 - not a fault: how a handler leaves
    """An HTTP status other than 200, in vLLM's form."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "Error", "param": None, "code": status}}


class FakeServer:
    """Start with `with`; `url` is the address.

    Attributes:
        faults: path -> what to do with its next requests, in order: an HTTP status, "close" (no answer), "cut" (half
            an answer), "garbage" (not JSON), "slow" (wait `slow` seconds first), "drip" and "drip_head" (a byte now
            and then, without end), "endless" (chunks without end), "bomb" (200 MB of zeros, packed), "packed" (gzip,
            as a proxy may), "html" (a proxy's page), None (nothing), or a function that changes the answer: bytes
            are sent as they are, text as text, all else as JSON.
        seen: requests so far, (path, body). authorization: that header of the last one.
        adapters: name -> model, what is loaded now.
        stuck: "base" or "first": what is served, under whatever name was asked for, the first adapter or none.
        times: the temperature is multiplied by this. raw: False gives the log-probabilities after the sampling's
            temperature and suppressions, as --logprobs-mode processed_logprobs does.
    """

    def __init__(self, model: Any, tokenizer: Any = None, port: int = 0, **options: Any) -> None:
        self.base, self.tokenizer = model, tokenizer
        self.options = {
            "root": "tiny/base",
            "max_model_len": 256,
            "max_logprobs": 20,
            "max_lora_rank": 8,
            "lora": True,
            "generate": True,
            "dev": True,
        } | options
        self.faults: dict[str, list[Any]] = {}
        self.slow = 0.5
        self.status: int | None = None  # of the answers, instead of their own
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.authorization: str | None = None
        self.stuck: str | None = None
        self.first: Any = None
        self.times, self.raw = 1.0, True
        self.connections: list[socket.socket] = []
        self.adapters: dict[str, Any] = {}
        self.weight_version, self.asleep = "default", False
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that give up
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeServer:
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for connection in self.connections:  # kept alive by clients; a server that stops leaves none open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def counts(self) -> Counter[str]:
        return Counter(path for path, _ in self.seen)

    # ------------------------------------------------------------------------------------------------- answers

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        routes = {
            "/v1/models": self._models,
            "/tokenize": self._tokenize,
            "/v1/completions": self._completions,
            "/inference/v1/generate": self._generate,
            "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
            "/health": lambda _: {},
            "/weight_info": lambda _: {"weight_version": self.weight_version},
            "/collective_rpc": self._reload,
            "/reset_prefix_cache": lambda _: {"success": True},
            "/update_weight_version": self._stamp,
            "/sleep?level=1": lambda _: self._turn("asleep"),
            "/wake_up": lambda _: self._turn("awake"),
        }
        off = {
            "/v1/load_lora_adapter": "lora",
            "/v1/unload_lora_adapter": "lora",
            "/inference/v1/generate": "generate",
            **dict.fromkeys(
                ("/weight_info", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"), "dev"
            ),
            **dict.fromkeys(("/sleep?level=1", "/wake_up"), "dev"),
        }
        if path not in routes or not self.options.get(off.get(path, ""), True):
            error = Answer(404, "Not Found")
            error.body = {"detail": "Not Found"}
            raise error
        with self._lock, torch.no_grad():
            assert not self.asleep or path in ("/wake_up", "/health", "/v1/models"), f"asleep, and asked for {path}"
            return routes[path](body)

    def _models(self, _: dict[str, Any]) -> Any:
        base = {
            "id": "base",
            "root": self.options["root"],
            "parent": None,
            "max_model_len": self.options["max_model_len"],
        }
        adapters = [{"id": name, "root": "?", "parent": "base", "max_model_len": None} for name in self.adapters]
        return {"object": "list", "data": [base, *adapters]}

    def _tokenize(self, body: dict[str, Any]) -> Any:
        if self.tokenizer is None:
            raise Answer(400, "there is no tokenizer")
        ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return {"count": len(ids), "tokens": ids, "max_model_len": self.options["max_model_len"]}

    def _model(self, name: str) -> Any:
        if name != "base" and name not in self.adapters:
            raise Answer(404, f"The model `{name}` does not exist.")
        if self.stuck is not None:
            return self.base if self.stuck == "base" else self.first or self.base
        return self.base if name == "base" else self.adapters[name]

    def _completions(self, body: dict[str, Any]) -> Any:
        model, prompt = self._model(body["model"]), body["prompt"]
        if "prompt_logprobs" in body:
            return {"model": body["model"], "choices": [{"prompt_logprobs": self._scores(model, prompt, body)}]}
        assert body["ignore_eos"], "the stop ids are to be ours"
        if len(prompt) + body["max_tokens"] > self.options["max_model_len"]:
            raise Answer(400, f"max_tokens={body['max_tokens']} is too large")
        choices = [self._choice(model, body, index) for index in range(body["n"])]
        return {"model": body["model"], "choices": choices[::-1]}  # in whatever order they end

    def _choice(self, model: Any, body: dict[str, Any], index: int) -> dict[str, Any]:
        prompt, draw = body["prompt"], torch.Generator().manual_seed((body["seed"] + index) % 2**63)
        ids: list[int] = []
        said: list[float] = []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            logits = model(torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
            raw = logits.clone()
            for token, bias in body["logit_bias"].items():
                logits[int(token)] += bias
            if body["temperature"] == 0:
                ids.append(int(logits.argmax()))
            else:
                logits = logits / (body["temperature"] * self.times)
                ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=draw)))
            said.append(float((raw if self.raw else logits).log_softmax(-1)[ids[-1]]))
        ended = ids[-1] in body["stop_token_ids"]
        choice = {"index": index, "text": "", "finish_reason": "stop" if ended else "length", "token_ids": ids}
        choice["prompt_token_ids"] = prompt
        choice["logprobs"] = {"token_logprobs": said} if "logprobs" in body else None
        return choice

    def _generate(self, body: dict[str, Any]) -> Any:
        sampling = body["sampling_params"]
        scores = self._scores(self._model(body["model"]), body["token_ids"], sampling)
        return {"model": body["model"], "prompt_logprobs": scores, "choices": [{"index": 0, "token_ids": [0]}]}

    def _scores(self, model: Any, ids: list[int], body: dict[str, Any]) -> list[Any]:
        k = body["prompt_logprobs"]
        if k > self.options["max_logprobs"]:
            raise Answer(400, f"Requested prompt logprobs of {k}, greater than {self.options['max_logprobs']}")
        if len(ids) + body["max_tokens"] > self.options["max_model_len"]:
            raise Answer(400, "too long")
        rows = model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        scores: list[Any] = [None]
        for row, target in zip(rows, ids[1:], strict=False):
            top = row.topk(k)
            entry = {str(target): {"logprob": float(row[target]), "rank": int((row >= row[target]).sum())}}
            entry |= {str(i): {"logprob": v} for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
            scores.append(entry)
        return scores

    def _load(self, body: dict[str, Any]) -> Any:
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            raise Answer(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            with open(f"{path}/adapter_config.json", encoding="utf-8") as file:
                rank = json.load(file)["r"]
        except FileNotFoundError:
            raise Answer(404, f"Loading lora {name} failed: No adapter found for {path}") from None
        if rank > self.options["max_lora_rank"]:
            raise Answer(500, f"LoRA rank {rank} is greater than max_lora_rank {self.options['max_lora_rank']}.")
        self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()
        self.first = self.first or self.adapters[name]
        return f"Success: LoRA adapter '{name}' added successfully."

    def _reload(self, body: dict[str, Any]) -> Any:
        assert body["method"] == "reload_weights", body
        found = type(self.base).from_pretrained(body["kwargs"]["weights_path"], dtype=self.base.dtype)
        self.base.load_state_dict(found.state_dict())
        return {"results": [None]}

    def _stamp(self, body: dict[str, Any]) -> Any:
        self.weight_version = body["new_version"]
        return {"success": True, "new_version": self.weight_version}

    def _turn(self, how: str) -> Any:
        self.asleep = how == "asleep"
        return {"status": how}

    def _unload(self, body: dict[str, Any]) -> Any:
        if self.adapters.pop(body["lora_name"], None) is None:
            raise Answer(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(1, wbits=31)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keep-alive

        def setup(self) -> None:
            super().setup()
            server.connections.append(self.connection)

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            self._respond({})

        def do_POST(self) -> None:
            self._respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _respond(self, body: dict[str, Any]) -> None:
            server.seen.append((self.path, body))
            server.authorization = self.headers.get("Authorization")
            waiting = server.faults.get(self.path) or [None]
            fault = waiting.pop(0)
            if fault == "close":
                self.close_connection = True
                return
            if fault == "slow":
                time.sleep(server.slow)
            try:
                if isinstance(fault, int):
                    raise Answer(fault, f"fault {fault}")
                status, answer = server.status or 200, server.answer(self.path, body)
            except Answer as refusal:
                status, answer = refusal.status, refusal.body
            if callable(fault):
                answer = fault(answer)
            if fault in ("drip", "drip_head", "endless"):
                self._go_on_for_ever(fault)
            else:
                self._send(status, answer, fault)

        def _go_on_for_ever(self, fault: str) -> None:
            self.close_connection = True
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            head += b"Transfer-Encoding: chunked\r\n\r\n" if fault == "endless" else b"Content-Length: 9999\r\n\r\n"
            rest = {"drip": b" ", "endless": b"10000\r\n" + b" " * 0x10000 + b"\r\n", "drip_head": b"X"}[fault]
            with contextlib.suppress(OSError):  # until the client has had enough
                self.wfile.write(head[:-2] if fault == "drip_head" else head)
                while True:
                    self.wfile.write(rest)
                    if fault != "endless":
                        time.sleep(0.02)

        def _send(self, status: int, answer: Any, fault: Any) -> None:
            if isinstance(answer, bytes):
                data = answer
            else:
                data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            data = {"garbage": b"{", "html": b"<html>\x1b[2J"}.get(str(fault), data)
            text = isinstance(answer, str) or fault == "html"
            self.send_response(status)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            if fault in ("bomb", "packed"):
                data = _bomb() if fault == "bomb" else gzip.compress(data)
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
            self.close_connection = self.close_connection or fault == "cut"

    return Handler
