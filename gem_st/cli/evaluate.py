"""`gem-st eval`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Dtype, Revision, Token, Trust, app, one_line_errors, print_result, split_names


def _names(value: str | None) -> list[str] | None:
    """A list with commas; ``none`` for an empty one."""
    if value is None:
        return None
    return [] if value == "none" else split_names(value)


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
    dtype: Dtype = "auto",
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
    with one_line_errors(expect_any=False):
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
    print_result(results.to_dict(), as_json, f"{render_row(results)}\nAll results: {config.folder}")
    if results.errors:
        typer.secho("Some tasks failed; the same command tries them again.", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)
