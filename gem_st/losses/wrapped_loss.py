"""A loss of Sentence Transformers that is handed embeddings instead of running the model."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

MODEL_NAMES = ("model", "sentence_embedder")
"""Names under which losses of Sentence Transformers hold the model they train."""
NEED_MORE_THAN_EMBEDDINGS = {
    losses.ContrastiveTensionLoss: "Train with it alone, or beside GemLoss in a dict of data sets and losses.",
    losses.ContrastiveTensionLossInBatchNegatives: "Train with it alone, or beside GemLoss in a dict of losses.",
    losses.DenoisingAutoEncoderLoss: "GemLoss(tasks=['reconstruction']) has the model write texts back.",
}
"""Losses that need copies or tokens of the model, and what to do instead."""


class Embedded(nn.Module):
    """Stands in for the model in an inner loss, whose columns come embedded already."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self._model = (model,)  # a tuple, so that the model is not registered twice

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_model":  # while being copied
                raise
            return getattr(self._model[0], name)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """The features as they are; they hold ``sentence_embedding``."""
        if "sentence_embedding" not in features:
            raise ValueError(
                "This loss was given to GemLoss as `loss`, which hands it embeddings. To use it elsewhere as well, "
                "make another one."
            )
        return dict(features)


class BackwardOf(torch.autograd.Function):
    """Value of a loss on detached embeddings, whose own backward pass gives the embeddings their gradient.

    A loss that caches gradients goes backward in a hook on what it returns, once for each of its mini-batches; through
    this node the model behind the embeddings sees one gradient for all of them.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, parts: tuple[Tensor, Tensor]) -> Tensor:
        """Take embeddings, shape ``(B, D)``, their detached twin and the loss on that; return the loss's value."""
        ctx.parts = parts
        return parts[1].detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Go backward through the inner loss."""
        detached, loss = ctx.parts
        detached.grad = None
        if loss.requires_grad:
            torch.autograd.backward(loss, gradients[0], retain_graph=True)  # freed with this node's context
        return detached.grad, None


def mini_batch_size_of(inner: nn.Module) -> int | None:
    """That of a loss which caches gradients, or of one inside it."""
    sizes = (getattr(module, "mini_batch_size", None) for module in inner.modules())
    return next((size for size in sizes if size is not None), None)


def give_embeddings_to(inner: nn.Module, model: SentenceTransformer) -> None:
    """Have a loss, and those inside it, take the embeddings they are given instead of running the model.

    Raises:
        ValueError: If it is no loss of this model, or one that needs more of it than embeddings.
    """
    if not isinstance(inner, nn.Module) or hasattr(inner, "build_rows"):
        name = getattr(inner, "__name__", type(inner).__name__)
        raise ValueError(f"inner must be a loss of Sentence Transformers made with the model, got {name}.")
    for module in inner.modules():
        for advice in (text for kind, text in NEED_MORE_THAN_EMBEDDINGS.items() if isinstance(module, kind)):
            raise ValueError(
                f"{type(module).__name__} needs copies or tokens of the model: it can be no `loss` of GemLoss. {advice}"
            )
    places = [
        (module, name, child)
        for module in inner.modules()
        for name, child in module.named_children()
        if isinstance(child, SentenceTransformer | Embedded) and name in MODEL_NAMES
    ]
    if not places:
        raise ValueError(f"inner ({type(inner).__name__}) holds no model: is it a loss of Sentence Transformers?")
    stand_in = Embedded(model)
    for module, name, child in places:
        if (child._model[0] if isinstance(child, Embedded) else child) is not model:
            raise ValueError(f"inner ({type(module).__name__}) was made with another model than GemLoss.")
        setattr(module, name, stand_in)
