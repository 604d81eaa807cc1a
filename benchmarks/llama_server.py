"""llama.cpp's server in this process, from the wheel xllamacpp: no compiler, no gem_st."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp as cpp

GREEDY = {"temperature": 0, "seed": 0}


class Server:
    """A server of one GGUF file.

    Args:
        file: The GGUF file.
        adapter: A LoRA beside it, or None.
        pooling: How states become a vector: ``"CLS"``, ``"LAST"`` or ``"MEAN"``.
        context: Tokens of a text or a conversation.
        num_slots: How many it works on at once.
        num_threads: Threads of the processor.
        keeps_all: Keep keys and values outside a sliding window, too (``--swa-full``).
    """

    def __init__(
        self,
        file: Path,
        adapter: Path | None = None,
        pooling: str = "LAST",
        *,
        context: int = 2048,
        num_slots: int = 1,
        num_threads: int = 2,
        keeps_all: bool = False,
    ) -> None:
        params = cpp.CommonParams()
        params.model.path = str(file)
        params.embedding, params.pooling_type = True, getattr(cpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling}")
        params.n_ctx, params.n_batch, params.n_ubatch = context * num_slots, context, context
        params.n_parallel, params.swa_full = num_slots, keeps_all
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        if adapter is not None:
            params.lora_adapters = [cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = cpp.Server(params)

    def send(self, path: str, **request: Any) -> Any:
        """The response to a request over HTTP, to be read; to one without fields, a GET."""
        body = json.dumps(request).encode() if request else None
        return urllib.request.urlopen(urllib.request.Request(f"{self.server.listening_address}{path}", body))

    def ask(self, path: str, **request: Any) -> Any:
        """What the server answers to a request."""
        with self.send(path, **request) as response:
            return json.load(response)

    def embed(self, inputs: Sequence[Any]) -> np.ndarray:
        """Unit vectors of texts, or of lists of texts and token ids. Shape: ``(B, D)``"""
        rows = self.ask("/v1/embeddings", input=list(inputs))["data"]
        return unit(np.array([row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]))

    def complete(self, prompt: str, **options: Any) -> str:
        """What follows a prompt, greedily."""
        return self.ask("/v1/completions", prompt=prompt, **GREEDY, **options)["choices"][0]["text"]

    def chat(self, question: str, **options: Any) -> str:
        """The answer to a question, greedily."""
        answer = self.ask("/v1/chat/completions", messages=ask_for(question), **GREEDY, **options)
        return answer["choices"][0]["message"]["content"]

    def stream(self, question: str, **options: Any) -> list[str]:
        """The pieces in which the server streams the answer to a question."""
        with self.send("/v1/chat/completions", messages=ask_for(question), stream=True, **GREEDY, **options) as lines:
            parts = [line.decode().removeprefix("data: ").strip() for line in lines]
        found = [json.loads(part)["choices"] for part in parts if part.startswith("{")]
        return [choices[0]["delta"].get("content") or "" for choices in found if choices]


def ask_for(question: str) -> list[dict[str, str]]:
    """The messages of a chat."""
    return [{"role": "user", "content": question}]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1. Shape: ``(B, D)``"""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
