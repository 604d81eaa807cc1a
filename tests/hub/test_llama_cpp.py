"""The adapter in llama.cpp itself, beside small random bases: vectors, and answers that stay what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gem_st.hub import export

from ..conftest import CORPUS, ROOT

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from ..gguf_files import write_gguf

SERVE = """
import json, sys
from pathlib import Path
from llama_server import Server

def serve(adapter):
    path = Path(job["adapter"]) if adapter else None
    return Server(Path(job["base"]), path, "CLS", context=256, num_threads=1, keeps_all=job["swa_full"])

def answers(server):
    return [server.complete(prompt, max_tokens=8) for prompt in job["texts"][1:4]]

job = json.load(open(sys.argv[1]))
plain = answers(serve(adapter=False))
server = serve(adapter=True)
before = answers(server)
vectors = server.embed([text + job["end"] for text in job["texts"]]).tolist()
json.dump({"vectors": vectors, "answers": [plain, before, answers(server)]}, open(sys.argv[2], "w"))
"""

SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}


GEMMA = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 128, "query_pre_attn_scalar": 16}
"""As llama.cpp takes a Gemma 3 of two layers to be."""


@pytest.mark.parametrize(
    ("architecture", "kind", "options"),
    [
        ("llama", "llama", {}),
        ("mistral", "llama", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("phi3", "phi3", {}),
        ("gemma3", "gemma3", GEMMA),
    ],
)
def test_vectors_are_ours_and_answers_the_bases(make_model, tmp_path, architecture, kind, options):
    kwargs = {"freeze_base": True, "num_reserved": 2, "gem_tokens": "reserved", **SIZES, **options}
    model = make_model(architecture=architecture, **kwargs)
    base = write_gguf(model[0], tmp_path / "base.gguf", kind)
    folder = export(model, tmp_path / "out", format="alora", gguf=base)
    (token,) = model[0].gem_tokens.names
    texts = [
        "",
        *CORPUS,
        "a",
        "\U0001f682\U0001f327\ufe0f",
        f"a text that spells {token} and goes on",
        " ".join(CORPUS),
    ]
    end = json.loads((folder / "reference_vectors.json").read_text())["end"]
    job = {"base": str(base), "adapter": str(folder / "gem-adapter.gguf"), "texts": texts, "end": end}
    job["swa_full"] = "--swa-full" in (folder / "README.md").read_text().split("```")[1]
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-c", SERVE, str(tmp_path / "job.json"), str(tmp_path / "result.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "result.json").read_text())
    plain, before, after = result["answers"]
    assert plain == before == after
    ours, theirs = model.encode(texts), np.array(result["vectors"])
    cosines = (ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosines.min() > 0.9995, cosines
