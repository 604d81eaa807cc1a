"""Distillation: an LLM learns the space of another embedder, whose vectors it can then be compared with.

The loss is Sentence Transformers' own (``EmbedDistillLoss``); here are the targets, and the head that maps from the
width of the LLM to that of the teacher.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import Tensor

from ..losses.dataset_checks import check_values
from .data import SENTENCE_END, TrainData
from .measures import encode

NUM_FITTED = 2048
"""Texts that the head is fitted on before the training."""


def _words(text: str) -> tuple[list[str], str, int]:
    """A text's words, what joins them, and how many make one: a word of a script without spaces is two characters."""
    words = text.split()
    if not text.isascii() and len(text) > 12 * len(words):
        return list(text.strip()), "", 2
    return words, " ", 1


def sentences_of(texts: Sequence[str], min_words: int = 5) -> list[str]:
    """Sentences of at least so many words."""
    pieces = (piece.strip() for text in texts for piece in SENTENCE_END.split(text))
    counted = ((piece, _words(piece)) for piece in pieces)
    return [piece for piece, (words, _, size) in counted if len(words) >= min_words * size]


def short_spans(texts: Sequence[str], num: int = 3, seed: int = 0) -> list[str]:
    """Three to ten words in a row, ``num`` times from each text."""
    found, rng = [], random.Random(seed)
    for words, joint, size in map(_words, texts):
        for length in rng.choices(range(3, 11), k=num):
            start = rng.randrange(max(1, len(words) - size * length + 1))
            found.append(joint.join(words[start : start + size * length]))
    return found


def cut_pieces(dataset: Dataset, held_out: Sequence[dict[str, str]], seed: int) -> Dataset:
    """Texts, their sentences, and spans of both that are as short as queries.

    Args:
        dataset: One column of texts.
        held_out: Rows that are not to be trained on.
        seed: Of the spans and of the order.

    Returns:
        A data set of the same column, shuffled, without a row twice.

    Raises:
        ValueError: If there are several columns, or a row holds no text.
    """
    if len(dataset.column_names) > 1:
        raise ValueError(
            f"pieces are cut from one column of text, and there are {dataset.column_names}. Name it: --columns NAME"
        )
    (column,) = dataset.column_names
    texts = list(dataset[column])
    check_values(column, texts, "training")
    whole = [*texts, *sentences_of(texts)]
    pieces = dict.fromkeys([*whole, *short_spans(whole, seed=seed)])
    left_out = {"", *(row[column] for row in held_out)}
    return Dataset.from_dict({column: [piece for piece in pieces if piece not in left_out]}).shuffle(seed=seed)


def label_by_teacher(dataset: Dataset, teacher: SentenceTransformer, kind: str = "training") -> Dataset:
    """Add the teacher's unit vectors of each row's texts as the column ``label``.

    Args:
        dataset: Columns of texts.
        teacher: Any model of Sentence Transformers.
        kind: Of the set, for errors: ``"training"`` or ``"evaluation"``.

    Returns:
        The data set; a label has shape ``(D,)`` for one column of texts, ``(C, D)`` for C of them.

    Raises:
        ValueError: If a row holds no text.
    """
    for name in dataset.column_names:
        check_values(name, list(dataset[name]), kind)
    columns = [encode(teacher, dataset[name]) for name in dataset.column_names]
    labels = columns[0] if len(columns) == 1 else torch.stack(columns, dim=1)
    return concatenate_datasets([dataset, Dataset.from_dict({"label": labels.numpy()})], axis=1)


def add_head(model: SentenceTransformer, texts: list[str], targets: Tensor, ridge: float = 1e-2) -> None:
    """Append a linear head of the teacher's width to a model, and unit length.

    The head starts as the ridge regression of the teacher's vectors on the model's.

    Args:
        model: A model of one module, a GemTransformer.
        texts: Texts to fit on, more than the model's dimension.
        targets: The teacher's vectors of them. Shape: ``(N, D)``
        ridge: Added to the diagonal, as a share of the mean of its entries.
    """
    inputs = model.encode(texts, convert_to_tensor=True, show_progress_bar=False).double().cpu()
    gram = inputs.T @ inputs
    gram += torch.eye(len(gram), dtype=gram.dtype) * ridge * gram.diagonal().mean()
    weight = torch.linalg.solve(gram, inputs.T @ targets.double()).T.float()
    head = Dense(weight.shape[1], weight.shape[0], bias=False, activation_function=None, init_weight=weight)
    for module in (head.to(model.device), Normalize()):
        model.append(module)


def follow_teacher(name: str, model: SentenceTransformer, data: TrainData) -> TrainData:
    """Give a model a head for a teacher's space, and data its vectors.

    Args:
        name: Folder or Hub id of the teacher.
        model: The model to be trained.
        data: Its data, in memory.

    Returns:
        The data with targets.

    Raises:
        ValueError: If there are too few texts to fit the head on.
    """
    num_texts, width = min(len(data.train), NUM_FITTED), model.get_embedding_dimension() or 0
    if num_texts <= width:
        raise ValueError(f"A head from {width} dimensions cannot be fitted on {num_texts} rows. Train on more.")
    teacher = SentenceTransformer(name, device=str(model.device))
    train = label_by_teacher(data.train, teacher)
    fitted = train.select(range(num_texts))
    labels = torch.tensor(fitted["label"]).float()
    add_head(model, list(fitted[data.columns[0]]), labels if labels.dim() == 2 else labels[:, 0])
    eval_set = None if data.eval_set is None else label_by_teacher(data.eval_set, teacher, "evaluation")
    first = [row[data.columns[0]] for row in data.held_out]
    targets = encode(teacher, first) if first else None
    return dataclasses.replace(data, train=train, eval_set=eval_set, targets=targets)
