"""The chain from charts to pairs: what its files hold, which key is sent where, what is said without the SDK."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fasttrain.demo.chart_files import write_questions
from fasttrain.demo.preference_data import PreferenceData, make_preference_data
from fasttrain.demo.run import MODEL
from fasttrain_data.gemini_double import GeminiDouble
from fasttrain_data.records import ATTRIBUTES

PROMPTS, SEED = 24, 3


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make(folder: Path) -> tuple[PreferenceData, list[str]]:
    lines: list[str] = []
    held_out = write_questions(folder / "held_out", 8, SEED, "held_out")
    data = make_preference_data(
        folder / "data", MODEL, held_out, prompts=PROMPTS, seed=SEED, echo=lines.append
    )
    return data, lines


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreferenceData, Path, str]:
    folder = tmp_path_factory.mktemp("chain")
    data, lines = make(folder)
    return data, folder / "data", "\n".join(lines)


def test_every_stage_leaves_its_file_and_the_counts_are_those_of_the_files(
    made: tuple[PreferenceData, Path, str],
) -> None:
    data, folder, text = made
    assert len(rows(folder / "questions.jsonl")) == data.questions == PROMPTS
    completions = rows(folder / "completions.jsonl")
    assert len(completions) == data.completions
    assert sum(row["count"] for row in completions) == data.samples == 4 * PROMPTS
    assert {row["temperature"] for row in completions} == {0.7}
    assert len(rows(folder / "annotations.jsonl")) == data.annotated == PROMPTS
    pairs = rows(data.pairs_file)
    assert data.pairs_file == folder / "pairs.jsonl"
    assert len(pairs) == data.pairs == data.paired_questions > PROMPTS / 4
    skipped = rows(folder / "pairs.skipped.jsonl")
    assert data.paired_questions + len(skipped) == PROMPTS
    for count in (data.questions, data.samples, data.completions, data.annotated, data.pairs):
        assert f"{count:,} " in text


def test_pairs_prefer_the_charts_truth(made: tuple[PreferenceData, Path, str]) -> None:
    """The charts' own file holds the right answers; the annotations and pairs are compared with that."""
    _, folder, _ = made
    truth = {
        row["image"].removeprefix("images/"): row["answer"] for row in rows(folder / "charts/questions.jsonl")
    }
    mended = 0
    for pair in rows(folder / "pairs.jsonl"):
        right = truth[Path(pair["images"][0]).name]
        chosen, rejected = (pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        assert rejected != right
        assert pair["margin"] >= 2
        assert (folder / pair["images"][0]).is_file()
        mended += chosen == right
    assert mended == len(rows(folder / "pairs.jsonl"))


def test_the_same_seed_makes_the_same_pairs(made: tuple[PreferenceData, Path, str], tmp_path: Path) -> None:
    data, _ = make(tmp_path)
    assert [row["id"] for row in rows(data.pairs_file)] == [row["id"] for row in rows(made[0].pairs_file)]


def test_charts_of_the_held_out_file_are_left_out(tmp_path: Path) -> None:
    held_out = write_questions(
        tmp_path / "held_out", PROMPTS // 2, SEED, "train"
    )  # half the charts, on purpose
    lines: list[str] = []
    data = make_preference_data(
        tmp_path / "data", MODEL, held_out, prompts=PROMPTS, seed=SEED, echo=lines.append
    )
    assert data.questions == PROMPTS // 2
    assert f"{PROMPTS // 2} kept" in lines[0]
    used = {row["source_id"] for row in rows(tmp_path / "data" / "questions.jsonl")}
    assert not used & {row["id"] for row in rows(held_out)}


class _Watched(GeminiDouble):
    """Keeps what it was sent: the key of every request and the address it was bound to."""

    seen: list[tuple[str, str]] = []

    def start(self) -> GeminiDouble:
        handler = self._server.RequestHandlerClass
        serve = handler.do_POST  # type: ignore[attr-defined]

        def watched(request: Any) -> None:
            self.seen.append((request.headers["x-goog-api-key"], self._server.server_address[0]))
            serve(request)

        handler.do_POST = watched  # type: ignore[attr-defined]
        return super().start()


def test_the_users_keys_servers_and_proxies_are_neither_used_nor_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {
        "GEMINI_API_KEY": "my-real-key",
        "GOOGLE_API_KEY": "my-other-key",
        "GOOGLE_GEMINI_BASE_URL": "http://127.0.0.1:9",
        "GOOGLE_GENAI_USE_VERTEXAI": "true",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "ALL_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "example.org",
    }
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    before = dict(os.environ)
    _Watched.seen.clear()
    monkeypatch.setattr("fasttrain.demo.preference_data.GeminiDouble", _Watched)
    data, _ = make(tmp_path)
    assert data.annotated == PROMPTS
    assert len(_Watched.seen) == PROMPTS
    assert set(_Watched.seen) == {("double-key", "127.0.0.1")}
    assert dict(os.environ) == before
    written = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("*.jsonl"))
    assert b"my-real-key" not in written and b"my-other-key" not in written


def test_without_the_sdk_the_judge_is_asked_directly_with_the_same_scores_and_it_is_said(
    made: tuple[PreferenceData, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.genai", None)  # `from google import genai` then fails
    import google

    monkeypatch.delattr(google, "genai", raising=False)
    data, lines = make(tmp_path)
    assert data.sdk is None and made[0].sdk is not None
    assert sum("google-genai is not installed" in line for line in lines) == 1
    assert any("without any call" in line for line in lines)
    scored = [
        [[answer[name] for name in ("text", *ATTRIBUTES)] for answer in row["completions"]]
        for row in rows(tmp_path / "data" / "annotations.jsonl")
    ]
    assert scored == [
        [[answer[name] for name in ("text", *ATTRIBUTES)] for answer in row["completions"]]
        for row in rows(made[1] / "annotations.jsonl")
    ]
    assert all(
        "sdk" not in row and "calls" not in row for row in rows(tmp_path / "data" / "annotations.jsonl")
    )
    assert [row["id"] for row in rows(data.pairs_file)] == [row["id"] for row in rows(made[0].pairs_file)]
