"""Time of two versions of gem_st, in turn in one run: ratios of new to old, above 1 the new one is slower.

OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/compare_speed.py --old ../old --new .
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BATCH_SIZE = 32


def seconds(function: Callable[[int], object], repeats: int) -> float:
    """Time of calls with 0, 1, 2, ..."""
    start = time.perf_counter()
    for index in range(repeats):
        function(index)
    return time.perf_counter() - start


def measure(tree: str, base: str) -> dict[str, float]:
    """Seconds of encoding, of reading once and continuing, and of training steps, in both modes."""
    sys.path.insert(0, tree)
    import torch
    from sentence_transformers import SentenceTransformer

    from gem_st import GemLoss, GemTransformer

    torch.set_num_threads(1)
    random.seed(0)
    texts = random.sample((EXAMPLES / "data" / "train.txt").read_text(encoding="utf-8").splitlines(), 256)
    found = {}
    for freeze_base in (False, True):
        torch.manual_seed(0)
        gem = GemTransformer(base, freeze_base=freeze_base, model_kwargs={"dtype": torch.float32})
        model = SentenceTransformer(modules=[gem], device="cpu")
        mode = "frozen" if freeze_base else "full"
        model.encode(texts[:BATCH_SIZE])
        found[f"encode, {mode}"] = seconds(lambda _, model=model: model.encode(texts, batch_size=BATCH_SIZE), 3)

        def read_once(index: int, gem: GemTransformer = gem) -> None:
            cache = gem.prefill(texts[index])
            gem.summarize(cache)
            gem.generate(cache=cache, max_new_tokens=2)

        found[f"prefill, summarize, generate, {mode}"] = seconds(read_once, 30)
        loss = GemLoss(model, alpha=0.5)
        model.train()
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 1e-4)

        def step(index: int, loss: GemLoss = loss, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            start = index * BATCH_SIZE
            loss([loss.model.preprocess(texts[start : start + BATCH_SIZE])]).backward()
            optimizer.step()

        torch.manual_seed(0)
        step(0)
        found[f"training step, {mode}"] = seconds(step, 6)
    return found


def main() -> None:
    """Run both versions in turn, in processes of their own, and print medians and ranges of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old")
    parser.add_argument("--new")
    parser.add_argument("--base", default=str(EXAMPLES / "base-8m"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help="a tree; prints seconds as JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(str(Path(args.measure).resolve()), args.base)))
        return
    rounds = []
    for number in range(args.rounds):
        times = {}
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            command = [sys.executable, __file__, "--base", args.base, "--measure", getattr(args, name)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            times[name] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(times)
    for name in rounds[0]["old"]:
        ratios = [times["new"][name] / times["old"][name] for times in rounds]
        print(f"{name:<40}{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
