"""Render the cards in this folder.

python model_cards/render.py                     # recipe cards, from recipes.yaml and recipe_template.md
python model_cards/render.py --demo runs/demo    # and the cards of gem-base-8m, from what `make demo` wrote
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jinja2
import yaml

from gem_st.cards.card_data import CITATION, MODEL_ID

FOLDER = Path(__file__).resolve().parent


def render_recipes() -> dict[str, str]:
    """Text of each recipe card, by file name."""
    data = yaml.safe_load((FOLDER / "recipes.yaml").read_text(encoding="utf-8"))
    source = (FOLDER / "recipe_template.md").read_text(encoding="utf-8")
    template = jinja2.Template(source, undefined=jinja2.ChainableUndefined, keep_trailing_newline=True)
    shared = {"groups": data["groups"], "citation": CITATION}
    return {f"{recipe['name']}.md": template.render(**recipe, **shared) for recipe in data["recipes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output folder of the demo")
    demo = parser.parse_args().demo
    cards = render_recipes()
    for mode in ("full", "frozen") if demo else ():
        card = (demo / mode / "README.md").read_text(encoding="utf-8")
        cards[f"gem-base-8m-{mode}.md"] = card.replace(MODEL_ID, f"your-name/gem-base-8m-{mode}")
    for name, text in cards.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"model_cards/{name}")


if __name__ == "__main__":
    main()
