"""Preference data in other projects' layouts: read as TRL vision rows, written from them.

    from fasttrain_data.formats import detect_format, read_pairs

    for row in read_pairs(Path("RLAIF-V.parquet")):
        row["images"], row["prompt"], row["chosen"], row["rejected"]

Every row has `id`, `images` (paths as written there, or {"bytes": ..., "path": ...}), `prompt`, `chosen` and
`rejected` as messages with content parts; other columns are kept. Log-probs that a file brings along are kept
as data under `foreign_logps`, never under the names that trainers read as reference.
"""

from fasttrain_data.formats.detect import FORMATS, detect_format
from fasttrain_data.formats.read import read_pairs

__all__ = ["FORMATS", "detect_format", "read_pairs"]
