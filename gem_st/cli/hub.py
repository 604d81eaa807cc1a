"""`gem-st export`, `verify`, `push` and `info`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .common import AsJson, Dtype, Revision, Source, Token, Trust, app, one_line_errors, print_result


class Format(str, Enum):
    """Formats of an export."""

    gem = "gem"
    stock = "stock"
    alora = "alora"


@app.command()
def export(
    model: Source,
    path: Annotated[Path, typer.Argument(help="Folder to write; new, or empty.")],
    format: Annotated[
        Format,
        typer.Option(
            help="gem: for every model. stock: no remote code, for K = 1 in full mode. alora: what llama.cpp loads "
            "beside --gguf, for K = 1 beside a frozen base."
        ),
    ] = Format.gem,
    gguf: Annotated[Path | None, typer.Option(help="GGUF file of the base, for --format alora.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA on every token into the weights first.")] = False,
    dtype: Dtype = "auto",
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with reference vectors in it, which `verify` checks.

    Example: gem-st export runs/demo/full exported --format gem
    """
    with one_line_errors():
        from .. import hub
        from ..modeling.gem_files import is_local
        from ..modeling.gem_gguf import split_gguf

        hub.require_new(path)  # before a large model is loaded
        base = hub.info(model, revision=revision, token=token)["base_model"] if gguf else None
        has_moved = base is not None and split_gguf(base)[1] and is_local(base) and not Path(base).exists()
        loaded: Any = hub.load(
            model,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": dtype, **({"gguf_file": str(gguf)} if has_moved else {})},
        )
        if merge:
            from ..training.lora import merge_lora

            merge_lora(loaded)
        folder = hub.export(loaded, path, format=format.value, gguf=gguf)
    then = f"How to serve it: {folder}/README.md" if gguf else f"Check it: gem-st verify {folder}"
    print_result({"path": str(folder), "format": format.value}, as_json, f"Written to {folder}. {then}")


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
    with one_line_errors():
        from .. import hub

        result = hub.verify(model, revision=revision, token=token, trust_remote_code=trust_remote_code, device=device)
    print_result(result.to_dict(), as_json, str(result))
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
    with one_line_errors():
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
    print_result({"url": url}, as_json, f"{url}\nCheck it: {check}")


@app.command()
def info(model: Source, revision: Revision = None, token: Token = None, as_json: AsJson = False) -> None:
    """Show a checkpoint's settings, from its small files alone; none of its code runs.

    Example: gem-st info org/gem-llama-8b --json
    """
    with one_line_errors():
        from .. import hub

        result = hub.info(model, revision=revision, token=token)
    print_result(result, as_json)
