"""A small language model becomes an embedder and stays a generator: trains GEM in both modes, compares with the base.

    python examples/demo.py                                          # examples/base-8m, offline
    python examples/demo.py --base HuggingFaceTB/SmolLM2-135M        # a base from the Hub

The two modes are full fine-tuning, as in the paper, and a LoRA for the GEM tokens beside a frozen base, which leaves
the generator as it is to the bit. Writes both models, results.json and report.png to --output. The texts, graded pairs
and passages in examples/data were written for this project: the training sentences by the base model itself, the rest
by its authors.
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

import gem_st  # noqa: F401  # first, as it keeps packages that are not used here quiet

# isort: split
import matplotlib as mpl
import sentence_transformers
import torch
import transformers
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import set_seed

from gem_st import GemLoss, GemModelCardData, GemTransformer
from gem_st.cards.card_data import describe_hardware
from gem_st.evaluation import PerplexityEvaluator, perplexity

mpl.use("Agg")
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).resolve().parent
DATA = EXAMPLES / "data"
PROMPT = "The old man opened the door and"
PARAGRAPH = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.3}
SENTENCES = [
    *("A dog runs across the field.", "The puppy chases a ball on the grass.", "Our dog likes to play outside."),
    *("Bake the bread for forty minutes.", "The loaf is ready when it sounds hollow.", "Knead the dough well."),
    *("The train to the city is late.", "We waited an hour at the station.", "The railway line is closed today."),
]
BASE, PERPLEXITY = "base, mean pooling", "perplexity of held-out text"
FRESH_PROCESS = """
import json
import logging
import sys
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
print(model.encode(["The cat sleeps on the sofa.", "A cat is resting."]).shape)
print(model[0].generate(sys.argv[2], **json.loads(sys.argv[3])))
"""


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def build_evaluators() -> dict[str, BaseEvaluator]:
    """Measures of both sides; the last, of the generator, is for GEM models only."""
    with open(DATA / "similarity.tsv", encoding="utf-8", newline="") as file:
        pairs = list(csv.DictReader(file, delimiter="\t"))
    passages, queries = read_jsonl(DATA / "passages.jsonl"), read_jsonl(DATA / "queries.jsonl")
    return {
        "similarity (Spearman)": EmbeddingSimilarityEvaluator(
            [pair["sentence1"] for pair in pairs],
            [pair["sentence2"] for pair in pairs],
            [float(pair["score"]) / 5 for pair in pairs],
            main_similarity="cosine",
            name="demo-pairs",
        ),
        "retrieval (nDCG@10)": InformationRetrievalEvaluator(
            queries={query["id"]: query["text"] for query in queries},
            corpus={passage["id"]: passage["text"] for passage in passages},
            relevant_docs={query["id"]: set(query["relevant"]) for query in queries},
            main_score_function="cosine",
            name="demo-passages",
        ),
        PERPLEXITY: PerplexityEvaluator([passage["text"] for passage in passages], name="demo-passages"),
    }


def evaluate_base(
    base: str, plain: GemTransformer, evaluators: dict[str, BaseEvaluator]
) -> tuple[SentenceTransformer, dict]:
    """The base with mean pooling, and all metrics of it; perplexity is that of its language-model head."""
    backbone = Transformer(base, model_kwargs={"dtype": "float32"})
    model = SentenceTransformer(modules=[backbone, Pooling(backbone.get_embedding_dimension(), "mean")])
    metrics = {name: evaluator(model) for name, evaluator in evaluators.items() if name != PERPLEXITY}
    texts = evaluators[PERPLEXITY].texts
    metrics[PERPLEXITY] = {evaluators[PERPLEXITY].primary_metric: perplexity(plain.model, plain.tokenizer, texts)}
    return model, metrics


def main_scores(metrics: dict[str, dict], evaluators: dict[str, BaseEvaluator]) -> dict[str, float]:
    return {name: metrics[name][evaluator.primary_metric] for name, evaluator in evaluators.items()}


def build(args: argparse.Namespace, mode: str) -> SentenceTransformer:
    gem = GemTransformer(
        args.base,
        num_gem_tokens=args.num_gem_tokens,
        freeze_base=mode == "frozen",
        max_seq_length=128,
        model_kwargs={"dtype": "float32"},
    )
    card = GemModelCardData(
        model_name=f"gem-{Path(args.base).name}",
        language="en",
        train_datasets=[{"name": f"{args.data.name}, sentences that the base model wrote"}],
        base_label=BASE,
    )
    card.widget = [{"source_sentence": SENTENCES[0], "sentences": SENTENCES[1:5]}]
    return SentenceTransformer(modules=[gem], model_card_data=card)


def train(model: SentenceTransformer, args: argparse.Namespace, mode: str) -> list[dict]:
    """Train on the sentences that the base model wrote; returns the trainer's log."""
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
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=texts, loss=GemLoss(model))
    trainer.train()
    return trainer.state.log_history


def draw_report(logs: dict[str, list[dict]], models: dict[str, SentenceTransformer], path: Path) -> None:
    """Loss curves, and the similarity of three groups of sentences by each model."""
    figure, axes = plt.subplots(1, 1 + len(models), figsize=(19, 4.6), layout="constrained")
    for mode, log in logs.items():
        steps = [entry for entry in log if "contrastive" in entry]
        for key, style in (("contrastive", "-"), ("ntp", ":")):
            values = [entry[key] for entry in steps]
            if any(values):
                axes[0].plot([entry["step"] for entry in steps], values, style, label=f"{key}, {mode}")
    axes[0].set(title="Training", xlabel="step", ylabel="loss (nats)", ylim=(0, None))
    axes[0].legend(loc="upper right")
    for axis, (name, model) in zip(axes[1:], models.items(), strict=True):
        vectors = model.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True).float()
        image = axis.imshow((vectors @ vectors.T).cpu(), vmin=0, vmax=1, cmap="viridis")
        axis.set(title=f"{name}: cosines", xticks=[], yticks=range(9))
        axis.set_yticklabels(SENTENCES if axis is axes[1] else [], fontsize=8)
    figure.colorbar(image, ax=axes[1:], shrink=0.9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_table(columns: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':<28}" + "".join(f"{name:>20}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:<28}" + "".join(f"{values[row]:>20.3f}" for values in columns.values()))


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
    evaluators = build_evaluators()
    plain = GemTransformer(args.base, freeze_base=True, model_kwargs={"dtype": "float32"})
    base, base_metrics = evaluate_base(args.base, plain, evaluators)
    models, columns, logs = {BASE: base}, {BASE: main_scores(base_metrics, evaluators)}, {}
    for mode in ("full", "frozen"):
        model = build(args, mode)
        for name, evaluator in evaluators.items():
            model.model_card_data.set_base_metrics(evaluator, base_metrics[name])
        logs[mode] = train(model, args, mode)
        scores = main_scores({name: evaluator(model) for name, evaluator in evaluators.items()}, evaluators)
        if not all(math.isfinite(value) for value in scores.values()):
            raise SystemExit(f"Training diverged: {scores}. Lower the learning rate.")
        models[f"GEM, {mode}"], columns[f"GEM, {mode}"] = model, scores
        model.save_pretrained(str(args.output / mode))

    draw_report(logs, models, args.output / "report.png")
    print_table(columns)
    same = plain.generate(PROMPT, **PARAGRAPH) == models["GEM, frozen"][0].generate(PROMPT, **PARAGRAPH)
    print(f"\nThe frozen base writes {'the same' if same else 'ANOTHER'} paragraph as before training.")
    for mode in ("full", "frozen"):
        print(f"\nThe {mode} checkpoint in a fresh process, encoding, and continuing {PROMPT!r}:", flush=True)
        folder = args.output / mode
        subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(folder), PROMPT, json.dumps(PARAGRAPH)], check=True)
    results = {
        "scores": columns,
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (sentence_transformers, torch, transformers)},
        },
        "hardware": describe_hardware(),
        "seconds": round(time.perf_counter() - start),
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{results['seconds']} s. Written to {args.output}: full/, frozen/, report.png, results.json")


if __name__ == "__main__":
    main()
