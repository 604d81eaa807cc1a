"""A real LLM as an embedder: similarity, retrieval and what the generator lost, for any mode, data and loss.

    python benchmarks/quality/real_llm.py --data DATA --mode frozen --train nli+wiki --evaluate sts titles
    python benchmarks/quality/real_llm.py --data DATA --jobs benchmarks/quality/jobs/frozen.txt --workers 1
    python benchmarks/quality/real_llm.py --table

Bases are names of examples/models.py, folders or Hub ids; DATA is described in benchmarks/README.md. Settings are
chosen with --split dev; --split test is what is reported, and both adds dev to it. Each run is a line of --results,
with its settings, versions and hardware, and is not run again. A file of jobs holds one set of options a line.
--table prints what was run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from leaderboard import read_lines
from real_data import evaluators, local_suite, training_set
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.training_args import BatchSamplers, MultiDatasetBatchSamplers
from sentence_transformers.sentence_transformer.losses import EmbedDistillLoss
from stsb import read_held_out
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from gem_st import AlphaSchedule, GemLoss, GemTransformer
from gem_st.evaluation import perplexity
from gem_st.evaluation.baselines import BASELINES, build_baseline
from gem_st.evaluation.lm_eval_tasks import evaluate_generation
from gem_st.evaluation.mteb_scores import score_task
from gem_st.training.data import TrainData
from gem_st.training.measures import describe_versions
from gem_st.training.teacher import follow_teacher

from models import resolve  # isort: skip  # of examples, which real_data puts on the path

RESULTS = Path(__file__).with_name("results") / "real_llm.jsonl"
PROMPT = "The capital of France is"
NOT_SETTINGS = ("data", "jobs", "workers", "minutes", "results", "save", "seeds", "table")
SEARCHES = {"titles", "cisi"}


def build(args: argparse.Namespace, seed: int) -> SentenceTransformer:
    """The model that is to be trained, or a baseline."""
    base, dtype = resolve(args.base), {"dtype": args.dtype}
    if args.mode == "embedder":
        return SentenceTransformer(base)
    if args.mode in BASELINES:
        return build_baseline(args.mode, base, max_seq_length=args.eval_length, model_kwargs=dtype)
    set_seed(seed)
    model = build_gem(args, base, args.num_gem_tokens)
    if args.keep_rows:
        model[0].gem_embeddings.requires_grad_(False)
    return model


def build_gem(args: argparse.Namespace, base: str, num_gem_tokens: int) -> SentenceTransformer:
    is_frozen = args.mode == "frozen"
    lora = {"lora_alpha": args.lora_alpha or 8 * args.lora_rank, **args.lora} if is_frozen else None
    gem = GemTransformer(
        base,
        num_gem_tokens=num_gem_tokens,
        freeze_base=is_frozen,
        lora_rank=args.lora_rank if is_frozen else None,
        lora_kwargs=lora,
        gem_tokens=(args.gem_tokens or "trained") if args.mode == "frozen" else None,
        max_seq_length=args.max_length,
        model_kwargs={"dtype": args.dtype} if is_frozen else {},
    )
    return SentenceTransformer(modules=[gem])


def train(model: SentenceTransformer, args: argparse.Namespace, seed: int) -> None:
    data = training_set(args.train, args.data, args.num_rows, seed)
    parts = data.values() if isinstance(data, dict) else [data]
    has_texts = any("text" in part.column_names for part in parts)
    options = dict(args.loss)
    if isinstance(options.get("alpha"), list):
        options["alpha"] = AlphaSchedule(*options["alpha"])
    if args.teacher:
        found = TrainData(data, list(data.column_names), len(data), held_out=[])
        data = follow_teacher(resolve(args.teacher), model, found).train
        options["loss"] = EmbedDistillLoss(model)
    loss = GemLoss(model, **options)
    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                folder,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                lr_scheduler_type=args.scheduler,
                warmup_steps=args.steps // 20,
                bf16=args.mode == "full" and args.dtype == "bfloat16",
                use_cpu=not torch.cuda.is_available(),
                batch_sampler=BatchSamplers.BATCH_SAMPLER if has_texts else BatchSamplers.NO_DUPLICATES,
                multi_dataset_batch_sampler=MultiDatasetBatchSamplers(args.mix),
                logging_steps=50,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=seed,
            ),
            train_dataset=data,
            loss=loss,
        ).train()


@cache
def base_perplexity(base: str, data: Path, device: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(resolve(base), dtype="float32").to(device)
    return perplexity(model, AutoTokenizer.from_pretrained(resolve(base)), read_held_out(data))


def score(model: SentenceTransformer, found: dict[str, Any]) -> dict[str, float]:
    """What evaluators of Sentence Transformers give, by name."""
    return {name: round(each(model)[each.primary_metric], 4) for name, each in found.items()}


def main_split(args: argparse.Namespace) -> str:
    return "dev" if args.split == "dev" else "test"


def measure_vectors(model: SentenceTransformer, args: argparse.Namespace, split: str) -> dict[str, Any]:
    """Evaluators on one split, and the model's queries in the teacher's index beside the teacher's own."""
    found = evaluators(args.evaluate, args.data, split)
    result: dict[str, Any] = score(model, found)
    if args.teacher:
        teacher = SentenceTransformer(resolve(args.teacher))
        for name in sorted(SEARCHES & found.keys()):
            parts = getattr(found[name], "evaluators", [found[name]])
            ndcg = [
                mean(part.compute_metrices(query_model, corpus_model=teacher)["cosine"]["ndcg@k"][10] for part in parts)
                for query_model in (model, teacher)
            ]
            result[f"{name}_in_teachers_index"] = [round(value, 4) for value in ndcg]
    return result


def measure(model: SentenceTransformer, args: argparse.Namespace) -> dict[str, Any]:
    """Embeddings by Sentence Transformers and mteb, the generator by perplexity and lm-eval."""
    result = measure_vectors(model, args, main_split(args))
    if args.split == "both":
        result["dev"] = measure_vectors(model, args, "dev")
    if "suite" in args.evaluate:
        options = {"name": "arm", "revision": "none", "batch_size": 128}
        scores = {
            task.metadata.name: score_task(model, task, **options)["main_score"]
            for task in local_suite(args.data).tasks
        }
        result["suite"] = {name: round(100 * score, 2) for name, score in scores.items()}
    if args.mode == "embedder":
        return result
    if args.mode in BASELINES:
        generator = AutoModelForCausalLM.from_pretrained(resolve(args.base), dtype="float32").to(model.device)
        tokenizer = AutoTokenizer.from_pretrained(resolve(args.base))
    else:
        generator, tokenizer = model[0].model, model[0].tokenizer
        result["capital"] = model[0].generate(PROMPT, max_new_tokens=8, do_sample=False)
    if args.mode == "full":
        lost = perplexity(generator, tokenizer, read_held_out(args.data))
        result["perplexity_ratio"] = round(lost / base_perplexity(args.base, args.data, str(model.device)), 3)
    if "knowledge" in args.evaluate:
        known = local_suite(args.data).knowledge
        generator = generator.to(getattr(torch, args.dtype))  # as checkpoints have it
        result["knowledge"] = {
            task.name: round(100 * evaluate_generation(generator, tokenizer, task, batch_size=8)["main_score"], 2)
            for task in known
        }
    return result


def take_first(model: SentenceTransformer, args: argparse.Namespace, num_gem_tokens: int) -> SentenceTransformer:
    """A frozen model with the first GEM tokens of another."""
    new = build_gem(args, resolve(args.base), num_gem_tokens)
    state = {
        name: value[:num_gem_tokens] if name == "gem_embeddings" else value
        for name, value in model[0].state_dict().items()
    }
    new[0].load_state_dict(state)
    return new


def run(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Build, train, measure."""
    model = build(args, seed)
    start = time.perf_counter()
    if args.mode in ("frozen", "full"):
        train(model, args, seed)
    result: dict[str, Any] = {"train_seconds": round(time.perf_counter() - start)}
    model.max_seq_length = args.eval_length
    result.update(measure(model, args))
    for num_gem_tokens in args.test_num_gem_tokens:
        fewer = take_first(model, args, num_gem_tokens)
        fewer.max_seq_length = args.eval_length
        result[f"first {num_gem_tokens} GEM tokens"] = measure_vectors(fewer, args, main_split(args))
    if args.save:
        model.save_pretrained(f"{args.save}-{seed}")
    return result


def work(args: argparse.Namespace, seed: int, deadline: float) -> dict[str, Any] | None:
    """A run in a process of its own; None if it is too late to start."""
    if time.time() > deadline:
        return None
    try:
        return {"result": run(args, seed), "versions": describe_versions("mteb")}
    except Exception:
        traceback.print_exc()
        return None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--mode", choices=["frozen", "full", "embedder", *BASELINES], default="frozen")
    parser.add_argument("--train", default="nli+wiki", help="data sets of real_data.py, joined by +")
    parser.add_argument("--num-rows", type=int, default=10_000, help="of each")
    parser.add_argument("--mix", default="proportional", help="of data sets: proportional or round_robin")
    parser.add_argument("--num-gem-tokens", type=int, default=1)
    parser.add_argument("--test-num-gem-tokens", type=int, nargs="*", default=[], help="measured with so many as well")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--lora-alpha", type=int, help="8 times the rank")
    parser.add_argument("--lora", type=json.loads, default={}, help="JSON, for LoraConfig")
    parser.add_argument("--gem-tokens", help="reserved: rows of existing tokens; trained by default")
    parser.add_argument("--keep-rows", action="store_true", help="do not train the GEM tokens' embeddings")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--scheduler", default="cosine")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--eval-length", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--loss", type=json.loads, default={}, help="JSON, for GemLoss; a list for AlphaSchedule")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--split", choices=["dev", "test", "both"], default="dev")
    parser.add_argument("--evaluate", nargs="+", default=["sts", "titles"], help="of real_data.py, suite, knowledge")
    parser.add_argument("--save", help="folder for the checkpoint; the seed is added")
    parser.add_argument("--teacher", help="a model whose space is learned")
    parser.add_argument("--note", default="")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=Path, help="file of options, one set a line; # begins a comment")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=1e9, help="no run of --jobs starts later")
    parser.add_argument("--table", action="store_true")
    return parser


def read_jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The sets of options that are asked for."""
    if args.jobs is None:
        return [args]
    lines = [shlex.split(line, comments=True) for line in args.jobs.read_text(encoding="utf-8").splitlines()]
    common = ["--data", str(args.data), "--results", str(args.results)]
    return [make_parser().parse_args([*line, *common]) for line in lines if line]


def changed(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that are not the defaults."""
    parser = make_parser()
    return {name: value for name, value in settings.items() if value != parser.get_default(name)}


def main() -> None:
    args = make_parser().parse_args()
    done = read_lines(args.results) if args.results.exists() else []
    if args.table:
        for entry in done:
            print(json.dumps({**entry["settings"], **entry["result"]}))
        return
    deadline, jobs = time.time() + 60 * args.minutes, []
    for job in read_jobs(args):
        settings = changed({name: value for name, value in vars(job).items() if name not in NOT_SETTINGS})
        for seed in job.seeds:
            if not any(entry["settings"] == {**settings, "seed": seed} for entry in done):
                jobs.append((job, seed, {**settings, "seed": seed}))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        running = {pool.submit(work, job, seed, deadline): settings for job, seed, settings in jobs}
        for future in as_completed(running):
            if (found := future.result()) is not None:
                entry = {"settings": running[future], **found}
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                print(json.dumps({**entry["settings"], **entry["result"]}), flush=True)


if __name__ == "__main__":
    main()
