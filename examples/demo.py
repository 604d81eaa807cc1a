"""A small language model becomes an embedder and stays a generator: trains GEM, compares before and after.

    python examples/demo.py                                          # examples/base-8m, offline
    python examples/demo.py --base HuggingFaceTB/SmolLM2-135M        # a base from the Hub

Writes the model, results.json and report.png to --output. The texts, graded pairs and passages in examples/data were
written for this project: the training sentences by the base model itself, the rest by its authors.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import matplotlib as mpl
import sentence_transformers
import torch
import transformers
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import set_seed

from gem_st import AlphaSchedule, GemLoss, GemTransformer
from gem_st.evaluation import perplexity

mpl.use("Agg")
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).resolve().parent
DATA = EXAMPLES / "data"
PROMPT = "The old man opened the door and"
FRESH_PROCESS = """
import sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
print(model.encode(["The cat sleeps on the sofa.", "A cat is resting."]).shape)
print(model[0].generate(sys.argv[2], max_new_tokens=60, do_sample=False, repetition_penalty=1.3))
"""


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_evaluators() -> dict[str, EmbeddingSimilarityEvaluator | InformationRetrievalEvaluator]:
    with open(DATA / "similarity.tsv", encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file, delimiter="\t"))
    passages, queries = read_jsonl(DATA / "passages.jsonl"), read_jsonl(DATA / "queries.jsonl")
    return {
        "similarity (Spearman)": EmbeddingSimilarityEvaluator(
            [pair["sentence1"] for pair in pairs],
            [pair["sentence2"] for pair in pairs],
            [float(pair["score"]) / 5 for pair in pairs],
            main_similarity="cosine",
        ),
        "retrieval (nDCG@10)": InformationRetrievalEvaluator(
            queries={query["id"]: query["text"] for query in queries},
            corpus={passage["id"]: passage["text"] for passage in passages},
            relevant_docs={query["id"]: set(query["relevant"]) for query in queries},
            main_score_function="cosine",
        ),
    }


def evaluate(model: SentenceTransformer, evaluators: dict) -> dict[str, float]:
    return {name: evaluator(model)[evaluator.primary_metric] for name, evaluator in evaluators.items()}


def train(model: SentenceTransformer, args: argparse.Namespace) -> list[dict]:
    """Train on the sentences that the base model wrote; returns the trainer's log."""
    loss = GemLoss(model, alpha=AlphaSchedule(num_ntp_steps=args.steps // 5))
    arguments = SentenceTransformerTrainingArguments(
        str(args.output / "trainer"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    texts = load_dataset("text", data_files=str(args.data), split="train", cache_dir=str(args.output / "cache"))
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=texts, loss=loss)
    trainer.train()
    return trainer.state.log_history


def draw_report(log: list[dict], before: SentenceTransformer, after: SentenceTransformer, path: Path) -> None:
    """Loss curves, alpha, and the similarity of three groups of sentences before and after."""
    sentences = [
        *("A dog runs across the field.", "The puppy chases a ball on the grass.", "Our dog likes to play outside."),
        *("Bake the bread for forty minutes.", "The loaf is ready when it sounds hollow.", "Knead the dough well."),
        *("The train to the city is late.", "We waited an hour at the station.", "The railway line is closed today."),
    ]
    steps = [entry for entry in log if "ntp" in entry]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for key in ("ntp", "contrastive"):
        axes[0].plot([entry["step"] for entry in steps], [entry[key] for entry in steps], label=key)
    axes[0].set(title="Training", xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    alpha_axis = axes[0].twinx()
    alpha_axis.plot([e["step"] for e in steps], [e["alpha"] for e in steps], color="gray", ls=":", label="alpha")
    alpha_axis.set(ylabel="alpha", ylim=(0, 1.02))
    axes[0].legend(handles=[*axes[0].lines, *alpha_axis.lines], loc="upper right")
    for axis, model, title in zip(axes[1:], (before, after), ("Base, mean pooling", "GEM"), strict=True):
        vectors = model.encode(sentences, convert_to_tensor=True, normalize_embeddings=True).float()
        image = axis.imshow((vectors @ vectors.T).cpu(), vmin=0, vmax=1, cmap="viridis")
        axis.set(title=f"{title}: cosines", xticks=[], yticks=range(9))
        axis.set_yticklabels(sentences if axis is axes[1] else [], fontsize=8)
    figure.colorbar(image, ax=axes[1:], shrink=0.9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(rows: dict[str, tuple[float, float]]) -> None:
    print(f"\n{'':<28}{'base, mean pooling':>20}{'GEM':>10}")
    for name, (before, after) in rows.items():
        print(f"{name:<28}{before:>20.3f}{after:>10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(EXAMPLES / "base-8m"))
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--data", type=Path, default=DATA / "train.txt", help="training texts, one a line")
    parser.add_argument("--num-gem-tokens", type=int, default=4)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    set_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    evaluators, held_out = build_evaluators(), [row["text"] for row in read_jsonl(DATA / "passages.jsonl")]
    backbone = Transformer(args.base, model_kwargs={"dtype": "float32"})
    base = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
    gem = GemTransformer(
        args.base, num_gem_tokens=args.num_gem_tokens, max_seq_length=128, model_kwargs={"dtype": "float32"}
    )
    model = SentenceTransformer(modules=[gem])

    before = evaluate(base, evaluators)
    before["perplexity of held-out text"] = perplexity(gem.model, gem.tokenizer, held_out)
    log = train(model, args)
    after = evaluate(model, evaluators)
    after["perplexity of held-out text"] = perplexity(gem.model, gem.tokenizer, held_out)
    if not all(math.isfinite(value) for value in after.values()):
        raise SystemExit(f"Training diverged: {after}. Lower --learning-rate.")

    model_folder = args.output / "model"
    model.save_pretrained(str(model_folder))
    draw_report(log, base, model, args.output / "report.png")
    print_table({name: (before[name], after[name]) for name in before})
    print(f"\nThe checkpoint in a fresh process, encoding, and continuing {PROMPT!r}:", flush=True)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(model_folder), PROMPT], check=True)
    results = {
        "before": before,
        "after": after,
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (sentence_transformers, torch, transformers)},
        },
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {gem.model.device}",
        "seconds": round(time.perf_counter() - start),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{results['seconds']} s. Written to {args.output}: model/, report.png, results.json")


if __name__ == "__main__":
    main()
