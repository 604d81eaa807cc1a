"""The model card of a GEM checkpoint, written by Sentence Transformers on every save."""

from __future__ import annotations

import copy
import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import yaml_dump
from sentence_transformers import SentenceTransformer, SentenceTransformerModelCardData
from transformers.utils import cached_file, logging

from .._version import __version__
from ..finding import require_gem
from ..modeling.gem_files import is_local
from ..modeling.gem_gguf import split_gguf
from ..modeling.gem_mask import gem_mask_function, gem_segments

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("template.md")
MODEL_ID = SentenceTransformer._model_card_model_id_placeholder
"""What stands in a card for a name that is not known yet."""

TAGS = ("gem", "custom_code", "text-generation")
SOURCES = {
    "padding": "unused rows of the embedding",
    "reserved": "reserved tokens of the vocabulary",
    "grown": "new rows of the embedding",
    "adapter": "kept in the adapter",
}
CITATION = """
@misc{gem2025,
    title = {GEM: Empowering LLM for both Embedding Generation and Language Understanding},
    author = {Caojin Zhang and Qiang Zhang and Ke Li and Sai Vidyaranya Nuthalapati and Benyu Zhang and Jason Liu and
        Serena Li and Lizhu Zhang and Xiangjun Fan},
    year = {2025},
    eprint = {2506.04344},
    archivePrefix = {arXiv},
    url = {https://arxiv.org/abs/2506.04344},
}
"""


@dataclass
class GemModelCardData(SentenceTransformerModelCardData):
    """Model card data of a GEM model; fills the card's template on every save, trainer checkpoints included.

    :class:`gem_st.GemLoss` gives it to a model that has Sentence Transformers' own. To set a licence, a name or
    the like, pass one: ``SentenceTransformer(modules=[gem], model_card_data=GemModelCardData(license="mit"))``. The
    licence is otherwise the base's. An evaluation before the training, or in its step 0, is shown beside the last.

    Args:
        base_label: What the evaluation before training, or given to :meth:`set_base_metrics`, is called.
    """

    base_label: str = "before training"
    is_stock: bool = field(default=False, init=False)
    base_results: dict[Any, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    first_results: dict[Any, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    base_license: str | None = field(default=None, init=False)
    license_searched: bool = field(default=False, init=False)
    template_path: Path = field(default=TEMPLATE, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.add_tags(list(TAGS))

    def set_base_metrics(self, evaluator: Any, metrics: dict[str, float]) -> None:
        """Put another model's metrics beside this model's, e.g. those of the base with mean pooling.

        Args:
            evaluator: The evaluator, the same object that evaluates this model.
            metrics: What it returned for the other model.
        """
        self.base_results[evaluator] = dict(metrics)

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """Called by Sentence Transformers' evaluators; keeps the first, untrained, result of each beside the last."""
        if self._training_start_time is None or step == 0:
            self.first_results.setdefault(evaluator, dict(metrics))
        super().set_evaluation_metrics(evaluator, metrics, epoch, step)

    def try_to_set_base_model(self) -> None:
        """Take the base's Hub id and revision from the GEM module; a folder of this machine is not named."""
        gem = require_gem(self.model)
        if not is_local(gem.base_model_name_or_path):
            self.base_model, _ = split_gguf(gem.base_model_name_or_path)
            self.base_model_revision = gem.base_model_revision

    def get_default_model_name(self) -> str:
        """Title of the card."""
        if self.base_model:
            return f"GEM on {self.base_model}"
        return self.model_id.rpartition("/")[2] if self.model_id else "GEM model"

    def run_usage_snippet(self) -> None:
        """Nothing: the usage in this card is the same for every model."""

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Values that the template shows beside Sentence Transformers' own."""
        metadata = super().get_model_specific_metadata()
        if not self.license and not self.license_searched:
            self.license = self.base_license = find_license(require_gem(self.model), self.local_files_only)
            self.license_searched = True
        if not self.citations:
            self.set_losses([])
        return {**metadata, "license": self.license, "gem": self.describe()}

    def describe(self) -> dict[str, Any]:
        """What the template knows as ``gem``."""
        gem, model = require_gem(self.model), self.model
        assert model is not None
        mode, names = gem.mode, [f"`{name}`" for name in gem.gem_token_names or ()]
        num_trained = sum(p.numel() for p in gem.parameters() if p.requires_grad) - gem.logit_scale.numel()
        letters, mask = draw_mask(min(gem.num_gem_tokens, 4))
        citations = {"GEM": CITATION, **{name: text for name, text in self.citations.items() if text != CITATION}}
        return {
            **gem.settings(),
            "source": f"rows of {', '.join(names)}" if names else SOURCES[gem.gem_token_source],
            "dtype": _other_dtype(gem, mode),
            "version": __version__,
            "mode": mode,
            "model_id": self.model_id or MODEL_ID,
            "folder": Path(gem.base_model_name_or_path or "unknown").name,
            "license_inherited": self.license == self.base_license,
            "architecture": type(gem.model).__name__,
            "num_parameters": gem.model.num_parameters(),
            "num_trained_parameters": gem.model.num_parameters() if mode == "full" else num_trained,
            "holds_base": gem.save_base and mode != "lora",
            "can_cache": gem.facts.can_cache,
            "prompts": {name: text for name, text in model.prompts.items() if text},
            "letters": letters,
            "mask": mask,
            "hardware": describe_hardware(),
            "comparison": self.compare(),
            "citations": citations,
        }

    def compare(self) -> list[dict[str, str]]:
        """Main metric of each evaluator, before and after; empty where nothing was evaluated twice."""
        rows = []
        others = {**(self.first_results if self._training_start_time is not None else {}), **self.base_results}
        for evaluator, after in self.eval_results_dict.items() if self.eval_results_dict else ():
            before = others.get(evaluator, {})
            parts = getattr(evaluator, "evaluators", [evaluator])
            names = [part.primary_metric for part in parts if getattr(part, "primary_metric", None) in after]
            numbers = [{"name": name, "before": before[name], "after": after[name]} for name in names if name in before]
            rows += [{key: _format(value) for key, value in row.items()} for row in numbers]
        return rows

    def to_yaml(self, line_break: str | None = None) -> str:  # type: ignore[override]  # as Sentence Transformers'
        """Metadata at the head of the card, with the relation to the base added to Sentence Transformers' own."""
        text = super().to_yaml(line_break)
        if self.model is None or not self.base_model:
            return text
        is_adapter = require_gem(self.model).mode != "full"
        return f"{text}\nbase_model_relation: {'adapter' if is_adapter else 'finetune'}"


def use_gem_card(model: SentenceTransformer) -> None:
    """Have a GEM model's card written by :class:`GemModelCardData`, unless it has a card of its owner's choice."""
    card = model.model_card_data
    if type(card) is not SentenceTransformerModelCardData:
        return
    new = GemModelCardData(local_files_only=True)  # so that nothing is looked up again
    vars(new).update({name: value for name, value in vars(card).items() if name != "template_path"})
    new.add_tags(list(TAGS))
    new.first_results = dict(card.eval_results_dict or {}) if card._training_start_time is None else {}
    new.register_model(model)
    model.model_card_data = new


def render_card(model: SentenceTransformer, *, is_stock: bool = False) -> str:
    """The card of a model that is exported.

    A model that was loaded and not trained since has a card. It is kept if it was written by this class and is still
    true; otherwise a new one takes its evaluation, training and metadata over.

    Args:
        model: A GEM model.
        is_stock: True for an export of stock modules.

    Returns:
        Text of README.md.
    """
    use_gem_card(model)
    card: Any = copy.copy(model.model_card_data)
    old_text = None if "generated_from_trainer" in card.tags else model._model_card_text
    old = ModelCard(old_text, ignore_metadata_errors=True) if old_text else None
    if old is not None:
        for name in ("license", "language", "base_model"):
            setattr(card, name, getattr(card, name) or old.data.get(name))
    card.is_stock = is_stock
    new = ModelCard.from_template(card, template_path=str(card.template_path))
    if old is None:
        return new.content
    if card_facts(old.text) == card_facts(new.text):
        return old.content.replace(MODEL_ID, card.model_id or MODEL_ID)
    kept = {name: text for name, text in _sections(old.text).items() if name.split()[0] in ("Evaluation", "Training")}
    text = re.sub(
        r"^## (Evaluation|Training)\n.*?(?=^## )",
        lambda match: kept.get(match[1]) or kept.get(f"{match[1]} Details") or match[0],
        new.text,
        flags=re.DOTALL | re.MULTILINE,
    )
    tags = [
        tag for tag in dict.fromkeys([*new.data.tags, *(old.data.tags or [])]) if tag != "custom_code" or not is_stock
    ]
    data = {**old.data.to_dict(), **new.data.to_dict(), "tags": tags}
    if "model-index" in old.data.to_dict():
        data["model-index"] = old.data.to_dict()["model-index"]
    return f"---\n{yaml_dump(data, sort_keys=False).strip()}\n---\n{text}"


def card_facts(text: str) -> dict[str, str]:
    """Rows of the table at the head of a card, by their first cell; empty for a card of another kind."""
    table = re.search(r"^\| \| \|\n\|---\|---\|\n((?:\|.*\|\n)+)\n## Use$", text, flags=re.MULTILINE)
    cells = (row.strip("| ").split(" | ", 1) for row in table[1].splitlines()) if table else ()
    return {row[0]: row[-1] for row in cells if row[0] not in ("base model", "architecture")}


def _sections(text: str) -> dict[str, str]:
    """Text of each section of a card, its heading included, by the heading."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## ").strip(): part for part in parts}


def find_license(gem: Any, local_files_only: bool = False) -> str | None:
    """Licence in the card of a model's base, which lies in its folder or on the Hub; None if there is none."""
    if not gem.base_model_name_or_path or (gem.source.is_gguf and is_local(gem.base_model_name_or_path)):
        return None  # what lies beside a file is not about it
    hub = {"revision": gem.base_model_revision, "local_files_only": local_files_only}
    source, _ = split_gguf(gem.base_model_name_or_path)
    try:
        path = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False, **hub)
        return ModelCard.load(path).data.get("license") if path else None
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning(
            f"The licence of {gem.base_model_name_or_path} was not found, so that the card has none: {error}"
        )
        return None


def draw_mask(num_gem_tokens: int) -> tuple[str, str]:
    """The GEM mask of a row ``a b | GEM | c d`` as text: names of the GEM tokens, and the matrix."""
    names = [*"ab", *"GHIJ"[:num_gem_tokens], *"cd"]
    ids = torch.tensor([[name.isupper() * (1 + index) for index, name in enumerate(names)]])
    is_real, index = torch.ones_like(ids), torch.arange(len(names))
    rule = gem_mask_function(gem_segments(ids, is_real, ids[ids > 0].tolist()))
    seen = rule(index[:1], index[:1], index[:, None], index) & (index[:, None] >= index)
    lines = [" ".join([name, *("x" if see else "." for see in row)]) for name, row in zip(names, seen, strict=True)]
    return " ".join(names[2:-2]), "\n".join(["  " + " ".join(names), *lines])


def describe_hardware() -> str:
    """Accelerators, or processor and threads, of this machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _other_dtype(gem: Any, mode: str) -> str | None:
    """Data type of the model, if it is not the one that its base is loaded in by default."""
    if mode == "full" or not (gem.source.folder / "config.json").exists():
        return None
    config = json.loads((gem.source.folder / "config.json").read_text(encoding="utf-8"))
    dtype = str(gem.model.dtype).removeprefix("torch.")
    return None if dtype == (config.get("dtype") or config.get("torch_dtype") or dtype) else dtype


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
