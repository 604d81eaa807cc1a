"""`gem-st serve`."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated

import typer
from packaging.version import Version

from .common import Dtype, Revision, Token, Trust, app, one_line_errors

NEEDED = ("fastapi", "openai", "prometheus_client", "uvicorn")
OLDEST_TRANSFORMERS = "5.20"


def check_packages() -> None:
    """Raise ImportError if what only the server needs is missing, or too old."""
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise ImportError(f"{', '.join(missing)} is not installed: pip install 'gem-st[serve]'")
    found = version("transformers")
    if Version(found) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"gem-st serve needs transformers {OLDEST_TRANSFORMERS} or later, not {found}: "
            f"pip install -U 'transformers[serving]>={OLDEST_TRANSFORMERS}'"
        )


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder of a GEM checkpoint, or its Hub id.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GEM_ST_API_KEY", help="Key that clients have to send."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model [default: Hub id, or folder's name].")] = None,
    cache_gib: Annotated[float, typer.Option(help="Memory for conversations that have been read.")] = 1.0,
    max_queue: Annotated[int, typer.Option(help="Requests that are answered or wait at once.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch of embeddings.")] = 4096,
    embed_slice_ms: Annotated[float, typer.Option(help="Time for embeddings between two decoding steps.")] = 50.0,
    allow_truncate: Annotated[bool, typer.Option("--allow-truncate", help="Give vectors of fewer dimensions.")] = False,
    allow_token_ids: Annotated[bool, typer.Option("--allow-token-ids", help="Embed token ids, too.")] = False,
    continuous_batching: Annotated[bool, typer.Option("--continuous-batching", help="Write answers together.")] = False,
    drain_seconds: Annotated[int, typer.Option(help="Time to finish requests when told to stop.")] = 60,
    dtype: Dtype = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run, e.g. cuda.")] = None,
    revision: Revision = None,
    token: Token = None,
    trust_remote_code: Trust = False,
) -> None:
    """Chat and embed from one copy of the weights, for clients of OpenAI's API.

    Example: gem-st serve runs/demo/frozen --port 8000
    """
    with one_line_errors(expect_any=False):
        check_packages()
        from ..serving.run import ServeConfig
        from ..serving.run import serve as run

        config = ServeConfig(
            checkpoint=checkpoint,
            host=host,
            port=port,
            api_key=api_key,
            name=name,
            cache_gib=cache_gib,
            max_queue=max_queue,
            batch_tokens=batch_tokens,
            embed_slice_ms=embed_slice_ms,
            allow_truncate=allow_truncate,
            allow_token_ids=allow_token_ids,
            continuous_batching=continuous_batching,
            drain_seconds=drain_seconds,
            dtype=dtype,
            device=device,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
        )
        run(config)
