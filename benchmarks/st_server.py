"""What a user would write to serve a SentenceTransformer: one model, OpenAI's route, one request after another.

python benchmarks/st_server.py MODEL PORT DTYPE
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from sentence_transformers import SentenceTransformer


def main(name: str, port: int, dtype: str) -> None:
    model = SentenceTransformer(name, device="cpu", trust_remote_code=True, model_kwargs={"dtype": dtype})
    app, lock = FastAPI(), threading.Lock()

    @app.post("/v1/embeddings")
    def embed(body: dict[str, Any]) -> dict[str, Any]:
        with lock:
            vectors = model.encode(body["input"] if isinstance(body["input"], list) else [body["input"]])
        data = [{"object": "embedding", "index": i, "embedding": row.tolist()} for i, row in enumerate(vectors)]
        return {"object": "list", "data": data, "model": "st", "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
