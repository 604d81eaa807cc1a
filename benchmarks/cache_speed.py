"""What the frozen base and the shared cache cost and save, as ratios measured side by side in one run.

    python benchmarks/cache_speed.py --base examples/base-8m --rounds 5
    python benchmarks/cache_speed.py --random-width 1024 --num-gem-tokens 1 --lengths 64

Prints, for each comparison, the median over rounds of the ratio of two times taken one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from sentence_transformers import SentenceTransformer

from gem_st import GemTransformer
from gem_st.modeling import gem_embedder

BOOK = Path(__file__).resolve().parents[1] / "examples" / "data" / "train.txt"


def make_texts(tokenizer: transformers.PreTrainedTokenizerBase, num: int, num_tokens: int, shift: int = 0) -> list[str]:
    """Texts that have exactly so many tokens, BOS not counted."""
    ids = tokenizer(BOOK.read_text(encoding="utf-8").replace("\n", " "), add_special_tokens=False)["input_ids"]
    texts: list[str] = []
    start = shift
    while len(texts) < num:
        text = tokenizer.decode(ids[start : start + num_tokens])
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == num_tokens:
            texts.append(text)
        start += num_tokens
        if start + num_tokens > len(ids):
            start = shift = shift + 1
    return texts


def make_random_base(base: str, width: int) -> str:
    """A folder with a random Llama of 8 layers that has another base's tokenizer."""
    folder = tempfile.mkdtemp()
    config = transformers.AutoConfig.from_pretrained(base)
    config.update({"hidden_size": width, "intermediate_size": width * 11 // 4, "num_attention_heads": width // 64})
    config.num_key_value_heads = config.num_attention_heads // 2
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def time_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(rounds: int, first: Callable[[], object], second: Callable[[], object]) -> float:
    """Median of time(first) / time(second), after one round to warm up."""
    ratios = [time_of(first) / time_of(second) for _ in range(rounds + 1)]
    return round(statistics.median(ratios[1:]), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(Path(__file__).resolve().parents[1] / "examples" / "base-8m"))
    parser.add_argument("--random-width", type=int, help="a random Llama of this width and 8 layers instead")
    parser.add_argument("--num-gem-tokens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--num", type=int, default=128, help="texts of each length")
    parser.add_argument("--batch-size", type=int, default=32, help="of both sides of a comparison")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    if args.random_width:
        args.base = make_random_base(args.base, args.random_width)
    results: dict[str, float] = {}
    for k in args.num_gem_tokens:
        for mode in ("frozen", "full"):
            torch.manual_seed(0)
            gem = GemTransformer(
                args.base, num_gem_tokens=k, freeze_base=mode == "frozen", model_kwargs={"dtype": "float32"}
            )
            measured = measure(SentenceTransformer(modules=[gem], device="cpu"), args)
            results |= {f"{mode}, K = {k}: {name}": value for name, value in measured.items()}
    print(json.dumps({"results": results, "threads": torch.get_num_threads(), "torch": torch.__version__}, indent=2))


def measure(model: SentenceTransformer, args: argparse.Namespace) -> dict[str, float]:
    gem, results = model[0], {}
    for length in args.lengths:
        texts = make_texts(gem.tokenizer, args.num, length)
        starts = range(0, args.num, args.batch_size)
        batches = [torch.tensor(gem.tokenizer(texts[i : i + args.batch_size])["input_ids"]) for i in starts]
        results[f"encode / backbone, {length} tokens"] = ratio(
            args.rounds,
            partial(model.encode, texts, batch_size=args.batch_size),
            partial(run_backbone, gem.model.base_model, batches),
        )
    (document,) = make_texts(gem.tokenizer, 1, 1000)
    results["summarize / encode, 1,000 tokens"] = ratio(
        args.rounds * 4, partial(gem.summarize, gem.prefill(document)), partial(model.encode, document)
    )
    (prompt,) = make_texts(gem.tokenizer, 1, 64, shift=5000)
    texts = [prompt + text for text in make_texts(gem.tokenizer, args.num, 16)]
    encode = partial(model.encode, texts, batch_size=args.batch_size)
    results["throughput with prompt reuse / without, 64 + 16 tokens"] = time_prompt(args.rounds, encode)
    return results


@torch.inference_mode()
def run_backbone(backbone: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    for ids in batches:
        backbone(input_ids=ids, use_cache=False)


def time_prompt(rounds: int, encode: Callable[[], object]) -> float:
    """Time of `encode` where nothing counts as a shared prefix, over its time as it is."""

    def without() -> None:
        length, gem_embedder.SHARED_PREFIX_LENGTH = gem_embedder.SHARED_PREFIX_LENGTH, 10**9
        encode()
        gem_embedder.SHARED_PREFIX_LENGTH = length

    return ratio(rounds, without, encode)


if __name__ == "__main__":
    main()
