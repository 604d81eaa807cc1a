"""`gem-st train`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ..training.config import TrainConfig, load_config, parse_value
from .common import AsJson, app, one_line_errors, print_result


def _train_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command every setting of a training as an option, beside its own.

    There is one list of them, :class:`gem_st.training.config.TrainConfig`. Options that are not given are None.
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(TrainConfig, include_extras=True)
    options = [_train_option(item, *get_args(hints[item.name])) for item in dataclasses.fields(TrainConfig)]
    function.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return function


def _train_option(item: dataclasses.Field[Any], hint: Any, help: str) -> inspect.Parameter:
    kind = next((part for part in get_args(hint) if part in (bool, int, float)), hint)
    names = {"num_gem_tokens": ("--num-gem-tokens", "-k"), "plain_ratio": ("--plain-ratio", "-p")}.get(item.name, ())
    if item.name == "training_arguments":
        kind, names = list[str], ("--training-argument", "-a")
    elif kind not in (bool, int, float):
        kind = str  # lists of names, too, with commas
    default = "" if item.default in (None, False, dataclasses.MISSING) else f" [default: {item.default}]"
    option = typer.Option(*names, help=help + default, show_default=False)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _parse_arguments(pairs: list[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE``, with values as in YAML."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise ValueError(f"--training-argument takes NAME=VALUE, got {wrong[0]!r}.")
    return {name: parse_value(value) for name, _, value in (pair.partition("=") for pair in pairs)}


@app.command()
@_train_options
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with settings; options win over it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, mask, settings and memory; train not.")
    ] = False,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Train a GEM model on a base, from data or from texts that the base writes, and report on it.

    Example: gem-st train --base HuggingFaceTB/SmolLM2-135M --self-generate 5000 --mode frozen -k 4 --steps 300
    """
    with one_line_errors(expect_any=False):
        from ..training.preview import preview, render
        from ..training.run import train as run

        options["training_arguments"] = _parse_arguments(options.pop("training_arguments") or []) or None
        settings = load_config(config, **options)
        result: Any = preview(settings) if dry_run else run(settings)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one process of several has the word
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print_result(dataclasses.asdict(result), as_json, render(result, color=color) if dry_run else str(result))
