"""What the commands set before torch is imported: whose memory grows, and whose remarks are heard."""

from __future__ import annotations

import logging
import os
import platform
import sys

import pytest

from fasttrain import cli


def test_what_deepspeed_remarks_does_not_stand_among_results() -> None:
    cli._prepare_torch()
    logger = logging.getLogger("DeepSpeed")  # its handler writes to stdout
    told = [
        level
        for level in (logging.INFO, logging.WARNING, logging.ERROR)
        if logger.filter(logging.makeLogRecord({"levelno": level}))
    ]
    assert told == [logging.ERROR]


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no such memory elsewhere")
@pytest.mark.parametrize("told", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise(
    told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
    if told:
        os.environ[told] = "max_split_size_mb:512"
    cli._prepare_torch()
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == (
        {told: "max_split_size_mb:512"} if told else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no such memory elsewhere")
@pytest.mark.parametrize("release", ["5.15.90.1-microsoft-standard-WSL2", "5.15.148-tegra"])
def test_gpu_memory_stays_as_it_is_where_the_driver_cannot_grow_it(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if "ALLOC_CONF" not in k})
    monkeypatch.setattr(platform, "release", lambda: release)
    cli._prepare_torch()
    assert not any("ALLOC_CONF" in name for name in os.environ)
