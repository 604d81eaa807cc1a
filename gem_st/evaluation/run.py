"""One evaluation of a checkpoint and its base: embeddings by `mteb`, generation by `lm-eval`, what was retained.

`gem-st eval` calls :func:`evaluate`. Everything that has been computed is in files of the output folder before the next
task begins, and is read from there when the same evaluation is run again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .. import hub
from ..files import write_json, write_text
from ..finding import find_gem
from ..hub.loading import load_any
from ..modeling.gem_files import is_local
from ..modeling.gem_gguf import name_pretrained
from ..training.measures import describe_versions
from .baselines import BASELINES, build_baseline, set_padding_token
from .health import measure_health
from .identity import (
    digest_generator,
    fingerprint,
    same_weights,
)
from .lm_eval_tasks import GenerationTask, evaluate_generation, retry_smaller
from .mteb_scores import score_task
from .render import draw_bars, render_markdown, update_card
from .results import EvalResults
from .retention import compare_generators
from .suites import LOCAL_ADVICE, Suite, load_suite, read_texts_of

logger = logging.get_logger(__name__)

NUM_TEXTS = 400
"""Texts on which two generators are compared, and vectors examined, if the suite names none for it."""

MAX_COMPARED_TEXTS = 16
"""Texts in a forward pass of two generators at most: there are logits of both, and in double precision."""

VERSIONS = ("mteb", "lm-eval")


@dataclass
class EvalConfig:
    """What to evaluate, and how.

    Attributes:
        checkpoint: Folder or Hub id of a GEM checkpoint, or of any other SentenceTransformer.
        baseline: Folder or Hub id of the base; by default the one that the checkpoint names. ``"none"`` for no
            comparison.
        compare: Baselines made of the base, keys of ``BASELINES``. The first stands in the table.
        suite: A key of ``gem_st.evaluation.suites.BENCHMARKS``, or a YAML file of local tasks.
        knowledge: Names of generation tasks instead of the suite's own; an empty list for none.
        output: Folder of results; by default in ``runs/eval``, by the name of the checkpoint.
        limit: Rows of each embedding task, and samples of each generation task (of MMLU: of each subject).
        batch_size: Texts in a forward pass; halved where memory runs out.
        health: Also examine the vectors, see :mod:`gem_st.evaluation.health`.
        card: Write the results into the model card of a checkpoint that is a folder.
        dtype: Data type to load models in.
        device: Where to run them.
        revision: Branch, tag or commit of a checkpoint on the Hub.
        token: Hub token.
        trust_remote_code: Run code of a checkpoint that is not gem_st's.
    """

    checkpoint: str
    baseline: str | None = None
    compare: list[str] = field(default_factory=lambda: list(BASELINES))
    suite: str = "paper"
    knowledge: list[str] | None = None
    output: str | None = None
    limit: int | None = None
    batch_size: int = 32
    health: bool = False
    card: bool = True
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    token: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be 1 or more, got {self.limit}.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}.")
        if unknown := [name for name in self.compare if name not in BASELINES]:
            raise ValueError(f"There is no baseline {unknown[0]!r}. Known are {', '.join(BASELINES)}.")

    @property
    def name(self) -> str:
        """What the checkpoint is called in tables."""
        return Path(self.checkpoint).resolve().name if Path(self.checkpoint).exists() else self.checkpoint

    @property
    def folder(self) -> Path:
        """Where results are written; of a folder named by its last two parts, since many end alike."""
        if self.output:
            return Path(self.output).expanduser()
        is_folder = Path(self.checkpoint).exists()
        parts = Path(self.checkpoint).resolve().parts[-2:] if is_folder else self.checkpoint.split("/")
        return Path("runs/eval") / "--".join(part for part in parts if part != "/")


def evaluate(config: EvalConfig, *, progress: Callable[[str], None] = logger.info) -> EvalResults:
    """Evaluate a checkpoint and its base, and write ``results.json``, ``results.md`` and ``results.png``.

    Args:
        config: What to evaluate.
        progress: Called with a line about each task.

    Returns:
        The results; tasks that failed are in its ``errors``, and all others have run.

    Raises:
        ValueError: If suite, files, checkpoint or base cannot be used; before anything is computed where that is known.
        OSError: If something on the Hub cannot be reached.
    """
    suite = load_suite(config.suite, config.knowledge)
    return _Evaluation(config, suite, progress).run()


class _Evaluation:
    """A run of :func:`evaluate`."""

    def __init__(self, config: EvalConfig, suite: Suite, progress: Callable[[str], None]) -> None:
        self.config, self.suite, self.progress = config, suite, progress
        self.folder = config.folder
        self.results = EvalResults(name=config.name)
        self.dtype: Any = config.dtype
        self.base_revision: str | None = None

    def run(self) -> EvalResults:
        """Evaluate, from the checkpoint to the picture."""
        model = self.load_checkpoint()
        gem: Any = find_gem(model)
        base = self.find_base(gem)
        if self.dtype == "auto":  # the base is compared in the checkpoint's
            weights = (model if gem is None else gem.model).parameters()
            self.dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), "auto")
        if gem is not None and base == gem.base_model_name_or_path:
            self.base_revision = gem.base_model_revision
        if base is not None:
            self.check_base(base)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results.config = self.describe(model, gem, base)
        self.score_embedder(model, self.config.name, None, self.results.config["fingerprint"])
        if base is not None and self.suite.tasks:
            for name in self.config.compare:
                baseline = self.load_baseline(name, base, model)
                self.score_embedder(baseline, f"{base} ({name})", name, fingerprint(baseline))
        if self.config.health:
            self.examine(model)
        if self.suite.knowledge:
            self.score_generators(model, gem, base)
        self.save()
        draw_bars(self.results, self.folder / "results.png")
        self.write_card(gem)
        return self.results

    # Models

    def load_checkpoint(self) -> SentenceTransformer:
        """The checkpoint: by gem_st if it is a GEM checkpoint, otherwise as Sentence Transformers reads it."""
        config = self.config
        kwargs: dict[str, Any] = {"revision": config.revision, "token": config.token, "device": config.device}
        kwargs |= {"trust_remote_code": config.trust_remote_code, "model_kwargs": {"dtype": config.dtype}}
        model = load_any(config.checkpoint, **kwargs)
        if find_gem(model) is not None:
            return model
        set_padding_token(model.tokenizer)
        modules = ", ".join(type(module).__name__ for module in model)
        self.progress(
            f"{config.checkpoint} is not a GEM checkpoint: evaluated as Sentence Transformers reads it ({modules})."
        )
        return model

    def find_base(self, gem: Any) -> str | None:
        """Name of the base, if there is to be a comparison."""
        if self.config.baseline == "none":
            return None
        base = self.config.baseline or named_base(gem, self.config)
        if base is None:
            self.progress("The checkpoint names no base, so that nothing is compared: --baseline BASE.")
            return None
        if is_local(base) and not Path(base).exists():
            raise ValueError(
                f"The base of {self.config.checkpoint} is {base!r}, which is not on this machine. Give it as "
                "--baseline, or --baseline none for no comparison."
            )
        return base

    def check_base(self, base: str) -> None:
        """Look at the base's settings, before anything is computed.

        Raises:
            ValueError: If it is not there, or no model of transformers.
        """
        try:
            AutoConfig.from_pretrained(**self.pretrained(base, self.base_revision))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The base {base!r} cannot be read. Give another as --baseline, or --baseline none for no comparison: "
                f"{error}"
            ) from error

    def load_baseline(self, name: str, base: str, model: SentenceTransformer) -> SentenceTransformer:
        """A baseline in the checkpoint's data type, that reads as much of a text as the checkpoint does."""
        length = model.max_seq_length
        if length is not None:
            length -= getattr(model[0], "num_gem_tokens", 0)
        options = {name: value for name, value in self.pretrained(base, self.base_revision).items() if value}
        source = options.pop("pretrained_model_name_or_path")
        kwargs = {"model_kwargs": {"dtype": self.dtype, **options}}
        kwargs |= {"processor_kwargs": options, "config_kwargs": options}
        with hub.translate_hub_errors(base):
            baseline = build_baseline(name, source, max_seq_length=length, **kwargs)
        baseline.prompts, baseline.default_prompt_name = dict(model.prompts), model.default_prompt_name
        return baseline.to(model.device)

    def load_generator(self, model: SentenceTransformer, gem: Any) -> tuple[PreTrainedModel, Any] | None:
        """The checkpoint as a language model, and its tokenizer; None if it is no language model."""
        if gem is not None:
            return gem.model, gem.tokenizer
        return self.load_language_model(self.config.checkpoint, self.config.revision, model.device)

    def pretrained(self, name: str, revision: str | None) -> dict[str, Any]:
        """What ``from_pretrained`` gets for a model in a folder, on the Hub, or in a GGUF file of one of these."""
        config = self.config
        options = {"revision": revision, "token": config.token, "trust_remote_code": config.trust_remote_code}
        return {**name_pretrained(name), **options}

    def load_language_model(
        self, name: str, revision: str | None, device: torch.device
    ) -> tuple[PreTrainedModel, Any] | None:
        """A causal language model of transformers, and its tokenizer; None if it is none."""
        kwargs = self.pretrained(name, revision)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(dtype=self.dtype, output_loading_info=True, **kwargs)
        except (ValueError, KeyError) as error:
            self.progress(f"{name} does not load as a causal language model, generation is left out: {error}")
            return None
        model, found = loaded
        if found["missing_keys"]:  # an embedder's weights, say, which transformers completes at random
            missing = ", ".join(sorted(found["missing_keys"])[:3])
            self.progress(f"{name} is no whole causal language model (no {missing}), generation is left out.")
            return None
        return model.to(device).eval(), AutoTokenizer.from_pretrained(**kwargs)

    # Embeddings

    def score_embedder(self, model: SentenceTransformer, title: str, baseline: str | None, revision: str) -> None:
        """Score a model on all tasks of the suite."""
        for number, task in enumerate(self.suite.tasks, start=1):
            name = task.metadata.name
            try:
                score = score_task(
                    model,
                    task,
                    name=f"gem_st/{title.replace('/', '--')}",
                    revision=revision,
                    cache=self.folder / "mteb",
                    batch_size=self.config.batch_size,
                    limit=self.config.limit,
                )
            except Exception as error:
                self.note_failure(name if baseline is None else f"{name} with {baseline}", error)
                continue
            self.results.add_embedding(name, score, baseline)
            self.save()
            place = f"{number}/{len(self.suite.tasks)}"
            self.progress(f"{title}, {place}: {name} {score['main_score']:.4f} ({score['seconds']:.0f} s)")

    def examine(self, model: SentenceTransformer) -> None:
        """Examine the vectors, or read what was found the last time."""
        digest = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        path = self.folder / "health" / f"{self.results.config['fingerprint'][:16]}-{digest[:8]}.json"
        self.progress("health of the vectors")

        def measure(batch_size: int) -> dict[str, Any]:
            return measure_health(model, self.texts, batch_size=max(2, batch_size)).to_dict()

        try:
            self.results.health = cached_json(path, lambda: retry_smaller(measure, self.config.batch_size))
        except Exception as error:
            self.note_failure("health", error)
        self.save()

    def note_failure(self, name: str, error: Exception) -> None:
        """Go on after a task that failed; stop if it is the network, which all others need as well.

        Raises:
            OSError: If the Hub cannot be reached.
        """
        if hub.is_unreachable(error):
            raise OSError(f"The data of {name} is on the Hub, which cannot be reached. {LOCAL_ADVICE}") from error
        logger.warning(f"{name} failed", exc_info=error)
        self.results.errors[name] = f"{type(error).__name__}: {error}"
        self.progress(f"{name} failed: {self.results.errors[name]}")
        self.save()

    # Generation

    def score_generators(self, model: SentenceTransformer, gem: Any, base: str | None) -> None:
        """Measure what the checkpoint still writes and knows, and what its base does."""
        generator = self.load_generator(model, gem)
        if generator is None:
            return
        self.answer(self.config.name, *generator, is_base=False)
        if base == self.config.checkpoint and not self.config.baseline:
            self.progress(
                "The checkpoint names no base, and was frozen: baselines are made of the weights in it, and generators "
                "are not compared. Give it as --baseline."
            )
            return
        loaded = self.load_language_model(base, self.base_revision, model.device) if base else None
        if loaded is None:
            return
        if same_weights(generator[0], loaded[0]):
            self.progress(f"The generator has the weights of {base}, bit for bit: its answers are not asked for twice.")
            self.results.copy_generation()
        else:
            self.answer(base or "", *loaded, is_base=True)
        results, base_results = self.results.generation_records()
        if not self.texts:
            self.progress("The suite has no texts to compare generators on: name a perplexity task, or any of texts.")
            return
        compare = partial(
            compare_generators, generator[0], *loaded, self.texts, results=results, base_results=base_results
        )
        retention = retry_smaller(
            lambda size: compare(batch_size=size), min(MAX_COMPARED_TEXTS, self.config.batch_size)
        )
        self.results.retention = retention.to_dict()
        self.progress(retention.sentence)

    def answer(self, title: str, model: PreTrainedModel, tokenizer: Any, *, is_base: bool) -> None:
        """Put a language model through the generation tasks of the suite."""
        digest = digest_generator(model, tokenizer)
        sizes: Any = {"batch_size": self.config.batch_size, "limit": self.config.limit}
        for number, task in enumerate(self.suite.knowledge, start=1):
            path = self.folder / "lm-eval" / digest / f"{_digest_task(task, self.config.limit)}.json"
            try:
                result = cached_json(path, partial(evaluate_generation, model, tokenizer, task, **sizes))
            except Exception as error:
                self.note_failure(task.name, error)
                continue
            self.results.add_generation(task.name, result, is_base=is_base)
            self.save()
            place = f"{number}/{len(self.suite.knowledge)}"
            self.progress(f"{title}, {place}: {task.name} {result['metric']} {result['main_score']:.4f}")

    @cached_property
    def texts(self) -> list[str]:
        """Texts of the suite on which generators are compared and vectors examined."""
        return read_texts_of(self.suite, NUM_TEXTS)

    # Files

    def describe(self, model: SentenceTransformer, gem: Any, base: str | None) -> dict[str, Any]:
        """What results depend on."""
        config = dataclasses.asdict(self.config)
        config.pop("token")
        return {
            **config,
            "output": str(self.folder),
            "baseline": base,
            "is_gem": gem is not None,
            "mode": None if gem is None else ("frozen" if gem.freeze_base else "full"),
            "num_gem_tokens": None if gem is None else gem.num_gem_tokens,
            "max_seq_length": model.max_seq_length,
            "prompts": len([prompt for prompt in model.prompts.values() if prompt]),
            "fingerprint": fingerprint(model),
            "versions": describe_versions(*VERSIONS),
        }

    def save(self) -> None:
        """Write what there is."""
        write_json(self.folder / "results.json", self.results.to_dict())
        write_text(self.folder / "results.md", render_markdown(self.results))

    def write_card(self, gem: Any) -> None:
        """Put the results into the model card of a checkpoint that is a folder."""
        folder = Path(self.config.checkpoint)
        if gem is None or not self.config.card or self.results.errors:
            return
        if not folder.is_dir():
            self.progress(f"The card of a repository is not touched; {self.folder / 'results.md'} holds its section.")
            return
        update_card(folder / "README.md", self.results)
        self.progress(f"Written into {folder / 'README.md'}.")


def cached_json(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds; without one, what is computed, and written there."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def named_base(gem: Any, config: EvalConfig) -> str | None:
    """Base of a GEM checkpoint, by its settings, by its model card, or inside it if it was frozen; None for others."""
    if gem is None:
        return None
    base = gem.base_model_name_or_path
    if base and Path(base).resolve() != Path(config.checkpoint).resolve() and base != config.checkpoint:
        return base
    if card := hub.read_card(config.checkpoint, revision=config.revision, token=config.token):
        base = card.data.get("base_model")
        if base := base[0] if isinstance(base, list) else base:
            return base
    return config.checkpoint if gem.freeze_base and gem.save_base else None


def _digest_task(task: GenerationTask, limit: int | None) -> str:
    """Name of a file for a task's answers, which depend on its settings and data."""
    digest = hashlib.sha256(repr((task, limit)).encode())
    for path in (task.data, task.dev):
        if path is not None:
            digest.update(path.read_bytes())
    return f"{task.name}-{digest.hexdigest()[:12]}"
