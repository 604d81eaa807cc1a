"""One training step of GemLoss against the obvious way to write it, and against one forward pass: time, and memory.

    python benchmarks/train_step.py speed --base examples/base-8m --texts examples/data/train.txt
    python benchmarks/train_step.py floor --base random-narrow --batch-size 64 --length 48
    python benchmarks/train_step.py memory

The obvious way runs plain rows for next-token prediction, rows with GEM tokens for their embeddings and what is behind
them, and the second views, one after the other, each padded to its longest row, with all logits. The maths are the
same: both losses and all gradients are compared before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from encode_speed import find_base, write_random
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from gem_st import GemLoss, GemTransformer
from gem_st.losses import find_same_texts, info_nce, text_keys
from gem_st.losses.rows import split_rows
from gem_st.modeling import gem_groups
from gem_st.modeling.gem_mask import Rows, gem_segments
from gem_st.modeling.gem_passes import CausalPass
from gem_st.modeling.gem_tokens import pool_gem_tokens
from gem_st.training.measures import describe_versions

ROOT = Path(__file__).resolve().parents[1]
ALPHA = 0.5
SHAPES = ((8, 64), (8, 256), (32, 64))


def naive_loss(loss: GemLoss, texts: list[Tensor]) -> Tensor:
    """The loss in three forward passes with all logits. Shape: ``()``"""
    (gem,) = loss._gem
    rows, prefixes = loss.build_rows(texts)
    views = loss.build_views(prefixes)
    is_plain = [int(row[-1]) in gem.gem_token_ids for row, _ in rows]
    plain = [(prefix, prefix) for prefix, keep in zip(prefixes, is_plain, strict=True) if keep]
    behind = [
        (row, torch.full_like(labels, -100) if no_targets else labels)
        for (row, labels), no_targets in zip(rows, is_plain, strict=True)
    ]
    total, count, embeddings = torch.zeros(()), 0, []
    for kind, part in (("plain", plain), ("gem", behind), ("view", views)):
        if not part:
            continue
        features = loss.collate(part)
        ids, real, labels = features["input_ids"], features["attention_mask"], features["labels"]
        states = whole_rows(gem, ids, real, has_gem=kind != "plain")
        if kind != "plain":
            segments = gem_segments(ids, real, gem.gem_token_ids)
            embeddings.append(pool_gem_tokens(states, segments, gem.num_gem_tokens, gem.pooling))
        if kind != "view":
            logits = gem.model.get_output_embeddings()(states)[:, :-1].float()
            total = total + F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            count += int((labels[:, 1:] != -100).sum())
    same_text = find_same_texts(text_keys(prefixes), len(prefixes))
    contrastive = info_nce(embeddings[0], embeddings[1], gem.logit_scale.exp(), same_text)
    return (1 - ALPHA) * total / max(1, count) + ALPHA * contrastive


def whole_rows(gem: GemTransformer, ids: Tensor, real: Tensor, has_gem: bool) -> Tensor:
    """Hidden states of a padded batch in one pass. Shapes: ``(B, T)`` each -> ``(B, T, D)``"""
    if not has_gem:
        return gem.base.states(ids)
    return CausalPass(gem.base, gem.gem_tokens)(Rows.of(ids, real, gem.gem_token_ids))


def our_loss(loss: GemLoss, texts: list[Tensor]) -> Tensor:
    (gem,) = loss._gem
    rows = [torch.cat([text, torch.tensor(gem.gem_token_ids)]) for text in texts]
    return loss([gem.pad(rows, padding_side="right")])


def grouped_loss(loss: GemLoss, texts: list[Tensor]) -> Tensor:
    """Ours without packing: texts in groups of like length."""
    with patch.object(loss._gem[0].embedder, "packed", None):
        return our_loss(loss, texts)


def padded_loss(loss: GemLoss, texts: list[Tensor]) -> Tensor:
    """Ours without packing and groups, as in training of several processes before there was packing."""
    with patch.object(loss._gem[0].embedder, "packed", None), patch.dict(gem_groups.GROUP_COST, cpu=10**9):
        return our_loss(loss, texts)


WAYS = {"naive": naive_loss, "ours": our_loss}
PADDING = {"grouped": grouped_loss, "padded": padded_loss}


def load(
    base: str, num_gem_tokens: int, freeze_base: bool = False, plain_ratio: float = 0.8, **loss_options: object
) -> GemLoss:
    torch.manual_seed(0)
    gem = GemTransformer(
        base, num_gem_tokens=num_gem_tokens, freeze_base=freeze_base, model_kwargs={"dtype": torch.float32}
    )
    model = SentenceTransformer(modules=[gem], device="cpu")
    return GemLoss(model, alpha=ALPHA, plain_ratio=plain_ratio, **loss_options).train()


def check_same(loss: GemLoss, texts: list[Tensor]) -> float:
    """Largest difference of a gradient, relative to the largest gradient."""
    parameters = [p for p in loss.parameters() if p.requires_grad]
    values, gradients = [], []
    for way in WAYS.values():
        torch.manual_seed(1)
        value = way(loss, texts)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, parameters, allow_unused=True))
    assert abs(values[0] - values[1]) < 1e-4 * abs(values[0]), values
    pairs = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None]
    largest = max(float(a.abs().max()) for a, _ in pairs)
    return max(float((a - b).abs().max()) for a, b in pairs) / largest


def measure_speed(args: argparse.Namespace) -> dict:
    lines = [line for line in Path(args.texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    result = {}
    for num_gem_tokens in (1, 4):
        loss = load(args.base, num_gem_tokens)
        (gem,) = loss._gem
        gem.max_seq_length = args.length
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)
        texts = split_rows(*gem.preprocess(random.Random(0).sample(lines, args.batch_size)).values(), gem.gem_token_ids)
        error = check_same(loss, texts)
        ways = {**WAYS, **PADDING}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for round_ in range(args.rounds + 1):
            for name, way in ways.items():
                torch.manual_seed(round_)
                start = time.perf_counter()
                optimizer.zero_grad()
                way(loss, texts).backward()
                optimizer.step()
                if round_:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
        result[f"K={num_gem_tokens}"] = {
            **{f"{name} / ours": compare(seconds[name], seconds["ours"]) for name in ("naive", *PADDING)},
            "gradient_error": error,
            "tokens_in_texts": sorted(map(len, texts))[:: max(1, len(texts) // 8)],
        }
        print(f"K={num_gem_tokens}", result[f"K={num_gem_tokens}"], flush=True)
    return result


def measure_floor(args: argparse.Namespace, base: str) -> dict:
    """A step of both modes over one forward pass of the backbone on as many tokens, without padding and gradient."""
    lines = [line for line in Path(args.texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    result = {}
    for mode, freeze_base in (("frozen", True), ("full", False)):
        for num_gem_tokens in (1, 4):
            gem = GemTransformer(
                base,
                num_gem_tokens=num_gem_tokens,
                freeze_base=freeze_base,
                max_seq_length=args.length,
                model_kwargs={"dtype": args.dtype} if freeze_base else {},
            )
            model = SentenceTransformer(modules=[gem], device="cpu")
            loss = GemLoss(model, alpha=ALPHA).train()
            features = model.preprocess(random.Random(0).sample(lines, args.batch_size))
            num_tokens = int(features["attention_mask"].sum())
            optimizer = torch.optim.AdamW([weight for weight in loss.parameters() if weight.requires_grad], lr=1e-5)
            ids = torch.full((round(num_tokens / 20), 20), 100)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16" and not freeze_base)
            seconds: dict[str, list[float]] = {"step": [], "forward": []}
            for round_ in range(args.rounds + 1):
                torch.manual_seed(round_)
                times = [time.perf_counter()]
                with torch.no_grad(), autocast:
                    gem.model.base_model(input_ids=ids, use_cache=False)
                times.append(time.perf_counter())
                optimizer.zero_grad()
                with autocast:
                    value = loss([dict(features)])
                value.backward()
                optimizer.step()
                times.append(time.perf_counter())
                if round_:  # the first warms up
                    seconds["forward"].append(times[1] - times[0])
                    seconds["step"].append(times[2] - times[1])
            result[f"{mode}, K={num_gem_tokens}"] = {
                "tokens": num_tokens,
                "step seconds": round(statistics.median(seconds["step"]), 3),
                "step / forward": compare(seconds["step"], seconds["forward"]),
            }
            print(mode, num_gem_tokens, result[f"{mode}, K={num_gem_tokens}"], flush=True)
    return result


def compare(others: list[float], ours: list[float]) -> dict[str, float]:
    """Median, smallest and largest ratio of a round."""
    ratios = sorted(other / our for other, our in zip(others, ours, strict=True))
    return {"median": round(statistics.median(ratios), 2), "from": round(ratios[0], 2), "to": round(ratios[-1], 2)}


def measure_peak(args: argparse.Namespace) -> None:
    """In a process of its own: the most memory of one step above what the model took before it, in MiB."""
    options = {} if args.mini_batch_size is None else {"mini_batch_size": args.mini_batch_size}
    loss = load(args.base, 1, args.freeze_base, args.plain_ratio, **options)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 400, (args.length,), generator=generator) for _ in range(args.batch_size)]
    loss.token_dropout = 0.5
    Path("/proc/self/clear_refs").write_text("5")  # what loading took at most is not of interest
    before = read_status("VmRSS")
    WAYS[args.way](loss, texts).backward()
    print(json.dumps(round(read_status("VmHWM") - before)))


def read_status(name: str) -> float:
    """A number of this process that Linux knows, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def make_base(folder: Path, vocab_size: int, args: argparse.Namespace) -> None:
    """A random Llama with many rows in its vocabulary, most of which its tokenizer never uses."""
    write_random(
        str(folder),
        AutoTokenizer.from_pretrained(ROOT / "examples" / "base-8m"),
        vocab_size=vocab_size,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def measure_memory(args: argparse.Namespace) -> list[dict]:
    table = []
    with tempfile.TemporaryDirectory() as root:
        for vocab_size, shapes in {32_000: SHAPES, 128_256: SHAPES[:2], 8_192: ()}.items():
            base = Path(root) / str(vocab_size)
            make_base(base, vocab_size, args)
            for batch_size, length in shapes:
                row = {"B": batch_size, "T": length, "V": vocab_size}
                for way in WAYS:
                    row[way] = run_step(base, way, batch_size, length)
                row["naive / ours"] = round(row["naive"] / row["ours"], 2)
                table.append(row)
                print(row, flush=True)
        for freeze_base in (False, True):
            for batch_size, size in ((32, None), (256, None), (256, 32), (1024, 32)):
                options = ["--plain-ratio", "1.0"]  # rows of one length, so that mini-batches differ in nothing
                options += ["--freeze-base"] if freeze_base else []
                options += [] if size is None else ["--mini-batch-size", str(size)]
                mode = "frozen" if freeze_base else "full"
                row = {"mode": mode, "B": batch_size, "T": 64, "V": 8_192, "mini_batch_size": size}
                row["ours"] = run_step(Path(root) / "8192", "ours", batch_size, 64, *options)
                table.append(row)
                print(row, flush=True)
    return table


def run_step(base: Path, way: str, batch_size: int, length: int, *options: str) -> int:
    command = [sys.executable, __file__, "peak", "--base", str(base), "--way", way, "--length", str(length)]
    command += ["--batch-size", str(batch_size), *options]
    # Tensors are given back to the system when they are freed, so that it knows what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "floor", "memory", "peak"))
    parser.add_argument("--base", default=str(ROOT / "examples" / "base-8m"))
    parser.add_argument("--texts", default=str(ROOT / "examples" / "data" / "train.txt"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row at most; in `peak`, of each text")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", help="in `floor`; bfloat16 is autocast in full mode")
    parser.add_argument("--width", type=int, default=256, help="of the random model whose memory is measured")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, default="ours")
    parser.add_argument("--mini-batch-size", type=int)
    parser.add_argument("--freeze-base", action="store_true")
    parser.add_argument("--plain-ratio", type=float, default=0.8)
    args = parser.parse_args()
    if args.what == "peak":
        return measure_peak(args)
    if args.what == "floor":
        with tempfile.TemporaryDirectory() as scratch:
            result = measure_floor(args, find_base(args.base, scratch))
    else:
        result = measure_speed(args) if args.what == "speed" else measure_memory(args)
    settings = {"base": args.base, "dtype": args.dtype, "threads": torch.get_num_threads()}
    print(json.dumps({"settings": settings, "result": result, "versions": describe_versions()}))


if __name__ == "__main__":
    main()
