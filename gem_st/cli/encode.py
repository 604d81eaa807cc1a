"""`gem-st encode`."""

from __future__ import annotations

from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Dtype, Revision, Token, Trust, app, one_line_errors, print_result, split_names


class Precision(str, Enum):
    """Precisions of vectors."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"
    binary = "binary"


class Format(str, Enum):
    """Formats of vectors."""

    parquet = "parquet"
    lance = "lance"


@app.command()
def encode(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Folder or Hub id of a model.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="parquet, jsonl or csv file, folder of such, or Hub id of a data set.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the vectors, which all machines see.")] = None,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    id_column: Annotated[str, typer.Option(help="Column that says which text is which.")] = "id",
    columns: Annotated[str, typer.Option(help="Columns to keep beside id and vector, with commas.")] = "",
    subset: Annotated[str | None, typer.Option(help="Configuration of a data set of the Hub that has several.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set of the Hub.")] = "train",
    prompt_name: Annotated[
        str | None, typer.Option(help="Prompt of the model; by default that of documents, if there is one.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of the vectors.")] = Precision.float32,
    truncate_dim: Annotated[int | None, typer.Option(help="Elements of each vector to keep.")] = None,
    format: Annotated[Format, typer.Option(help="lance: a Lance data set beside the parquet files.")] = Format.parquet,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 8192,
    rows_per_part: Annotated[int, typer.Option(help="Texts that are read, embedded and written as one.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Texts to embed, from the first.")] = None,
    num_actors: Annotated[
        int | None,
        typer.Option(help="Copies of the model; by default one a GPU, or four CPUs here, or CPU of a cluster."),
    ] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="GPUs of each; by default 1 where there are any.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster, or auto; by default Ray runs here.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan, memory and time, by a sample.")] = False,
    verify: Annotated[Path | None, typer.Option(metavar="DIR", help="Check the vectors of a run instead.")] = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Embed a corpus on Ray Data, on this machine or on a cluster; the same command goes on where it was.

    Example: gem-st encode runs/demo/frozen --data corpus.parquet --output vectors --num-actors 2
    """
    say = partial(typer.echo, err=True)
    with one_line_errors():
        from .. import ray

        if verify is not None:
            checked = ray.verify(verify, token=token, trust_remote_code=trust_remote_code)
            result, text = checked.to_dict(), str(checked)
        elif checkpoint is None or data is None or output is None:
            raise ValueError("Give CHECKPOINT, --data and --output; or --verify DIR.")
        else:
            config = ray.EncodeConfig(
                checkpoint=checkpoint,
                data=data,
                output=output,
                subset=subset,
                split=split,
                text_column=text_column,
                id_column=id_column,
                columns=tuple(split_names(columns)),
                prompt_name=prompt_name,
                precision=precision.value,
                truncate_dim=truncate_dim,
                batch_tokens=batch_tokens,
                format=format.value,
                rows_per_part=rows_per_part,
                limit=limit,
                num_actors=num_actors,
                gpus_per_actor=gpus_per_actor,
                address=address,
                dtype=dtype,
                revision=revision,
                token=token,
                trust_remote_code=trust_remote_code,
            )
            if dry_run:
                result, text = ray.preview(config, say=say), None
            else:
                done = ray.encode(config, say=say)
                result, text = vars(done), str(done)
    print_result(result, as_json, text)
    raise typer.Exit(0 if result.get("passed", True) else 1)
