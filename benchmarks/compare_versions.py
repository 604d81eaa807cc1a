"""Whether two versions of gem_st compute the same to the bit: vectors, losses, gradients, texts and saved files.

    PYTHONHASHSEED=0 python benchmarks/compare_versions.py --tree ../old --bases examples/base-8m --output old.json
    PYTHONHASHSEED=0 python benchmarks/compare_versions.py --tree . --bases examples/base-8m --output new.json
    python benchmarks/compare_versions.py --compare old.json new.json

Float32, seed 0, both modes, one and three GEM tokens. Numbers are kept as hashes; of saved files all but code and card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXTS = [
    "It rained.",
    "She bought bread, apples and a little cheese at the market. " * 6,
    "A letter came.",
    "",
    "Once upon a time there was a village. It rained all day long",
]
INSTRUCTION = "Instruct: find the best passage for this query and more: "
LOSSES: list[dict[str, Any]] = [{}, {"plain_ratio": 0.5}, {"mini_batch_size": 2}]


def compute(base: str) -> dict[str, Any]:
    """Everything of one base, by name."""
    import torch
    from sentence_transformers import SentenceTransformer

    from gem_st import GemLoss, GemTransformer

    def short(value: Any) -> str:
        return hashlib.sha256(torch.as_tensor(value).detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]

    results: dict[str, Any] = {}
    for freeze_base in (False, True):
        for num_gem_tokens in (1, 3):
            torch.manual_seed(0)
            options = {"num_gem_tokens": num_gem_tokens, "freeze_base": freeze_base}
            gem = GemTransformer(base, **options, model_kwargs={"dtype": torch.float32})
            model = SentenceTransformer(modules=[gem], device="cpu")
            cache = gem.prefill(TEXTS[:3])
            found = {
                "parameters": [name for name, _ in model.named_parameters()],
                "encode": short(model.encode(TEXTS, convert_to_tensor=True)),
                "encode, instruction": short(model.encode(TEXTS, prompt=INSTRUCTION, convert_to_tensor=True)),
                "encode, truncated": short(model.encode([TEXTS[1] * 40], convert_to_tensor=True)),
                "summarize": short(gem.summarize(cache)),
                "extend": short(gem.summarize(gem.extend(cache, "and more"))),
                "generate": gem.generate(TEXTS[1:3], max_new_tokens=8, do_sample=False),
                "reconstruct": gem.reconstruct(gem.compress(TEXTS[:2])),
                "files": hash_saved(model),
            }
            for loss_options in LOSSES:
                torch.manual_seed(1)
                loss = GemLoss(model, alpha=0.5, **loss_options)
                model.train()
                model.zero_grad()
                value = loss([model.preprocess([text for text in TEXTS if text])])
                value.backward()
                gradients = [short(weight.grad) for weight in model.parameters() if weight.grad is not None]
                found[f"loss {loss_options}"] = [value.item(), *gradients]
            results |= {f"{Path(base).name}, {options}, {name}": value for name, value in found.items()}
    return results


def hash_saved(model: Any) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint but code and card, and of its settings but the hashes of the code."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_dir() or path.suffix == ".py" or path.name == "README.md":
                continue
            content = path.read_bytes()
            if path.name == "gem_config.json":
                settings = json.loads(content)
                settings = {name: value for name, value in settings.items() if not name.startswith("remote_code")}
                content = json.dumps(settings).encode()
            files[path.relative_to(folder).as_posix()] = hashlib.sha256(content).hexdigest()
    return files


def main() -> None:
    """Compute, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, help="a checkout of gem_st")
    parser.add_argument("--bases", nargs="+", default=["examples/base-8m"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path)
    args = parser.parse_args()
    if args.compare:
        old, new = (json.loads(path.read_text()) for path in args.compare)
        different = [name for name in old | new if old.get(name) != new.get(name)]
        print(f"{len(old)} results, {len(different)} differ", *different, sep="\n")
        sys.exit(bool(different))
    sys.path.insert(0, str(args.tree.resolve()))
    results: dict[str, Any] = {}
    for base in args.bases:
        results |= compute(base)
    args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
