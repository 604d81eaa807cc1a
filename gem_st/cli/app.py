"""The `gem-st` command: each command calls one function of the library and prints what it returns."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from .._version import __version__
from ..training.config import TrainConfig, load_config, parse_value

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # they may hold a token
    context_settings={"help_option_names": ["-h", "--help"]},
    help="GEM for Sentence Transformers: one LLM that embeds text and keeps generating.",
)

Source = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or its Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
Token = Annotated[str | None, typer.Option(help="Hub token; that of `hf auth login` by default.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of a checkpoint that is not this gem_st's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Format(str, Enum):
    """Formats of an export."""

    gem = "gem"
    stock = "stock"


@contextmanager
def _one_line_errors(*, expect_any: bool = True) -> Iterator[None]:
    """Print an error as one line, and exit with status 1; one that is not foreseen too, unless asked otherwise."""
    try:
        yield
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        message = str(error)
        cause: Exception = error
    except Exception as error:  # of a broken checkpoint, say
        if not expect_any:
            raise
        message, cause = f"{type(error).__name__}: {error}", error
    else:
        return
    typer.secho(f"gem-st: {' '.join(message.split())}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1) from cause


def _print(result: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    lines = (f"{name:<22}{value}" for name, value in result.items() if value not in (None, {}, []))
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=str) if as_json else text or "\n".join(lines))


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"gem-st {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)] = False,
) -> None:
    """GEM for Sentence Transformers: one LLM that embeds text and keeps generating."""


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
    with _one_line_errors(expect_any=False):
        from ..training.preview import preview, render
        from ..training.run import train as run

        options["training_arguments"] = _parse_arguments(options.pop("training_arguments") or []) or None
        settings = load_config(config, **options)
        result: Any = preview(settings) if dry_run else run(settings)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one process of several has the word
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    _print(dataclasses.asdict(result), as_json, render(result, color=color) if dry_run else str(result))


def _names(value: str | None) -> list[str] | None:
    """A list with commas; ``none`` for an empty one."""
    if value is None:
        return None
    return [] if value == "none" else [name.strip() for name in value.split(",") if name.strip()]


@app.command(name="eval")
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a GEM checkpoint, or another embedder."),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="Base to compare with, or none; by default that which the checkpoint names."),
    ] = None,
    compare: Annotated[
        str,
        typer.Option(help="What to make of the base, with commas. The first is the table's."),
    ] = "mean,lasttoken,echo",
    suite: Annotated[
        str, typer.Option(help="paper, mteb-eng-v1, mteb-eng-v2, smoke, or a YAML file of local tasks.")
    ] = "paper",
    knowledge: Annotated[
        str | None,
        typer.Option(help="Generation tasks instead of the suite's: mmlu,arc_easy,..., or none."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of results [default: runs/eval/NAME].")] = None,
    health: Annotated[bool, typer.Option("--health", help="Examine the vectors, too.")] = False,
    limit: Annotated[int | None, typer.Option(help="Rows of each task, of MMLU questions of each subject.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a forward pass; halved where memory runs out.")] = 32,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Write into the checkpoint's README.md.")] = True,
    dtype: Annotated[str, typer.Option(help="Data type to load in, e.g. float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda.")] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a checkpoint and its base: embeddings by mteb, generation by lm-eval, and what was retained.

    What is done is in the output folder; the same command goes on from there.

    Example: gem-st eval runs/demo/frozen --suite tasks.yaml --health
    """
    with _one_line_errors(expect_any=False):
        from ..evaluation.render import render_row
        from ..evaluation.run import EvalConfig
        from ..evaluation.run import evaluate as run

        config = EvalConfig(
            checkpoint=checkpoint,
            baseline=baseline,
            compare=_names(compare) or [],
            suite=suite,
            knowledge=_names(knowledge),
            output=None if output is None else str(output),
            health=health,
            limit=limit,
            batch_size=batch_size,
            card=card,
            dtype=dtype,
            device=device,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        results = run(config, progress=partial(typer.echo, err=True))
    _print(results.to_dict(), as_json, f"{render_row(results)}\nAll results: {config.folder}")
    if results.errors:
        typer.secho("Some tasks failed; the same command tries them again.", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)


@app.command()
def export(
    model: Source,
    path: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    format: Annotated[
        Format, typer.Option(help="gem: for every model. stock: no remote code, for K = 1 in full mode.")
    ] = Format.gem,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA on every token into the weights first.")] = False,
    dtype: Annotated[str, typer.Option(help="Data type to load in, e.g. float32.")] = "auto",
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with reference vectors in it, which `verify` checks.

    Example: gem-st export runs/demo/full exported --format gem
    """
    with _one_line_errors():
        from .. import hub

        hub.require_new(path)  # before a large model is loaded
        loaded: Any = hub.load(
            model,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": dtype},
        )
        if merge:
            from ..training.lora import merge_lora

            merge_lora(loaded)
        folder = hub.export(loaded, path, format=format.value)
    _print(
        {"path": str(folder), "format": format.value}, as_json, f"Written to {folder}. Check it: gem-st verify {folder}"
    )


@app.command()
def verify(
    model: Source,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    device: Annotated[str, typer.Option(help="Where to load it.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check that a checkpoint is whole, and gives the vectors and logits it gave when it was exported.

    Example: gem-st verify org/gem-llama-8b --revision main
    """
    with _one_line_errors():
        from .. import hub

        result = hub.verify(model, revision=revision, token=token, trust_remote_code=trust_remote_code, device=device)
    _print(result.to_dict(), as_json, str(result))
    raise typer.Exit(0 if result.passed else 1)


@app.command()
def push(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; made if there is none.")],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Update a repository that holds files.")] = False,
    replace_model_card: Annotated[bool, typer.Option("--replace-model-card", help="Replace its card, too.")] = False,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Add GEM checkpoint",
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none.")] = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint with reference vectors in it, in one commit.

    Example: gem-st push runs/demo/frozen org/gem-base-8m --private
    """
    with _one_line_errors():
        from .. import hub

        url = hub.push(
            Path(model),
            repo_id,
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            exist_ok=exist_ok,
            replace_model_card=replace_model_card,
            commit_message=message,
            trust_remote_code=trust_remote_code,
        )
    where = f"refs/pr/{url.rpartition('/')[2]}" if create_pr else revision
    check = f"gem-st verify {repo_id}{f' --revision {where}' if where else ''}"
    _print({"url": url}, as_json, f"{url}\nCheck it: {check}")


@app.command()
def info(model: Source, revision: Revision = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show a checkpoint's settings, from its small files alone; none of its code runs.

    Example: gem-st info org/gem-llama-8b --json
    """
    with _one_line_errors():
        from .. import hub

        result = hub.info(model, revision=revision, token=token)
    _print(result, as_json)


if __name__ == "__main__":
    app()
