"""Scores of one embedder on tasks of `mteb`, by mteb's own runner and result cache."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from .lm_eval_tasks import retry_smaller
from .suites import sample_indices


def score_task(
    model: SentenceTransformer,
    task: Any,
    *,
    name: str,
    revision: str,
    cache: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
) -> dict[str, Any]:
    """Score a model on a task, or read the score from the cache if it has been done.

    Args:
        model: Any SentenceTransformer; its prompts are used as `mteb run` uses them.
        task: Task of mteb, of the Hub or of :func:`gem_st.evaluation.suites.load_suite`.
        name: What the model is called in the cache.
        revision: What its scores depend on, as :func:`fingerprint` gives; another one is scored anew.
        cache: Folder of mteb's result cache; None for no cache.
        batch_size: Texts in a forward pass; halved as often as memory runs out.
        limit: Rows, or queries, that are evaluated, a fixed random sample; None for all.

    Returns:
        ``main_score``, rounded to six digits as in mteb's cache, ``type``, ``metric``, its name,
        ``metrics``, all that mteb measured if there is one split and language, and ``seconds``.
    """
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    data = task.metadata.dataset.get("revision", "")
    revision = f"{revision[:16]}-{data[:8]}"  # mteb would read the score of other data as well
    if limit is not None:
        limit_task(task, limit)
        revision += f"-limit{limit}"
    with _quiet():
        encoder = SentenceTransformerEncoderWrapper(model)
    changes = {"name": name if "/" in name else f"local/{name}", "revision": revision}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=changes)
    if cache is not None:
        _remove_broken(mteb.ResultCache(cache).get_task_result_path(task.metadata.name, encoder.mteb_model_meta))

    def run(batch_size: int) -> Any:
        return mteb.evaluate(
            encoder,
            task,
            cache=None if cache is None else mteb.ResultCache(cache),
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
            show_progress_bar=False,
            co2_tracker=False,
        )

    with _quiet():
        result = retry_smaller(run, batch_size).task_results[0]
    return {
        "main_score": round(float(result.get_score()), 6),  # as it is in the cache
        "type": task.metadata.type,
        "metric": task.metadata.main_score,
        "metrics": _only_metrics(result.scores),
        "seconds": result.evaluation_time,
    }


def _remove_broken(path: Path) -> None:
    """Remove a result that mteb was killed over while it wrote it, and could not read again."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        path.unlink()


def _only_metrics(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """All numbers of a task that has one split and one language; none of others, whose main score is a mean."""
    parts = [part for split in scores.values() for part in split]
    return {name: value for name, value in parts[0].items() if isinstance(value, float)} if len(parts) == 1 else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what scikit-learn says of each of mteb's short regressions, and mteb of names that have changed."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def limit_task(task: Any, limit: int) -> None:
    """Keep a fixed random sample of the rows that a task evaluates, or of its queries; training rows all stay.

    Args:
        task: Task of mteb; its data is loaded.
        limit: Rows of each split and language.
    """
    task.load_data()
    if hasattr(task, "convert_v1_dataset_format_to_v2"):
        task.convert_v1_dataset_format_to_v2(num_proc=None)
    is_flat = not set(task.hf_subsets) <= set(task.dataset)
    for splits in [task.dataset] if is_flat else [task.dataset[subset] for subset in task.hf_subsets]:
        for split in task.eval_splits:
            part = splits[split]
            splits[split] = _sample_queries(part, limit) if isinstance(part, dict) else _sample_rows(part, limit)


def _sample_queries(part: dict[str, Any], limit: int) -> dict[str, Any]:
    queries = part["queries"].select(sample_indices(len(part["queries"]), limit))
    kept = set(queries["id"])
    chosen: dict[str, Any] = {"queries": queries}
    for key in ("relevant_docs", "top_ranked"):
        if part.get(key):
            chosen[key] = {query: value for query, value in part[key].items() if query in kept}
    return {**part, **chosen}


def _sample_rows(part: Any, limit: int) -> Any:
    """A sample of rows; of a data set whose one row holds lists, of the entries of these."""
    if len(part) == 1 and all(isinstance(value, list) for value in part[0].values()):
        indices = sample_indices(len(next(iter(part[0].values()))), limit)
        return type(part).from_dict({key: [[value[i] for i in indices]] for key, value in part[0].items()})
    return part.select(sample_indices(len(part), limit))
