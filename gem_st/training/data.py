"""Texts to train on, from files, folders, the Hub or the base model itself."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..files import write_text
from ..losses.rows import split_messages

EXTENSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
    ".txt": ("text", {}),
}
"""Files that can be read: the builder of `datasets`, and its options."""

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SCORE_COLUMNS = ("score", "label", "similarity_score")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")  # the second kind is followed by no space
COLUMN_OPTIONS = {"training set": "--columns", "evaluation set": "--eval-columns"}
SHUFFLE_BUFFER = 10_000
"""Rows of a stream that are held in memory to be drawn from."""


@dataclass
class TrainData:
    """What a training reads.

    Attributes:
        train: Rows to train on, columns of text only; a `datasets` Dataset or IterableDataset.
        columns: Their names, in the order GemLoss reads them.
        num_rows: Number of them; None for a stream.
        held_out: Rows that are measured and not trained on, as dicts.
        eval_set: Rows for the trainer's evaluation loss, or None.
        graded_pairs: ``sentence1``, ``sentence2`` and ``score`` (in [0, 1]) of an evaluation set with a score, or None.
        targets: A teacher's unit vectors of the first text of each row held out, or None. Shape: ``(N, D)``
    """

    train: Any
    columns: list[str]
    num_rows: int | None
    held_out: list[dict[str, str]]
    eval_set: Any = None
    graded_pairs: dict[str, list[Any]] | None = field(default=None, repr=False)
    targets: Tensor | None = field(default=None, repr=False)


# --------------------------------------------------------------------------------------------------------------------
# Sources


def load_source(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
    token: str | None = None,
    text_columns: Sequence[str] = (),
) -> Any:
    """Load a data set.

    Args:
        source: A csv, tsv, json, jsonl, parquet, arrow or txt file (one text a line), compressed or not; a folder of
            such files; or a Hub id.
        split: Split; a file is all ``"train"``, of which ``"train[:1000]"`` is a part.
        subset: Configuration of a Hub data set that has several.
        streaming: Read it as it is trained on.
        token: Hub token.
        text_columns: Columns of csv and tsv files that are text as it stands, digits and "NA" included; where there are
            some, only nothing is null, in all columns.

    Returns:
        A Dataset, or an IterableDataset if ``streaming``.

    Raises:
        ValueError: If it is not there, or of a kind that cannot be read.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(source).expanduser()
    is_named_as_file = path.is_absolute() or source.startswith(".") or _extension(path) in EXTENSIONS
    if not path.exists() and is_named_as_file:
        raise ValueError(f"There is no file or folder {source!r}. Give data, or a Hub id such as 'org/name'.")
    if path.is_file() and _extension(path) not in EXTENSIONS:
        raise ValueError(f"{source!r} is of no kind that can be read. Known are {', '.join(EXTENSIONS)}.")
    if subset is not None and path.exists():
        raise ValueError(f"subset {subset!r} is of data sets of the Hub, and {source!r} is on this machine.")
    if (path / "state.json").exists():
        if split != "train":
            raise ValueError(f"{source!r} is one data set, of which split {split!r} cannot be taken. Use num_rows.")
        saved = load_from_disk(str(path))
        return saved.to_iterable_dataset() if streaming else saved
    try:
        if path.is_file():
            builder, options = EXTENSIONS[_extension(path)]
            if builder == "csv" and text_columns:
                converters = dict.fromkeys(text_columns, str)
                options = {**options, "converters": converters, "keep_default_na": False, "na_values": [""]}
            return load_dataset(builder, data_files=str(path), split=split, streaming=streaming, **options)
        name = str(path) if path.is_dir() else source
        return load_dataset(name, subset, split=split, streaming=streaming, token=token)
    except (DatasetsError, OSError, ValueError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"{source!r} has no rows (split {split!r}). Check how it was made.") from error
        kind = (
            "a data set of the Hub" if not path.exists() else "a file" if path.is_file() else "a folder of such files"
        )
        raise ValueError(
            f"{source!r} cannot be read as {kind} (split {split!r}): {error.__cause__ or error}"
        ) from error


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


# --------------------------------------------------------------------------------------------------------------------
# Columns


def choose_columns(dataset: Any, wanted: list[str] | None, name: str) -> Any:
    """Keep the columns to be trained on.

    Args:
        dataset: A Dataset or IterableDataset.
        wanted: Names of columns, in the order in which GemLoss reads them. By default ``messages`` or ``text`` if there
            is one, otherwise all.
        name: What the data set is called in errors, a key of ``COLUMN_OPTIONS``.

    Raises:
        ValueError: If a column is missing or does not hold text; all columns are listed.
    """
    features = _features_of(dataset, name)
    usual = [column for column in features if column in ("messages", "text")]
    kept = wanted or sorted(usual)[:1] or list(features)
    if repeated := sorted({column for column in kept if kept.count(column) > 1}):
        raise ValueError(f"Column {repeated[0]!r} of the {name} is named twice.")
    if missing := [column for column in kept if column not in features]:
        near = difflib.get_close_matches(missing[0], features, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The {name} has no column {missing[0]!r}, but {list(features)}.{hint}")
    for column in kept:
        if features[column] not in ("string", "large_string") and not (column == "messages" and len(kept) == 1):
            kinds = ", ".join(f"{key} ({kind})" for key, kind in features.items())
            raise ValueError(
                f"Column {column!r} of the {name} holds {features[column]}, and not text. It has: {kinds}. Choose "
                f"columns of text: {COLUMN_OPTIONS[name]} sentence1,sentence2."
            )
    return dataset if kept == list(features) else dataset.select_columns(kept)


def _features_of(dataset: Any, name: str) -> dict[str, str]:
    """Data type of each column; of a stream without types by its first row."""
    if dataset.features is not None:
        return {key: getattr(value, "dtype", type(value).__name__) for key, value in dataset.features.items()}
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} has no rows. Check the split, and how it was made.")
    return {key: "string" if isinstance(value, str) else type(value).__name__ for key, value in first.items()}


def split_conversations(dataset: Any, tokenizer: Any) -> Any:
    """Turn a column ``messages`` into ``prompt`` and ``answer``, as :func:`gem_st.losses.rows.split_messages` does."""
    from datasets import Features, Value

    features = Features({"prompt": Value("string"), "answer": Value("string")})
    options = {"fn_kwargs": {"tokenizer": tokenizer}, "features": features, "remove_columns": ["messages"]}
    return dataset.map(split_messages, **options)


def as_texts(dataset: Any, wanted: list[str] | None, tokenizer: Any, name: str) -> Any:
    """The data set with columns of text only, and with its types known, as the trainer needs them."""
    from datasets import Features, Value

    dataset = choose_columns(dataset, wanted, name)
    columns = list(_features_of(dataset, name))
    if columns == ["messages"]:
        return split_conversations(dataset, tokenizer)
    if dataset.features is None:
        dataset = dataset.cast(Features({column: Value("string") for column in columns}))
    return dataset


# --------------------------------------------------------------------------------------------------------------------
# Rows


def set_aside(dataset: Any, num_rows: int | None, num_held_out: int, seed: int) -> tuple[Any, list[dict[str, str]]]:
    """Shuffle, and take rows to train on and rows to measure with.

    Rows to measure with come after those to train on where there are enough, so that ``num_rows`` is what is trained
    on; otherwise they are taken away from them, at most a tenth.

    Args:
        dataset: A Dataset or IterableDataset.
        num_rows: Rows to train on; None means all.
        num_held_out: Rows to measure with.
        seed: Of the shuffle.

    Returns:
        The data set to train on, and the rows to measure with.
    """
    if not hasattr(dataset, "__len__"):
        held_out = list(dataset.take(num_held_out)) if num_held_out else []
        rest = dataset.skip(num_held_out)
        rest = rest if num_rows is None else rest.take(num_rows)
        return rest.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), held_out
    kept, count = share_rows(len(dataset), num_rows, num_held_out)
    shuffled = dataset.shuffle(seed=seed)
    return shuffled.select(range(kept)), [shuffled[index] for index in range(kept, kept + count)]


def share_rows(total: int, num_rows: int | None, num_held_out: int) -> tuple[int, int]:
    """Rows to train on and rows to measure with, of as many as there are; see :func:`set_aside`."""
    wanted = total if num_rows is None else min(num_rows, total)
    beyond = min(num_held_out, total - wanted)
    count = beyond or min(num_held_out, wanted // 10)
    return (wanted if beyond else wanted - count), count


def load_eval(
    source: str, split: str, columns: list[str] | None, train_columns: list[str], tokenizer: Any
) -> tuple[Any, dict | None]:
    """Load an evaluation set: pairs with a score for a similarity evaluator, or texts for the evaluation loss.

    Args:
        source: What :func:`load_source` takes.
        split: Its split.
        columns: Its columns; by default two of text and a score, or those of the training set.
        train_columns: Columns of the training set.
        tokenizer: Of the base, for messages.

    Returns:
        Texts or None, and graded pairs or None, with scores brought to [0, 1]; exactly one of the two.

    Raises:
        ValueError: If it is neither.
    """
    dataset = load_source(source, split=split)
    if len(dataset) == 0:
        raise ValueError(f"The evaluation set {source!r} has no rows. Check the split, and how it was made.")
    features = _features_of(dataset, "evaluation set")
    if missing := [column for column in columns or () if column not in features]:
        raise ValueError(f"The evaluation set has no column {missing[0]!r}, but {list(features)}.")
    names = columns or list(features)
    texts = [name for name in names if features[name] in ("string", "large_string")]
    scores = [name for name in names if name in SCORE_COLUMNS and features[name] not in ("string", "large_string")]
    if len(texts) == 2 and len(scores) == 1:
        return None, grade_pairs(dataset, texts, scores[0])
    if scores:
        raise ValueError(
            f"The evaluation set has the score {scores[0]!r}, which takes two columns of text, but {texts}. Choose "
            "three columns: --eval-columns sentence1,sentence2,score."
        )
    wanted = columns or (train_columns if features.keys() >= set(train_columns) else None)
    return as_texts(dataset, wanted, tokenizer, "evaluation set"), None


def grade_pairs(dataset: Any, texts: list[str], score: str) -> dict[str, list[Any]]:
    """Columns of an evaluation set with scores, these brought to [0, 1]."""
    missing = [index for index, value in enumerate(dataset[score]) if value is None]
    if missing:
        raise ValueError(f"Row {missing[0]} of column {score!r} of the evaluation set has no number. Drop such rows.")
    values = torch.tensor([float(value) for value in dataset[score]], dtype=torch.float64)
    if not values.isfinite().all() or values.min() == values.max():
        raise ValueError(f"Column {score!r} of the evaluation set must hold different, finite numbers.")
    scaled = (values - values.min()) / (values.max() - values.min())
    return {"sentence1": list(dataset[texts[0]]), "sentence2": list(dataset[texts[1]]), "score": scaled.tolist()}


# --------------------------------------------------------------------------------------------------------------------
# Texts that the base writes


def read_sentences(text: str) -> list[str]:
    """Whole sentences of a text; the last piece, which may be cut off, is left out."""
    return [" ".join(piece.split()) for piece in SENTENCE_END.split(text)[:-1]]


def is_usable(sentence: str) -> bool:
    """True for a sentence of 16 to 256 characters, without any that could not be decoded."""
    return 16 <= len(sentence) <= 256 and "\ufffd" not in sentence


def sample_texts(
    model: Any,
    tokenizer: Any,
    num: int,
    *,
    batch_size: int = 64,
    temperature: float = 1.0,
    max_new_tokens: int = 96,
    keep: Callable[[str], bool] = is_usable,
) -> list[str]:
    """Have a language model write sentences, from nothing.

    At a temperature of 1 they follow the model's own distribution, so that next-token prediction on them pulls it
    nowhere: less forgetting than on cooler, more fluent samples. Randomness is torch's global generator.

    Args:
        model: A ``*ForCausalLM``.
        tokenizer: Its tokenizer.
        num: Sentences to write, all different.
        batch_size: Texts at a time.
        temperature: Of the sampling.
        max_new_tokens: Of each text, from which sentences are taken.
        keep: Which sentences to keep.

    Returns:
        ``num`` sentences.

    Raises:
        ValueError: If the model has no token to start from, or writes no such sentences.
    """
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token_id for token_id in ids if token_id is not None), None)
    if first is None:
        raise ValueError("The base's tokenizer has neither a BOS nor an EOS token to start from. Give it data instead.")
    start = torch.full((batch_size, 1), first, device=model.device)
    pad = next(token_id for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id, first) if token_id is not None)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "pad_token_id": pad}
    sentences: dict[str, None] = {}  # ordered, without duplicates
    num_barren = 0
    with tqdm(total=num, unit="sentence", desc="self-generate") as progress:
        while len(sentences) < num:
            mask = torch.ones_like(start)
            output = model.generate(start, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
            for text in tokenizer.batch_decode(output, skip_special_tokens=True):
                sentences.update(dict.fromkeys(filter(keep, read_sentences(text))))
            new = min(len(sentences), num) - progress.n
            num_barren = 0 if new else num_barren + 1
            progress.update(new)
            if num_barren == 10:
                raise ValueError(
                    f"The base wrote {len(sentences)} of {num} sentences, and no new one in 10 batches of "
                    f"{batch_size}. Give it data instead, or fewer sentences to write."
                )
    return list(sentences)[:num]


def generate_texts(base: dict[str, Any], num: int, seed: int) -> list[str]:
    """Load a base and have it write texts; the same seed gives the same texts on the same device.

    Args:
        base: What ``from_pretrained`` of config and tokenizer gets.
        num: Texts to write.
        seed: Of the sampling.
    """
    on_accelerator = torch.accelerator.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(dtype="auto" if on_accelerator else "float32", **base)
    model = model.to(torch.accelerator.current_accelerator() if on_accelerator else "cpu").eval()
    set_seed(seed)
    return sample_texts(model, AutoTokenizer.from_pretrained(**base), num, batch_size=min(64, num))


def read_texts(path: Path) -> list[str]:
    """What :func:`write_texts` wrote; empty if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line)["text"] for line in lines]


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Write a jsonl file with one ``text`` a line; never half of one."""
    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
