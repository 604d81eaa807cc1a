"""Entries for mteb's list of models, which know that a GEM checkpoint brings code.

``mteb run -m org/gem-x`` and ``mteb.get_model("org/gem-x")`` do not run code that a checkpoint brings, and neither
reads a folder of this machine. With an entry both do. In Python::

    import mteb
    from gem_st.evaluation.mteb_entry import model_meta

    meta = model_meta("your-name/Llama-3.2-1B-GEM", "gem-llama-3.2-1b", revision=COMMIT)
    mteb.evaluate(meta, mteb.get_tasks(tasks=["STSBenchmark"]))

On the command line, mteb's own after such an entry was made. MODEL may be a folder; the code in it is run::

    python -m gem_st.evaluation.mteb_entry run -m MODEL -t STSBenchmark

For everyone, once the checkpoint is public: a pull request to https://github.com/embeddings-benchmark/mteb that adds
``mteb/models/model_implementations/gem_models.py`` with ``gem_llama_1b = ModelMeta(...)``, written out with what
``print(meta)`` shows, the revision the commit that was evaluated. ``loader=SentenceTransformerEncoderWrapper`` and
``loader_kwargs={"trust_remote_code": True}`` are all that mteb needs to load it, and gem_st need not be installed.
``mteb submit-results`` then hands in the results.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cards.card_data import CITATION
from .suites import require_mteb

if TYPE_CHECKING:
    from mteb.models import ModelMeta

WIKIPEDIA = "https://huggingface.co/datasets/princeton-nlp/datasets-for-simcse"
"""The Wikipedia sentences of SimCSE, of which the paper takes 32,000. No task of mteb is made of them."""

MAX_TOKENS = 512
"""Tokens in a row of the recipes, GEM tokens included."""


@dataclass(frozen=True)
class Recipe:
    """What is known of a model before it is trained, all of it from its base; see model_cards/recipes.yaml.

    Attributes:
        base: Hub id.
        license: As mteb knows it: a name, or the address of the text.
        num_parameters: Of the base, tied weights once.
        vocab_size: Rows of its embedding.
        width: Its hidden size.
    """

    base: str
    license: str
    num_parameters: int
    vocab_size: int
    width: int


LLAMA_3, LLAMA_3_2 = "https://www.llama.com/llama3/license", "https://www.llama.com/llama3_2/license"

RECIPES = {
    "gem-llama-3.2-1b": Recipe("meta-llama/Llama-3.2-1B", LLAMA_3_2, 1_235_814_400, 128_256, 2048),
    "gem-llama-3.2-3b": Recipe("meta-llama/Llama-3.2-3B", LLAMA_3_2, 3_212_749_824, 128_256, 3072),
    "gem-llama-3-8b": Recipe("meta-llama/Meta-Llama-3-8B", LLAMA_3, 8_030_261_248, 128_256, 4096),
    "gem-mistral-7b": Recipe("mistralai/Mistral-7B-v0.1", "apache-2.0", 7_241_732_096, 32_000, 4096),
    "gem-qwen3-0.6b": Recipe("Qwen/Qwen3-0.6B-Base", "apache-2.0", 596_049_920, 151_936, 1024),
    "gem-qwen3-4b": Recipe("Qwen/Qwen3-4B-Base", "apache-2.0", 4_022_468_096, 151_936, 2560),
}
"""Bases of the recipes, by the names in model_cards/recipes.yaml."""


def model_meta(
    name: str, recipe: str | None = None, *, model: Any = None, revision: str | None = None, **facts: Any
) -> ModelMeta:
    """An entry of a GEM checkpoint for mteb. Whether there is one, the caller knows: gem_st comes with none.

    mteb has no field for K and the mode. ``experiment_kwargs`` is no place for them, since mteb hands those to
    whatever loads the model.

    Args:
        name: Repository of the checkpoint, ``owner/name``, or a folder of this machine, which is made absolute.
        recipe: One of :data:`RECIPES`, for the facts of the base: one GEM token, and 512 tokens in a row.
        model: The checkpoint itself, loaded, whose numbers win over those of the recipe: parameters with those of GEM
            tokens and LoRA, width with ``pooling="concat"``, length, instructions.
        revision: Commit that the results are of. Of a folder, what it holds is one by default: mteb looks results up by
            name and revision, and would show those of an earlier training.
        **facts: Fields of ``mteb.models.ModelMeta``, which win over all else: ``release_date``,
            ``public_training_code``, ``contacts``, ``training_datasets`` if it was trained on other data...

    Raises:
        ImportError: If mteb is not installed.
        ValueError: If there is no such recipe, or a field does not hold what mteb wants.
    """
    require_mteb()
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper

    if recipe is not None and recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}, but {', '.join(RECIPES)}.")
    is_folder = Path(name).is_dir()
    if is_folder:
        name, revision = str(Path(name).resolve()), revision or _state_of(Path(name))
    fields: dict[str, Any] = {
        **dict.fromkeys(name for name, field in ModelMeta.model_fields.items() if field.is_required()),
        "loader": SentenceTransformerEncoderWrapper,
        "loader_kwargs": {"trust_remote_code": True},
        "name": name,
        "revision": revision,
        "languages": ["eng-Latn"],
        "open_weights": True,
        "framework": ["Sentence Transformers", "PyTorch", "safetensors"],
        "reference": None if is_folder else f"https://huggingface.co/{name}",
        "similarity_fn_name": "cosine",
        "citation": CITATION.strip(),
        **(_facts_of_recipe(RECIPES[recipe]) if recipe else {}),
        **(_facts_of_model(model) if model is not None else {}),
        **facts,
    }
    if fields["n_parameters"] and fields["memory_usage_mb"] is None:
        fields["memory_usage_mb"] = round(fields["n_parameters"] * 4 / 1024**2)  # float32, as mteb reckons
    return ModelMeta(**fields)


def _state_of(folder: Path) -> str:
    """Names, sizes and times of a checkpoint's files, in 12 characters."""
    files = sorted(path for kind in ("json", "safetensors") for path in folder.rglob(f"*.{kind}"))
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:12]


def _facts_of_recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "n_parameters": recipe.num_parameters,
        "n_embedding_parameters": recipe.vocab_size * recipe.width,
        "embed_dim": recipe.width,
        "max_tokens": MAX_TOKENS,
        "license": recipe.license,
        "adapted_from": recipe.base,
        "public_training_data": WIKIPEDIA,
        "training_datasets": set(),
    }


def _facts_of_model(model: Any) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "n_parameters": sum(weight.numel() for weight in parameters),
        "n_embedding_parameters": model[0].model.get_input_embeddings().weight.numel(),
        "memory_usage_mb": round(sum(weight.numel() * weight.element_size() for weight in parameters) / 1024**2),
        "embed_dim": model.get_embedding_dimension(),
        "max_tokens": model.max_seq_length,
        "use_instructions": any(model.prompts.values()),
    }


def register(meta: ModelMeta) -> None:
    """Add an entry to mteb's list in this process, so that ``mteb.get_model`` and mteb's command line find it.

    Args:
        meta: The entry; one of the same name is replaced.
    """
    _registry()[str(meta.name)] = meta


def _registry() -> dict[str, ModelMeta]:
    require_mteb()
    from mteb.models.model_implementations import MODEL_REGISTRY

    return MODEL_REGISTRY


def main(args: list[str] | None = None) -> None:
    """mteb's command line, for a checkpoint in a folder or one that mteb does not list. Runs the checkpoint's code.

    Args:
        args: What would follow ``mteb``; the arguments of the process by default.

    Raises:
        ImportError: If mteb is not installed.
    """
    args = sys.argv[1:] if args is None else args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-m", "--model")
    model = parser.parse_known_args(args)[0].model if args[:1] == ["run"] else None
    registry = _registry()
    if model and model not in registry:
        registry[model] = model_meta(model)
    from mteb.cli import main as run_mteb

    sys.argv = ["mteb", *args]
    run_mteb()


if __name__ == "__main__":
    main()
