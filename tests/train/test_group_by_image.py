"""Several questions about one image in one pass: the same pairs, tokens, references and steps as question by question."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PaliGemmaConfig

from fasttrain import UserError, train_dpo, train_sft
from fasttrain.config import config_from_dict
from fasttrain.data.answer_tokens import plain
from fasttrain.data.row_index import QUESTIONS
from fasttrain.report.examples import PairReader
from fasttrain.report.runs import read_run
from fasttrain.train.dry_run import dry_run
from fasttrain.train.job import Job, build_job
from fasttrain.train.job_checks import check_recipe
from fasttrain.train.losses import PairLoss

SAME = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "entropy",
    "lengths/chosen",
    "tokens_answers",
)


@pytest.fixture
def pairs(vision_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    """27 pairs: an image with eleven questions, one with four, some with one; two pairs to some questions, some of no image."""
    path = vision_pairs(tmp_path / "data", 27, images=(1,), per_prompt=(1, 2))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    questions: dict[str, int] = {}
    for row in rows:
        number = questions.setdefault(json.dumps(row["prompt"]), len(questions))
        row["images"] = [
            "images/0.png" if number < 11 else "images/1.png" if number < 15 else f"images/{number}.png"
        ]
    for row in (rows[3], rows[-1]):  # of no image, and asked once more
        said = row["prompt"][-1]["content"][-1]["text"]
        rows.append({"prompt": said, "chosen": row["chosen"], "rejected": row["rejected"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tiny_llava: Path, pairs: Path, tmp_path: Path, fresh_cache: Path) -> Callable[..., Any]:
    def make(by: str, *overrides: str) -> Any:
        raw = {
            "model": {"name": str(tiny_llava)},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(pairs), "workers": 0, "group_by": by},
            "train": {
                "output": str(tmp_path / by), "max_steps": 3, "pairs_per_step": 100, "learning_rate": 1e-2, "warmup_ratio": 0.0,
                "schedule": "constant", "tokens_per_pack": 100_000,
            },
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, overrides)

    return make


def sequences(job: Job) -> tuple[list[Any], list[bytes]]:
    """Every pair as (image, ids and targets of both answers), and the keys of all references, in order."""
    found, keys = [], []
    for group in job.train:
        images = [ref.name() for ref in job.train.images(group.number)]
        keys += job.keys.of_group(group.prompt_ids, images, group.completion_ids)
        whole = [
            [(int(i), False) for i in group.prompt_ids] + [(int(i), s) for i, s in zip(plain(ids), ids >= 0)]
            for ids in group.completion_ids
        ]
        found += [(images, whole[chosen], whole[rejected]) for chosen, rejected in group.pairs.tolist()]
    return sorted(found), sorted(keys)


def test_questions_about_one_image_are_a_group_with_the_tokens_and_keys_they_have_apart(
    recipe: Callable[..., Any],
) -> None:
    jobs = [build_job(recipe(by)) for by in ("prompt", "image")]
    (apart, keys), (together, same) = (sequences(job) for job in jobs)
    assert together == apart and same == keys
    one, other = (job.train.account for job in jobs)
    assert (one.pairs, other.pairs) == (29, 29) and other.groups < one.groups
    prompts = [len({json.dumps(ids.tolist()) for ids in group.completion_ids}) for group in jobs[1].train]
    assert max(prompts) > 4
    token = jobs[1].chat.image_token_id
    for group in jobs[1].train:  # the image is before what differs, and as many questions follow it as may
        asked = {tuple(ids[: int((ids >= 0).argmax())].tolist()) for ids in group.completion_ids}
        assert len(asked) <= QUESTIONS and not any(
            (plain(ids) == token).any() for ids in group.completion_ids
        )
    for job in jobs:
        job.close()


@pytest.mark.parametrize(
    "change",
    [
        "train.share_prefix=false",
        "train.tokens_per_pack=200",
        "train.gradient_checkpointing=true",
        "loss.kind=ipo",
    ],
)
def test_steps_are_those_of_questions_run_apart(recipe: Callable[..., Any], change: str) -> None:
    apart = train_dpo(recipe("prompt", change)).metrics
    together = train_dpo(recipe("image", change)).metrics
    for a, b in zip(together, apart, strict=True):
        for name in SAME[: -1 if "pack" in change else None]:  # a group that is split runs twice
            assert a[name] == pytest.approx(b[name], rel=1e-5 if a["step"] == 1 else 2e-4, abs=1e-4), name
    if "share" not in change and "pack" not in change:
        assert 2 * together[0]["tokens_images"] < apart[0]["tokens_images"]


def test_references_of_questions_run_apart_are_found_and_moved_pairs_are_shown(
    recipe: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train_dpo(recipe("prompt"))
    capsys.readouterr()
    folder = train_dpo(recipe("image")).folder
    assert " 0 computed now" in capsys.readouterr().err
    reader = PairReader(read_run(folder))
    rows = [json.loads(line) for line in (folder / "pair_changes.jsonl").read_text().splitlines()]
    shown = {reader.pair_of_prompt(row, place)[0].where for row, place, *_ in rows[0]["pairs"]}
    assert len(shown) == len(rows[0]["pairs"]) > 4


def test_a_dry_run_shows_the_question_as_given_and_the_answer_as_scored(recipe: Callable[..., Any]) -> None:
    config = recipe("image")
    told = dry_run(config, PairLoss(config.loss), resume=False, overwrite=False)
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in told.splitlines() if " " in line.strip()}
    assert "[[" not in lines["prompt"] and lines["prompt"].count("<image>") == 1
    for name in ("chosen", "rejected"):
        given, scored = lines[name].split(" [[")
        assert "?" in given and "?" not in scored and scored.endswith("</s>']]")


def test_the_report_shows_the_pairs_of_a_group_though_those_of_another_stand_between_them(
    recipe: Callable[..., Any], pairs: Path, tmp_path: Path
) -> None:
    """Eleven questions, each asked again of a copy of the image, are groups of eight and of three."""
    said = next(json.loads(line) for line in pairs.read_text().splitlines())
    (tmp_path / "data/images/copy.png").write_bytes((tmp_path / "data/images/0.png").read_bytes())
    rows = [
        {**said, "images": [f"images/{name}.png"], "prompt": f"what is {n}?", "chosen": f"{n} of {name}"}
        for name in ("0", "copy")
        for n in range(11)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = PairReader(read_run(train_dpo(recipe("image")).folder))
    for first, asked in ((0, range(8)), (8, range(8, 11))):
        shown = [reader.pair_of_prompt(first, place)[0].chosen for place in range(2 * len(asked))]
        assert shown == [f"{n} of {name}" for name in ("0", "copy") for n in asked]
        assert reader.pair_of_prompt(first, 2 * len(asked)) == (None, "is not in the file any more")


def test_answers_to_learn_about_one_image_are_learned_together(recipe: Callable[..., Any]) -> None:
    together, apart = (train_sft(recipe(by)).metrics for by in ("image", "prompt"))
    for a, b in zip(together, apart, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if a["step"] == 1 else 2e-4)
        assert 2 * a["tokens_images"] < b["tokens_images"]


def test_a_model_whose_images_see_the_question_is_refused() -> None:
    config = config_from_dict({"data": {"train": "x", "group_by": "image"}, "model": {"name": "x"}})
    with pytest.raises(UserError, match=r"data.group_by: wanted prompt for a model of type paligemma"):
        check_recipe(config, PaliGemmaConfig(), torch.float32, 1)
