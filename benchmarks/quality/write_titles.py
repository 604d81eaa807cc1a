"""Let an instruction-tuned model write a title for each paragraph: pairs for retrieval, without labels.

    python benchmarks/quality/write_titles.py --data DATA --num 4000

writes runs/titled.jsonl, which real_llm.py trains on as ``titled``. DATA is described in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from real_data import TITLED, paragraphs
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from models import resolve  # isort: skip  # of examples, which real_data puts on the path

PROMPT = "Write a title of three to eight words for this text. Answer with the title only.\n\n{}"


def clean(answer: str) -> str:
    """The first line of an answer, without quotation marks; empty where it is no title."""
    line = answer.strip().partition("\n")[0].strip(' "*#.')
    line = line.removeprefix("Title:").strip(' "')
    return line if 2 <= len(line.split()) <= 14 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--num", type=int, default=4000, help="paragraphs")
    parser.add_argument("--output", type=Path, default=TITLED)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-words", type=int, default=100, help="read of each paragraph")
    parser.add_argument("--dtype", default="bfloat16", help="float32 is faster on a CPU without bf16 instructions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(resolve(args.base), dtype=args.dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(resolve(args.base), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [" ".join(text.split()[: args.max_words]) for text in paragraphs(args.data)]
    texts = random.Random(args.seed).sample(texts, min(args.num, len(texts)))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:
        for start in tqdm(range(0, len(texts), args.batch_size), unit="batch"):
            batch = texts[start : start + args.batch_size]
            chats = [[{"role": "user", "content": PROMPT.format(text)}] for text in batch]
            rows = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(device)
            output = model.generate(**rows, max_new_tokens=20, do_sample=False)
            answers = tokenizer.batch_decode(output[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
            for text, title in zip(batch, map(clean, answers), strict=True):
                if title:
                    file.write(json.dumps({"title": title, "text": text}) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
