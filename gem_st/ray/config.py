"""Settings of a run, and the names of what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .parts import Columns

PRECISIONS = ("float32", "float16", "int8", "binary")
BATCH_TOKENS = 8192
ROWS_PER_PART = 2048
VECTORS, LANCE, REPORT, FINGERPRINT = "vectors", "vectors.lance", "report.jsonl", "fingerprint.json"
PLAN, DONE, REPORTS, WARNINGS = "plan.parquet", "done", "reports", "warnings"
"""What lies in ``work``, beside copies of data."""
NULL, EMPTY, TOO_LONG = "null", "empty", "too long"


@dataclass
class EncodeConfig:
    """Settings of a run.

    Attributes:
        checkpoint: Folder or Hub id of a model.
        data: A parquet, jsonl or csv file, a folder of such files, or the Hub id of a data set.
        output: Folder of the vectors, which every machine must see.
        subset: Configuration of a data set of the Hub that has several.
        split: Split of a data set.
        columns: Columns to keep beside id and vector.
        format: ``"parquet"``, or ``"lance"`` for a Lance data set beside it.
        rows_per_part: Texts that are read, embedded and written as one.
        limit: Texts to embed, from the first.
        num_actors: Copies of the model; by default one for each GPU; without any, one for four CPUs of this machine,
            or for each CPU of a cluster but three.
        gpus_per_actor: By default 1 where there are GPUs.
        address: Of a cluster; by default Ray is started here, and ends with the run.
        token: Hub token.

    The others are those of :class:`gem_st.ray.Encoder`.
    """

    checkpoint: str
    data: str
    output: Path
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"
    id_column: str = "id"
    columns: tuple[str, ...] = ()
    prompt_name: str | None = None
    precision: str = "float32"
    truncate_dim: int | None = None
    batch_tokens: int = BATCH_TOKENS
    format: str = "parquet"
    rows_per_part: int = ROWS_PER_PART
    limit: int | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None
    address: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False

    def check(self) -> None:
        """Raise ValueError or ImportError if something is out of range or not installed."""
        check_options(self.precision, self.batch_tokens, self.truncate_dim)
        if self.format not in ("parquet", "lance"):
            raise ValueError(f"format must be 'parquet' or 'lance', got {self.format!r}.")
        for name in ("rows_per_part", "limit", "num_actors"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}.")
        if find_spec("ray") is None:
            raise ImportError("ray is not installed: pip install 'gem-st[ray]'")
        if self.has_lance and find_spec("lance") is None:
            raise ImportError("A Lance data set needs the package pylance: pip install 'gem-st[lance]'")
        if named := [name for name in self.output.resolve().parts if "=" in name]:
            raise ValueError(
                f"Readers of parquet take a folder {named[0]!r} for a column and its value. Choose another --output."
            )

    @property
    def has_lance(self) -> bool:
        """True if there is to be a Lance data set, or is one, which would be without the new rows."""
        return self.format == "lance" or (self.output / LANCE).exists()

    @property
    def place(self) -> str:
        """The checkpoint, under the name that other machines and folders know it by."""
        return str(Path(self.checkpoint).resolve()) if Path(self.checkpoint).is_dir() else str(self.checkpoint)

    @property
    def names(self) -> Columns:
        """The columns that are read."""
        return Columns(self.text_column, self.id_column, self.columns)

    @property
    def work(self) -> Path:
        """Folder of what a run needs to go on: the plan, Ray's checkpoint, copies of data."""
        return self.output / "work"

    def encoder_options(self) -> dict[str, Any]:
        """Arguments of :class:`Encoder`."""
        same = ["text_column", "id_column", "columns", "prompt_name", "precision", "truncate_dim", "batch_tokens"]
        same += ["dtype", "revision", "token", "trust_remote_code"]
        return {"checkpoint": self.place, **{name: getattr(self, name) for name in same}}


def check_options(precision: str, batch_tokens: int, truncate_dim: int | None) -> None:
    """Raise ValueError if an option is out of its range."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    if batch_tokens < 1 or (truncate_dim is not None and truncate_dim < 1):
        raise ValueError(f"batch_tokens and truncate_dim must be 1 or more, got {batch_tokens} and {truncate_dim}.")
