"""What all commands of `gem-st` share: the application, options, errors in one line, and printing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .._version import __version__

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
Dtype = Annotated[str, typer.Option(help="Data type to load in, e.g. float32.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code of a checkpoint that is not this gem_st's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def one_line_errors(*, expect_any: bool = True) -> Iterator[None]:
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


def split_names(value: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in value.split(",") if name.strip()]


def print_result(result: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """Print what a command returns: as JSON, as the text given, or a line for each entry that says something."""
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
