"""What an embedding gains, and what the generator loses for it: the paper's models and ours, in one picture.

    python benchmarks/quality/cost.py    # draws docs/images/cost.png of results/real_llm.jsonl, prints the points

Gains are points of the mean over task types, against mean pooling of the same base: the seven of MTEB in the paper
(arXiv 2506.04344, table 1), five here. Losses are points of accuracy: MMLU in the paper; here the mean of ARC easy,
HellaSwag and LAMBADA, as MMLU of a model of 135 million parameters is hardly above chance.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib
from leaderboard import BASELINES, BASES, GEM, RESULTS, read_lines, real_arms, results_by_kind

ROOT = Path(__file__).resolve().parents[2]
PAPER = {
    "GEM 1B": ((23.11, 33.90, 29.89, 33.32, 4.38, 23.5, 40.26), (40.59, 53.34, 64.88, 68.42, 30.10, 25.6, 58.78), 3.34),
    "GEM 3B": (
        (25.31, 39.67, 35.57, 33.28, 8.16, 20.36, 35.99),
        (42.68, 63.41, 78.14, 74.91, 38.14, 24.73, 63.19),
        3.7,
    ),
    "GEM 8B": (
        (25.57, 42.80, 42.53, 40.50, 11.86, 24.37, 41.36),
        (41.58, 60.10, 77.95, 69.0, 34.08, 31.11, 66.3),
        9.46,
    ),
    "GEM Mistral-7B": (
        (25.74, 43.12, 38.71, 36.41, 10.64, 23.84, 42.14),
        (32.53, 55.56, 67.59, 67.95, 26.53, 29.36, 56.92),
        8.2,
    ),
}
"""Scores by task type of mean pooling and of GEM, and the points of MMLU that were lost (table 1)."""
KNOWLEDGE = ("ARC easy", "HellaSwag", "LAMBADA")


class Point(NamedTuple):
    """A model in the picture."""

    name: str
    gained: float
    lost: float
    is_ours: bool


def points_of_paper() -> list[Point]:
    return [Point(name, mean(after) - mean(before), lost, False) for name, (before, after, lost) in PAPER.items()]


def own_points() -> list[Point]:
    """Means over seeds; a full model counts where its generator was asked as well."""
    lines, points = read_lines(RESULTS / "real_llm.jsonl"), []
    for base, title in BASES.items():
        arms = real_arms(lines, base)
        start = next((arm for arm in arms if arm.name == BASELINES["mean"]), None)
        for arm in arms if start else []:
            lost = {GEM["frozen"]: 0.0, GEM["full"]: lost_knowledge(lines, base)}.get(arm.name)
            if lost is not None:
                points.append(Point(f"{arm.name}, {title}", arm.means[-1] - start.means[-1], lost, True))
    return points


def lost_knowledge(lines: list[dict[str, Any]], base: str) -> float | None:
    """Points of accuracy that the full mode lost, over :data:`KNOWLEDGE`; None if that was not measured."""
    found = results_by_kind(lines, base, "knowledge")
    if not found.keys() >= {"mean", "full"}:
        return None
    before, after = (
        mean(run["knowledge"][name] for run in found[kind] for name in KNOWLEDGE) for kind in ("mean", "full")
    )
    return before - after


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [*points_of_paper(), *own_points()]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for point in points:
        print(f"{point.name}: {point.gained:+.1f} points of embedding, {0 - point.lost:+.1f} of the generator")
        color, marker = ("tab:orange", "o") if point.is_ours else ("tab:blue", "s")
        axes.plot(point.lost, point.gained, marker, color=color)
        axes.annotate(point.name, (point.lost, point.gained), (6, -3), textcoords="offset points", fontsize=8)
    axes.axvline(0, color="0.8", zorder=0)
    axes.set(xlabel="lost by the generator, points of accuracy", ylabel="gained by the embedding, points")
    axes.set_xlim(right=max(point.lost for point in points) + 4)
    figure.savefig(ROOT / "docs/images/cost.png", dpi=120)


if __name__ == "__main__":
    main()
