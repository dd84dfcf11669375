"""The whole way of the data by commands: questions, completions, annotations, pairs, and the trainer's reader."""

import json

from fasttrain_data.formats import read_pairs
from fasttrain_data.gemini_double import GeminiDouble


def judge(question, images, answers):
    """Likes answers with many different words; the same answer always gets the same scores."""
    scores = []
    for answer in answers:
        level = min(4, len(set(answer.split())) // 2)
        scores.append(
            {"helpfulness": level, "correctness": level, "coherence": level, "complexity": 1, "verbosity": 1}
        )
    return scores


def test_the_commands_lead_from_images_and_questions_to_pairs_the_trainer_reads(
    tmp_path, tiny_llava, tiny_models, write_rows, read_rows, command, monkeypatch
):
    names = [tiny_models.draw_image(tmp_path / "img" / f"{n}.png", n).relative_to(tmp_path) for n in range(6)]
    rows = [
        {"image": str(name), "question": f"<image>\nwhat is the value of {n}?"}
        for n, name in enumerate(names)
    ]
    source = write_rows(tmp_path / "source.jsonl", [*rows, rows[0]])
    questions, completions, annotations, pairs = (
        tmp_path / f"{name}.jsonl" for name in ("questions", "completions", "annotations", "pairs")
    )
    assert command("questions", source, "-o", questions)[0] == 0
    code, _, stderr = command(
        "complete",
        questions,
        "-o",
        completions,
        "-m",
        tiny_llava,
        "--max-new-tokens",
        "12",
        "--temperature",
        "1.1",
    )
    assert code == 0, stderr
    with GeminiDouble(judge) as double:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", double.url)
        monkeypatch.setenv("GEMINI_API_KEY", double.api_key)
        assert command("annotate", completions, "-o", annotations, "--model", "gemini-x")[0] == 0
        assert len(double.calls) == 6
    code, stdout, _ = command("pair", annotations, "-o", pairs, "--rejected", "all")
    assert code == 0
    made = read_rows(pairs)
    assert f"{len(made):,} pairs of 6 prompts" in stdout
    texts = {row["id"]: row["text"] for row in read_rows(completions)}
    for pair in made:
        good, bad = pair["chosen"][0]["content"][0]["text"], pair["rejected"][0]["content"][0]["text"]
        assert (texts[pair["chosen_id"]], texts[pair["rejected_id"]]) == (good, bad)
        assert (
            3 * (min(4, len(set(good.split())) // 2) - min(4, len(set(bad.split())) // 2))
            == pair["margin"]
            >= 2
        )
        assert (tmp_path / pair["images"][0]).is_file()

    from fasttrain.data.pairs import check_images, read_pair

    for row in (*made, *read_pairs(pairs)):
        read = read_pair(json.loads(json.dumps(row)), "pairs.jsonl", tmp_path)
        check_images(read)
        assert len(read.images) == 1
