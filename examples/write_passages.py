"""Let an instruction-tuned model write its own training pairs: subjects, and a passage on each.

    python examples/write_passages.py --base smollm2-135m-instruct --num 1536 --output examples/data/written.jsonl

made what the demo trains on: GEM needs no data set to start from. A subject is a short query, its passage the positive;
sentences of the passages teach similarity of sentences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import torch
from models import resolve
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

TOPICS = """
bread, cheese, coffee, tea, chocolate, soup, rice, pasta, honey, apples, potatoes, tomatoes, spices, fish, wine,
cooking oil, breakfast, barbecue, dogs, cats, horses, cows, sheep, chickens, bees, butterflies, whales, sharks, owls,
eagles, snakes, frogs, elephants, bears, wolves, ants, spiders, trees, roses, mushrooms, grass, forests, gardens,
rivers, lakes, mountains, deserts, islands, beaches, volcanoes, earthquakes, storms, snow, rain, wind, the moon, the
sun, planets, stars, comets, gravity, light, sound, heat, magnets, electricity, atoms, water, oxygen, carbon, iron,
gold, glass, paper, bicycles, cars, trains, ships, airplanes, bridges, tunnels, roads, airports, traffic, maps,
hotels, camping, travel insurance, passports, museums, houses, roofs, windows, kitchens, bathrooms, furniture,
carpets, paint, tools, locks, heating, plumbing, lighting, moving house, rent, neighbours, computers, phones,
printers, keyboards, the internet, passwords, email, software, databases, programming, robots, cameras, batteries,
solar panels, football, tennis, swimming, running, chess, yoga, cycling, skiing, climbing, boxing, dancing,
gymnastics, fishing, sailing, board games, video games, piano, guitar, violin, singing, drums, opera, jazz, painting,
sculpture, photography, theatre, film, novels, poetry, comics, newspapers, libraries, schools, teachers, exams,
homework, universities, languages, spelling, mathematics, statistics, history, geography, philosophy, psychology, law,
doctors, hospitals, medicine, vaccines, sleep, stress, headaches, teeth, eyes, skin, bones, the heart, the brain,
exercise, diet, vitamins, allergies, money, banks, taxes, savings, shopping, markets, advertising, insurance, jobs,
interviews, meetings, contracts, factories, farming, mining, trade, families, babies, teenagers, weddings, birthdays,
friendship, gifts, clothes, shoes, jewellery, soap, hair, kindness, habits, memory, dreams, kings, elections, cities,
villages, police, firefighters, courts, wars, peace, castles, pyramids, ancient Rome, the Vikings, trade routes,
calendars
"""
ASPECTS = (
    "the history of {}",
    "how {} is used in daily life",
    "common problems with {}",
    "interesting facts about {}",
    "how to choose or care for {}",
    "why {} matters to people",
    "advice for beginners on {}",
    "how {} works",
)
PROMPT = "Write a short paragraph of two or three sentences about {}. Do not write a title."


def subjects(num: int, seed: int) -> list[str]:
    """Topics, each under several aspects, in random order."""
    topics = [topic.strip() for topic in " ".join(TOPICS.split()).split(",")]
    found = [aspect.format(topic) for topic, aspect in itertools.product(topics, ASPECTS)]
    random.Random(seed).shuffle(found)
    return [found[index % len(found)] for index in range(num)]


def write(model, tokenizer, prompts: list[str], **options) -> list[str]:
    """What a model says to each prompt, up to the end of its last whole sentence; empty where there is none."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**rows, **options)
    texts = tokenizer.batch_decode(output[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)
    texts = [" ".join(text.split()) for text in texts]
    return [text[: max(text.rfind(mark) for mark in ".?!") + 1] for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct")
    parser.add_argument("--num", type=int, default=1536, help="subjects")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    base = resolve(args.base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    options = {"max_new_tokens": 72, "do_sample": True, "temperature": args.temperature, "top_p": 0.95}
    wanted = subjects(args.num, args.seed)
    with open(args.output, "w", encoding="utf-8") as file:
        for start in tqdm(range(0, args.num, args.batch_size), unit="batch"):
            batch = wanted[start : start + args.batch_size]
            passages = write(model, tokenizer, [PROMPT.format(subject) for subject in batch], **options)
            for subject, passage in zip(batch, passages, strict=True):
                if len(passage.split()) > 12 and passage.isascii():
                    file.write(json.dumps({"subject": subject, "passage": passage}) + "\n")
            file.flush()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
