"""The leaderboard: what real_llm.py measured over the seven tasks of leaderboard.yaml, and small models of before.

    python benchmarks/quality/real_llm.py --data DATA --jobs benchmarks/quality/jobs/leaderboard.txt
    python benchmarks/quality/leaderboard.py --output docs/leaderboard.md

The first command measures what is not yet among its results; settings were chosen on dev, see docs/log.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).with_name("results")
TYPES = {
    "STS": ["STSB"],
    "Pair": ["MRPC", "Quora"],
    "Cls": ["Banking77", "Emotion"],
    "Clust": ["StackOverflow"],
    "Retr": ["CISI"],
}
"""Task types by the names of the paper's table, and their tasks."""

BASES = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma-3-270M"}
DEFAULT_BASE = "smollm2-135m-instruct"
SMALL = ("base-8m", "tinystories-instruct-3M-chat", "stories3M", "stories260K")
REFERENCE = "all-minilm-l6-v2"
BASELINES = {"mean": "mean pooling", "lasttoken": "last token", "echo": "Echo"}
SUPERVISED = {"nli-pairs", "triplets", "quora"}
GEM = {
    "frozen": "GEM frozen",
    "supervised": "GEM frozen, labelled pairs",
    "teacher": "GEM frozen, for an index of all-MiniLM-L6-v2",
    "full": "GEM full",
}


@dataclass(frozen=True)
class Arm:
    """What was measured of a base, over its seeds."""

    name: str
    runs: list[dict[str, float]]
    """Scores by task"""
    ratios: list[float]
    """Perplexity as a multiple of the base's; empty where there is no generator"""

    @property
    def columns(self) -> list[list[float]]:
        """Scores by task type and seed, and their means."""
        rows = [[mean(run[task] for task in tasks) for tasks in TYPES.values()] for run in self.runs]
        return [list(column) for column in zip(*([*row, mean(row)] for row in rows), strict=True)]

    @property
    def means(self) -> list[float]:
        return [mean(column) for column in self.columns]

    def cells(self) -> list[str]:
        spread = (max(self.columns[-1]) - min(self.columns[-1])) / 2
        total = f"{self.means[-1]:.2f}" + (f" ± {spread:.2f}" if len(self.runs) > 1 else "")
        ratio = f"x {mean(self.ratios):.3f}" if self.ratios else ""
        return [self.name, *(f"{score:.2f}" for score in self.means[:-1]), total, str(len(self.runs)), ratio]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kind_of(settings: dict[str, Any]) -> str:
    """The name of an arm by the settings of its run."""
    mode = settings.get("mode", "frozen")
    if mode == "frozen" and settings.get("teacher"):
        return "teacher"
    if mode == "frozen" and SUPERVISED & {*settings.get("train", "").split("+")}:
        return "supervised"
    return mode


def results_by_kind(lines: Iterable[dict[str, Any]], base: str, what: str) -> dict[str, list[dict[str, Any]]]:
    """Results of a base in which ``what`` was measured, by the kind of their run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        settings, result = line["settings"], line["result"]
        if what in result and settings.get("base", DEFAULT_BASE) == base:
            found.setdefault(kind_of(settings), []).append(result)
    return found


def real_arms(lines: Iterable[dict[str, Any]], base: str) -> list[Arm]:
    """Arms of a real LLM."""
    names, found = {**BASELINES, **GEM, "embedder": REFERENCE}, results_by_kind(lines, base, "suite")
    arms = []
    for kind, name in names.items():
        if results := found.get(kind):
            ratios = [] if kind == "embedder" else [result.get("perplexity_ratio", 1.0) for result in results]
            arms.append(Arm(name, [result["suite"] for result in results], ratios))
    return arms


def knowledge_rows(lines: Iterable[dict[str, Any]], base: str) -> list[list[str]]:
    """What the generator of a real LLM knows, before and after, in percent; empty if it was not asked."""
    found = results_by_kind(lines, base, "knowledge")
    names = {"mean": "the base, and GEM frozen", "full": GEM["full"]}
    return [
        [
            title,
            *(f"{mean(run['knowledge'][task] for run in runs):.2f}" for task in runs[0]["knowledge"]),
            str(len(runs)),
        ]
        for kind, title in names.items()
        if (runs := found.get(kind))
    ]


def index_rows(lines: Iterable[dict[str, Any]], base: str) -> list[list[str]]:
    """What an LLM finds in its teacher's index, and the teacher itself, in percent and in shares of it."""
    searches = {"titles_in_teachers_index": "titles", "cisi_in_teachers_index": "CISI"}
    rows = []
    for key, name in searches.items():
        pairs = [run[key] for run in results_by_kind(lines, base, "suite").get("teacher", []) if key in run]
        if pairs:
            own, teachers = (mean(column) for column in zip(*pairs, strict=True))
            rows.append([name, *(f"{100 * share:.1f}" for share in (own, teachers, own / teachers)), str(len(pairs))])
    return rows


def small_arms(base: str) -> list[Arm]:
    """Arms of a small model, as version 0.1 measured them."""
    lines = read_lines(RESULTS / f"leaderboard/{base}.jsonl")
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        name = BASELINES.get(line["mode"]) or f"GEM {line['mode']}, K = {line['k']}"
        found.setdefault(name, []).append(line)
    return [
        Arm(name, [run["scores"] for run in runs], [run["perplexity"] / lines[0]["perplexity"] for run in runs])
        for name, runs in found.items()
    ]


def table(arms: list[Arm]) -> str:
    return format_table(["", *TYPES, "mean", "seeds", "perplexity"], [arm.cells() for arm in arms])


def format_table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def summary_row(name: str, arms: list[Arm], frozen: str, full: str) -> str:
    """The best baseline, both modes, and the types of task where the frozen mode does not beat every baseline."""
    by_name = {arm.name: arm for arm in arms}
    baselines = [by_name[each] for each in BASELINES.values() if each in by_name]
    best = max(baselines, key=lambda arm: arm.means[-1])
    tops = [max(arm.means[place] for arm in baselines) for place in range(len(TYPES))]
    own = by_name[frozen].means
    lost = [
        f"{kind} ({score:.1f}, {top:.1f})" for kind, score, top in zip(TYPES, own, tops, strict=False) if score < top
    ]
    cells = [name, f"{best.means[-1]:.1f} ({best.name})", f"{own[-1]:.1f}"]
    cells += [f"{by_name[full].means[-1]:.1f}" if full in by_name else "", ", ".join(lost) or "none"]
    return f"| {' | '.join(cells)} |"


def made_with(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())


def render() -> str:
    lines = read_lines(RESULTS / "real_llm.jsonl")
    real = {BASES[base]: arms for base in BASES if (arms := real_arms(lines, base))}
    reference = real_arms(lines, REFERENCE)
    small = {base: small_arms(base) for base in SMALL}
    head = "| base | best baseline | GEM frozen | GEM full | frozen is below a baseline in |\n|---|---|---|---|---|"
    rows = [summary_row(name, arms, GEM["frozen"], GEM["full"]) for name, arms in real.items()]
    rows += [summary_row(name, arms, "GEM frozen, K = 1", "GEM full, K = 1") for name, arms in small.items()]
    known = [row for base in BASES for row in knowledge_rows(lines, base)]
    found = index_rows(lines, DEFAULT_BASE)
    environments = {made_with(line["versions"]) for line in lines if "suite" in line["result"]}
    old = made_with(json.loads((RESULTS / "leaderboard/versions.json").read_text(encoding="utf-8")))
    parts = [TITLE, "\n".join([head, *rows]), NOTES]
    parts += [f"## {name}\n\n{table([*arms, *reference])}" for name, arms in real.items()]
    if known:
        parts += [KNOWLEDGE + format_table(["", "MMLU", "ARC easy", "HellaSwag", "LAMBADA", "seeds"], known)]
    if found:
        parts += [INDEX + format_table(["", "the LLM", "the teacher", "share", "seeds"], found)]
    parts += [MADE + "\n".join(f"- {each}" for each in sorted(environments)), APPENDIX.format(made=old)]
    parts += [f"### {name}\n\n{table(arms)}" for name, arms in small.items()]
    return "\n\n".join(parts) + "\n"


TITLE = "# Leaderboard\n\nMeans over five task types of mteb's main scores, in percent. K = 1 throughout."
NOTES = """Baselines: mean pooling, the last token, and Echo (each text read twice) of the untouched base, by stock
modules of Sentence Transformers; what a table lacks was not run. The last line of a table is the small embedder that
people use today: it writes no text. Seven tasks on fixed samples (`benchmarks/quality/leaderboard.yaml`, 128 tokens of
a text): scores are not those of the whole data sets. Perplexity is of the same held-out lines of books, as a multiple
of the base's. Spread: half of what lies between the highest and the lowest seed. Settings were chosen on the dev split
of STS-B and on other titles than those reported; [log.md](log.md) has them. This page is made by
`benchmarks/quality/leaderboard.py` from `benchmarks/quality/results`."""
KNOWLEDGE = """## What the generator keeps

SmolLM2-135M-Instruct, accuracy in percent by lm-eval, in bfloat16: 570 questions of MMLU (ten a subject, five examples
each; chance is 25), and without examples 1,000 of ARC easy, 400 of HellaSwag, 500 lines of LAMBADA. A frozen base is
the base. One standard error is 1.6 to 2.5 points.

"""
INDEX = """## In the index of another embedder

Queries that SmolLM2-135M-Instruct embeds beside a frozen base, against vectors that all-MiniLM-L6-v2 made of the
documents; nDCG@10 in percent. It was trained on sentences of NLI and on the documents, their sentences and short spans
(`gem-st train --teacher MODEL --pieces`). It has seen no query, and no title but the 7 % that stand in their own text.
Its row in the table of this base is of its own vectors: it is made for one index, and worse at topics that it has not
seen.

"""
MADE = "Made with:\n\n"
APPENDIX = """## Appendix: small models

150 steps on 10,176 pairs of NLI, batches of 64, 64 tokens of a text, float32; {made}. Measured with version 0.1. With
K = 4 for comparison; the table above has K = 1. Perplexity is of text of the kind that the base was made for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file; printed without")
    args = parser.parse_args()
    if args.output:
        args.output.write_text(render(), encoding="utf-8")
    else:
        print(render())


if __name__ == "__main__":
    main()
