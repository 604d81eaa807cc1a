"""Loads a checkpoint as a machine without gem_st does and compares it with its reference; run by `gem_st.hub.verify`.

It is run by its path, not imported, so that importing gem_st can be made to fail in its process, as it would there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["gem_st"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


class CheckError(Exception):
    """What a check found wrong."""


TOLERANCES = {"float32": 1e-3, "float64": 1e-3}
"""Relative error allowed between machines; 0.05 for other data types. Never read from the checkpoint."""


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Largest distance of a row from what was expected, as a share of its length. Shape: ``(..., D)`` each"""
    distances = (result.float().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
    return float("inf") if distances.isnan().any() else float(distances.max())


def check_embeddings(folder: str, reference: dict[str, Any], stored: dict[str, Tensor], **kwargs: Any) -> str:
    """Encode the reference texts; returns a finding, or raises CheckError with one."""
    model = SentenceTransformer(folder, **kwargs)
    error = relative_error(model.encode(reference["texts"], convert_to_tensor=True), stored["embeddings"])
    allowed = TOLERANCES.get(reference["dtype"], 0.05)
    finding = f"{len(reference['texts'])} texts, relative error {error:.1e}, {allowed:g} allowed"
    if not error <= allowed:
        raise CheckError(finding)
    return finding


@torch.inference_mode()
def check_generator(folder: str, reference: dict[str, Any], stored: dict[str, Tensor], **kwargs: Any) -> str:
    """Compare next-token logits, and generate, with stock transformers where the base lies in the checkpoint."""
    if reference["holds_base"]:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=reference["dtype"], output_loading_info=True)
        (model, info), tokenizer, source = loaded, AutoTokenizer.from_pretrained(folder), "AutoModelForCausalLM"
        if missing := [name for key in ("missing_keys", "mismatched_keys") for name in info[key]]:
            raise CheckError(f"weights are missing or of another shape: {missing}")
    else:
        gem: Any = SentenceTransformer(folder, **kwargs)[0]
        model, tokenizer, source = gem.model, gem.tokenizer, "the base it names"
    ids = tokenizer(reference["prompt"], return_tensors="pt")["input_ids"].to(model.device)
    error = relative_error(model(ids).logits[0, -1], stored["logits"])
    allowed = TOLERANCES.get(reference["dtype"], 0.05)
    if not error <= allowed:
        raise CheckError(f"logits of {source}: relative error {error:.1e}, {allowed:g} allowed")
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    if gem_tokens := sorted({*new.tolist()} & {*reference["gem_token_ids"]}):
        raise CheckError(f"it generates GEM tokens: {gem_tokens}")
    return f"{source}: relative error of logits {error:.1e}; writes {tokenizer.decode(new)!r:.60}"


def main(folder: str, results_path: str, arguments: str) -> None:
    """Run both checks and write ``{name: [passed, finding]}``; arguments are those of SentenceTransformer, as JSON."""
    reference = json.loads(Path(folder, "gem_reference.json").read_text(encoding="utf-8"))
    stored = load_file(str(Path(folder, "gem_reference.safetensors")))
    kwargs = json.loads(arguments)
    kwargs["model_kwargs"] = {**kwargs.get("model_kwargs", {}), "dtype": reference["dtype"]}
    results: dict[str, tuple[bool, str]] = {}
    for name, check in (("embeddings", check_embeddings), ("generator", check_generator)):
        try:
            results[name] = True, check(folder, reference, stored, **kwargs)
        except CheckError as error:
            results[name] = False, str(error)
        except Exception as error:  # whatever a broken checkpoint raises is a finding
            results[name] = False, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    Path(results_path).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
