"""What a launcher, or a person in its place, says in the environment: taken whole, or told by name."""

from __future__ import annotations

import os
import re
import socket

import pytest

from fasttrain.ending import _fail
from fasttrain.errors import UserError
from fasttrain.ranks import _own_gpu, launched, start_ranks
from fasttrain.train.zero_engine import alone_as_a_rank

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test writes is taken back
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: wanted a number in the environment, got 'two'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE is 2 but MASTER_PORT is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK: wanted below WORLD_SIZE, which is 2, got 2",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "http"},
            "MASTER_PORT: wanted a number in the environment, got 'http'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "65536"},
            "MASTER_PORT: wanted a port, at most 65535, got 65536",
        ),
    ],
)
def test_ranks_that_could_not_meet_are_told(said: dict[str, str], message: str) -> None:
    os.environ.update(said)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        launched()


@pytest.mark.parametrize(
    ("said", "devices", "message"),
    [
        ({}, 8, "which of the 8 GPUs here is this process's, got none: start with torchrun, or set it"),
        (
            {"LOCAL_RANK": "3"},
            1,
            "wanted below 1, as each process has a GPU of its own and 1 are here, got 3; let every",
        ),
    ],
)
def test_a_rank_without_a_gpu_of_its_own_is_told_before_it_takes_anothers(
    said: dict[str, str], devices: int, message: str
) -> None:
    """All ranks would have loaded their models on the first GPU, and NCCL would have refused to sum gradients there."""
    os.environ.update(said)
    with pytest.raises(UserError, match=f"^LOCAL_RANK: .*{re.escape(message)}"):
        _own_gpu(devices)


@pytest.mark.parametrize(("said", "devices"), [({}, 1), ({"LOCAL_RANK": "0"}, 8)])
def test_a_rank_may_see_one_gpu_only(said: dict[str, str], devices: int) -> None:
    os.environ.update(said)
    assert _own_gpu(devices) == 0


def test_a_port_that_another_run_has_is_the_machines_failure() -> None:
    """In one line, not in a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        os.environ.update(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(
            OSError, match=rf"^the ranks cannot meet at 127.0.0.1:{port} .*address already in use"
        ):
            start_ranks()


@pytest.mark.parametrize(
    ("left", "code", "told"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1"}, 2, True),  # of a launcher that is gone: nobody else would say it
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}, 2, True),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1, True),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}, 2, True),
    ],
)
def test_a_mistake_is_told_by_the_first_of_a_machine_and_a_failure_by_whom_it_hits(
    left: dict[str, str], code: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ.update(left)
    with pytest.raises(SystemExit):
        _fail("a word", code)
    assert capsys.readouterr().err == ("fasttrain: error: a word\n" if told else "")


@pytest.mark.parametrize("said", [{}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_is_a_group_whatever_is_left_in_the_environment(said: dict[str, str]) -> None:
    os.environ.update(said)
    assert launched() == 1
    alone_as_a_rank()
    assert [os.environ[name] for name in NAMES[:4]] == ["1", "0", "0", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 0


def test_what_torchrun_says_to_one_process_stands() -> None:
    said = dict(zip(NAMES, ("1", "0", "0", "gpu07", "29500"), strict=True))
    os.environ.update(said)
    alone_as_a_rank()
    assert {name: os.environ[name] for name in NAMES} == said
