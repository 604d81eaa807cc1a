"""What Ray's checkpoint holds in memory: each part once, and not once for each of its texts."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from ray.data.checkpoint import IdColumnCheckpointManager


def unique_rows(table: pa.Table) -> pa.Table:
    """The different rows of a table."""
    return table.group_by(table.column_names).aggregate([])


class UniquePartManager(IdColumnCheckpointManager):
    """The checkpoint names a part in every row of it."""

    def _preprocess_data_pipeline(self, checkpoint_ds: Any) -> Any:
        return checkpoint_ds.map_batches(unique_rows, batch_format="pyarrow", batch_size=None)
