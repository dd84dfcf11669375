"""Keys that are kept on disk instead of in memory."""

import sqlite3
import subprocess
import sys

import pytest

from fasttrain_data.spill import SeenKeys

_FILL = """
import hashlib, resource
from fasttrain_data.spill import SeenKeys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
seen = SeenKeys()
try:
    for number in range(300_000):
        seen.add(hashlib.sha256(str(number).encode()).hexdigest())
except OSError as error:
    print(error)
"""


def test_a_disk_without_room_is_told_and_names_the_setting():
    done = subprocess.run([sys.executable, "-c", _FILL], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("no room for temporary files (")
    assert "SQLITE_TMPDIR" in done.stdout


def test_a_spill_that_nobody_closed_closes_its_database():
    """Python 3.13 warns of one that is left open, and warnings are errors in this suite."""
    seen = SeenKeys()
    database = seen.database
    del seen
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        database.execute("SELECT 1")
