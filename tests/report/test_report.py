"""The report page tells what the run folder holds, stands alone, and shows whatever stands in the data inert."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttrain import cli
from fasttrain.errors import UserError
from fasttrain.report import read_run, read_runs, write_report
from fasttrain.report.examples import PairReader, example_parts
from fasttrain.report.panels import PANELS, panels_of
from fasttrain.report.runs import Run


def line(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "epoch": step / 4, "loss": 0.7 - 0.1 * step, "rewards/chosen": 0.1 * step,
        "rewards/rejected": -0.2 * step, "rewards/margins": 0.3 * step, "rewards/accuracies": 0.25 * step,
        "logps/chosen": -10.0, "logps/rejected": -20.0, "grad_norm": 1.5, "learning_rate": 1e-4, "pairs": 8, "tokens": 100,
        "tokens_unshared": 750, "step_s": 0.5, "pairs_per_s": 16.0, "tokens_per_s": 200.0, "tflops": 0.1,
        "mfu": 0.1 * step, "peak_bytes": 3_000_000_000, **more,
    }  # fmt: skip


SHORT = [
    {"step": 1, "loss": 0.7},
    {"step": 2, "loss": 0.5},
]  # one panel: drawing takes most of a report's time


@pytest.fixture
def make_run(tmp_path: Path, draw_image: Callable[..., Path]) -> Callable[..., Path]:
    def make(name: str = "first", lines: list[dict[str, Any]] | None = None, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        draw_image(tmp_path / "one.png", 1)
        evil = "<script>alert('x')</script> & <img src=http://e.test/a.png>"
        rows = [
            {"id": f"row-{n}", "image": "one.png", "prompt": f"What is {n}? {evil}", "chosen": f"good {n} {evil}",
             "rejected": "bad" * 900}
            for n in range(9)
        ]  # fmt: skip
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": {"name": "llava"}, "data": {"train": str(tmp_path / "pairs.jsonl"), "image_root": None},
            "loss": {"beta": 0.1}, "train": {"output": str(folder)},
        }  # fmt: skip
        for key, value in settings.items():
            section, setting = key.split("__")
            config[section][setting] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        facts = {
            "method": "dpo", "steps": 4, "cpu": "AMD EPYC", "versions": {"torch": "2.13.0", "trl": None},
            "mfu_peak_source": "data sheet of A100, dense bf16",
            "data": {"train": {"rows": 9, "pairs": 9, "groups": 1, "images": 1, "truncated": 0}},
        }  # fmt: skip
        (folder / "environment.json").write_text(json.dumps(facts))
        skipped = [{"where": "pairs.jsonl line 3", "id": None, "reason": "the same answer"}] * 3
        (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped))
        lines = [line(step) for step in range(1, 5)] if lines is None else lines
        (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        return folder

    return make


@pytest.fixture
def draw_image(tiny_models: Any) -> Callable[..., Path]:
    drawn: Callable[..., Path] = tiny_models.draw_image
    return drawn


def cells(page: str) -> dict[str, list[str]]:
    """First cell of each table row -> the others."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    found = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    return {row[0]: row[1:] for row in found if row}


def test_the_page_tells_the_runs_figures(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    page = write_report([read_run(folder)], folder).read_text()
    told = cells(page)
    assert told["loss, last step"] == ["0.3000"] and told["reward margin, last step"] == ["1.200"]
    assert told["pairs with chosen above rejected, last step"] == ["100.0 %"]
    assert told["seconds, logged steps"] == ["2.0"] and told["pairs or examples a second"] == ["16.0"]
    assert told["token passes"] == ["400"] and told["times fewer token passes"] == ["7.5"]
    assert told["model FLOPs utilisation, mean"] == ["25.0 %"] and told["peak memory, GB"] == ["3.00"]
    assert told["train: pairs"] == ["9"] and told["left out: the same answer"] == ["3"]
    assert told["cpu"] == ["AMD EPYC"] and told["version of torch"] == ["2.13.0"]
    assert "version of trl" not in told and "(MFU) is against data sheet of A100" in page
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert {"loss.png", "rewards.png", "accuracy.png", "learning_rate.png", "memory.png", "mfu.png"} <= plots
    assert (folder / "plots" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_plots_of_an_earlier_report_that_are_not_of_this_one_go_and_other_files_stay(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "page"
    first = make_run(lines=[line(step, **PARTS, odd=1.0) for step in (1, 2)])
    write_report([read_run(first)], out)
    assert {"anatomy.png", "lengths.png", "metric_0.png"} <= {path.name for path in (out / "plots").iterdir()}
    (out / "plots" / "mine.png").write_bytes(b"mine")
    write_report([read_run(make_run("second"))], out)
    left = {path.name for path in (out / "plots").iterdir()}
    assert {"loss.png", "mine.png"} <= left and not left & {"anatomy.png", "lengths.png", "metric_0.png"}


def test_the_page_loads_nothing_and_shows_the_data_inert(make_run: Callable[..., Path]) -> None:
    folder = make_run(lines=SHORT)
    page = write_report([read_run(folder)], folder, examples=3).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in page
    sources = re.findall(r"""\b(?:src|href)="([^"]*)""", page)
    assert sources and all(
        source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in sources
    )
    # the prompts' and the chosen answers'
    assert page.count("&lt;script&gt;") == 6
    assert page.count('<div class="pair">') == 3 and page.count("data:image/jpeg") == 3
    assert "rejected, 2,700 characters" in page and "… (2,700 characters)" in page


def test_several_runs_stand_side_by_side_with_what_differs(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = make_run("a"), make_run("b", loss__beta=0.5)
    runs = read_runs([str(one), f"beta half={two}"])
    page = write_report(runs, tmp_path / "both").read_text()
    told = cells(page)
    assert told["loss.beta"] == ["0.1", "0.5"] and "model.name" not in told and "train.output" not in told
    assert told["loss, last step"] == ["0.3000", "0.3000"]
    assert "<h1>a / beta half</h1>" in page


def test_names_in_letters_that_the_plots_font_lacks_are_told_in_no_warning(
    make_run: Callable[..., Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    runs = read_runs([f"\u7532={make_run('a')}", f"\u4e59={make_run('b')}"])
    assert "<h1>\u7532 / \u4e59</h1>" in write_report(runs, tmp_path / "both").read_text()
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_run_under_way_and_a_torn_last_line_are_told(make_run: Callable[..., Path]) -> None:
    folder = make_run(lines=SHORT)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = write_report([read_run(folder)], folder).read_text()
    assert "the run stands at step 2 of 4" in page


def test_sft_and_unknown_metrics_have_their_panels(make_run: Callable[..., Path]) -> None:
    rows = [
        {"step": step, "loss": 2.0, "mean_token_accuracy": 0.5, "examples": 4, "step_s": 1.0, "eval_loss": 1.9,
         "pope/mean_f1": 0.8}
        for step in (1, 2)
    ]  # fmt: skip
    folder = make_run(lines=rows)
    titles = [panel.title for panel in panels_of([read_run(folder)])]
    assert titles == [
        "loss",
        "share of tokens that are the most likely one",
        "seconds a step",
        "pope/mean_f1",
    ]


def test_a_page_of_sft_alone_speaks_of_no_pairs(make_run: Callable[..., Path]) -> None:
    folder = make_run()
    pairs = read_run(folder)
    sft = dataclasses.replace(pairs, environment=pairs.environment | {"method": "sft"})

    def captions(runs: list[Run]) -> str:
        return " ".join(panel.caption_for(runs) for panel in PANELS)

    told = ("sigmoid, starts at 0.693", "Where chosen answers are longer", "runs a reference")
    assert all(text in captions([pairs]) and text in captions([sft, pairs]) for text in told)
    assert not any(text in captions([sft]) for text in told)


def test_values_that_are_no_numbers_are_not_drawn(make_run: Callable[..., Path]) -> None:
    folder = make_run(
        lines=[{"step": 1, "loss": float("nan")}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    )
    run = read_run(folder)
    assert run.series("loss") == ([3.0], [0.5])
    assert write_report([run], folder).exists()


def test_a_pair_file_that_is_gone_leaves_a_page_without_examples(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run(lines=SHORT)
    (tmp_path / "pairs.jsonl").unlink()
    page = write_report([read_run(folder)], folder).read_text()
    assert "No examples:" in page and "pairs.jsonl" in page


def test_rows_that_are_no_pairs_are_passed_over(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(lines=SHORT)
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(["{", '{"prompt": "x"}', *rows[:2], '{"chosen": 3}']) + "\n"
    )
    page = write_report([read_run(folder)], folder, examples=5).read_text()
    assert page.count('<div class="pair">') == 2


def test_all_answers_of_a_learned_conversation_are_shown(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = read_run(make_run(lines=SHORT))
    said = [("user", "what?"), ("assistant", "a bar"), ("user", "which colour?"), ("assistant", "red")]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (shown,) = example_parts(dataclasses.replace(run, environment=run.environment | {"method": "sft"}), 2)
    places = [shown.index(f">{text}<") for _, text in said]
    assert places == sorted(places) and shown.count('<div class="chosen">') == 2


def test_an_image_that_is_gone_is_told_beside_its_pair(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(lines=SHORT)
    (tmp_path / "one.png").write_bytes(b"no image")
    page = write_report([read_run(folder)], folder, examples=2).read_text()
    assert page.count('<div class="pair">') == 2 and "one.png:" in page


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "wanted a run folder with metrics.jsonl, got none"),
        (lambda f: (f / "metrics.jsonl").write_text(""), "wanted logged steps, got none yet"),
        (
            lambda f: (f / "metrics.jsonl").write_text("x\n{}\n"),
            "metrics.jsonl line 1: wanted a JSON object, got 'x'",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"loss": 1}\n'),
            "metrics.jsonl line 1: step: wanted a number",
        ),
        (
            lambda f: (f / "metrics.jsonl").write_text(f'{{"step": 1{400 * "0"}}}\n'),
            "metrics.jsonl line 1: step: wanted a number",
        ),
        (
            lambda f: (f / "pair_changes.jsonl").write_text(
                '{"step": 1, "epoch": 1, "pairs": [[NaN, 0, 0, 0]]}\n'
            ),
            "pair_changes.jsonl line 1: wanted step, epoch and pairs of four numbers",
        ),
        (lambda f: (f / "config.yaml").write_text("a: [1"), "config.yaml: not valid YAML"),
        (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe"), "config.yaml: the recipe is not UTF-8"),
        (lambda f: (f / "environment.json").write_text("{"), "environment.json: wanted a JSON object"),
        (
            lambda f: (f / "environment.json").write_text('{"data": null}'),
            "environment.json: data: wanted numbers",
        ),
        (
            lambda f: (f / "environment.json").write_text('{"data": {"train": {"rows": "9"}}}'),
            "environment.json: data: wanted numbers",
        ),
    ],
)
def test_a_broken_run_folder_is_named_in_one_line(
    break_it: Callable[[Path], Any], message: str, make_run: Callable[..., Path]
) -> None:
    folder = make_run()
    break_it(folder)
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_beside_the_run_and_wants_a_folder_for_several(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run("a", lines=SHORT)
    monkeypatch.setattr(sys, "argv", ["fasttrain", "report", str(folder)])
    cli.main()
    assert capsys.readouterr().out == f"page: {folder / 'report.html'}\n"
    for words, message in (
        ([str(folder), f"b={folder}"], "-o: wanted a folder for the page about 2 runs, got none"),
        ([str(folder), str(folder)], "two runs are called 'a': name them, NAME=FOLDER"),
        ([str(folder / "nothing")], "wanted a run folder with metrics.jsonl, got none"),
    ):
        monkeypatch.setattr(sys, "argv", ["fasttrain", "report", *words])
        with pytest.raises(SystemExit) as leave:
            cli.main()
        assert leave.value.code == 2 and message in capsys.readouterr().err


def test_a_real_run_has_its_data_account_on_the_page(
    tmp_path: Path, tiny_models: Any, text_pairs: Callable[..., Path]
) -> None:
    from fasttrain import train_dpo
    from fasttrain.config import config_from_dict

    model = tiny_models.build_text(tmp_path / "model")
    raw = {
        "model": {"name": str(model)}, "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(text_pairs(tmp_path / "pairs.jsonl", 12)), "workers": 0},
        "train": {"output": str(tmp_path / "run"), "max_steps": 2, "pairs_per_step": 6, "tokens_per_pack": 400},
        "track": [],
    }  # fmt: skip
    train_dpo(config_from_dict(raw))
    told = cells(write_report([read_run(tmp_path / "run")], tmp_path / "run").read_text())
    assert told["train: rows"] == ["12"] and told["train: pairs"] == ["12"] and told["left out"] == ["0"]
    assert told["steps"] == ["2"] and told["method"] == ["dpo"]


PARTS = {
    "data_s": 0.05, "forward_s": 0.2, "backward_s": 0.15, "update_s": 0.05, "tokens_images": 60, "tokens_prompts": 10,
    "tokens_answers": 30, "lengths/chosen": 12.0, "lengths/rejected": 20.0,
}  # fmt: skip


def moved(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "pair_changes.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_a_step_is_taken_apart_in_seconds_and_tokens(make_run: Callable[..., Path]) -> None:
    folder = make_run(lines=[line(step, **PARTS) for step in (1, 2)])
    page = write_report([read_run(folder)], folder).read_text()
    told = cells(page)
    assert told["seconds: forward pass"] == ["0.2000 (40%)"]
    assert told["seconds: rest (checks, bookkeeping)"] == ["0.0500 (10%)"]  # of 0.5 in all
    assert told["tokens: images"] == ["60 (60%)"] and told["tokens: answers"] == ["30 (30%)"]
    assert told["mean length of chosen answers, tokens"] == ["12.0"]
    assert (folder / "plots" / "anatomy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "plots" / "lengths.png").exists() and not (folder / "plots" / "metric_0.png").exists()


def test_runs_without_the_parts_of_a_step_have_a_page_without_them(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    new, old = make_run("new", lines=[line(1, **PARTS)]), make_run("old", lines=[line(1)])
    page = write_report([read_run(old)], old).read_text()
    assert "What a step is made of" not in page and "kept no log-ratios" in page
    both = write_report(read_runs([str(new), str(old)]), tmp_path / "both").read_text()
    assert cells(both)["seconds: update of the weights"] == ["0.0500 (10%)", "-"]


def test_the_pairs_that_moved_most_and_least_stand_with_image_and_change(
    make_run: Callable[..., Path],
) -> None:
    folder = make_run(lines=SHORT)
    moved(
        folder,
        [
            {"step": 1, "epoch": 0.5, "pairs": [[7, 0, 9.0, -9.0]]},  # an epoch before
            {"step": 3, "epoch": 1.5, "pairs": [[0, 0, 2.0, -1.0], [3, 0, 0.1, 0.1]]},
            {"step": 4, "epoch": 2.0, "pairs": [[0, 0, 3.0, -2.0], [1, 0, 0.5, 0.0], [2, 0, -4.0, -0.5]]},
        ],
    )
    page = write_report([read_run(folder)], folder, examples=2).read_text()
    shown = page.split("Pairs that first moved most")[1].split("drawn at random")[0]
    most, least = shown.split("Pairs that moved least")
    assert most.count('class="pair"') == least.count('class="pair"') == 1
    assert "What is 0?" in most and "+5.00 nats" in most and "data:image/jpeg" in most
    assert "+3.00 nats: 20.1 times as likely" in most and "-2.00 nats: 7.4 times less likely" in most
    assert "What is 2?" in least and "step 4: chosen gained -3.50 nats" in least
    assert "<script" not in page and "What is 7?" not in shown


def test_pairs_that_cannot_be_shown_are_told(make_run: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_run(lines=SHORT)
    moved(folder, [])
    assert "No pair was logged yet." in write_report([read_run(folder)], folder).read_text()
    moved(folder, [{"step": 1, "epoch": 1, "pairs": [[50, 0, 1.0, 0.0], [3, 1, 0.5, 0.0]]}])
    page = write_report([read_run(folder)], folder).read_text()
    assert "Pair 2 of the prompt in row 4: was not found in the 100,000 rows" in page
    assert "Pair 1 of the prompt in row 51: is not in the file any more" in page
    facts = json.loads((folder / "environment.json").read_text())
    facts["data"]["train"]["rows"] = 12
    (folder / "environment.json").write_text(json.dumps(facts))
    page = write_report([read_run(folder)], folder).read_text()
    assert "the pair file has changed: the run read 12 rows, now it has 9" in page
    (folder / "pair_changes.jsonl").write_text('{"step": 1, "epoch": 1, "pairs": [[1, 2]]}\n')
    with pytest.raises(UserError, match=r"pair_changes.jsonl line 1: wanted step, epoch and pairs of four"):
        read_run(folder)


def test_a_prompts_pairs_are_found_by_place_past_rows_that_were_left_out(
    make_run: Callable[..., Path], tmp_path: Path, draw_image: Callable[..., Path]
) -> None:
    folder = make_run(lines=SHORT)
    draw_image(tmp_path / "copy.png", 1)  # the same bytes under another name
    draw_image(tmp_path / "other.png", 2)
    images = ["one.png", "other.png", "one.png", "copy.png", "one.png"]
    rows = [
        {"image": image, "prompt": "Why?", "chosen": f"good {n}", "rejected": "bad"}
        for n, image in enumerate(images)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "skipped.jsonl").write_text(
        json.dumps({"where": f"{path} line 3", "reason": "too long"}) + "\n"
    )
    reader = PairReader(read_run(folder))
    assert [reader.pair_of_prompt(0, place)[0].chosen for place in range(3)] == ["good 0", "good 3", "good 4"]
    assert reader.pair_of_prompt(1, 0)[0].chosen == "good 1"
    assert reader.pair_of_prompt(0, 3)[0] is None


def test_a_skipped_row_with_unicodes_own_line_ends_is_one_line(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run("a", lines=SHORT)
    rows = [{"where": f"pairs.jsonl line {n}", "reason": f"no file a\u2028b\x85{n}"} for n in range(2)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "skipped.jsonl").write_text(text, encoding="utf-8")
    assert "no file a" in write_report([read_run(folder)], tmp_path / "page").read_text()


def test_a_stranger_is_told_what_was_done_and_one_step_is_no_trend(make_run: Callable[..., Path]) -> None:
    lines = [line(1, **{"rewards/margins": -1e-9})]
    page = write_report([read_run(make_run("a", lines=lines))], make_run("b", lines=SHORT)).read_text()
    assert cells(page)["reward margin, last step"] == ["0.000"]
    assert "a: the model llava was trained on pairs in 1 step by Direct Preference Optimization" in page
    assert "One step is logged, with a loss of 0.600" in page


@pytest.fixture(scope="module")
def browser() -> Any:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_a_screen_and_a_telephone_and_asks_for_nothing(
    browser: Any, make_run: Callable[..., Path], width: int, scheme: str
) -> None:
    """Opened from disk in a browser without a network: all pictures are there, nothing is wider than the window."""
    folder = make_run(
        "a-run-with-a-name-that-is-much-longer-than-a-telephone-is-wide" * 2, lines=[line(1, **PARTS)]
    )
    moved(folder, [{"step": 1, "epoch": 1, "pairs": [[1, 0, 2.0, 0.0], [4, 0, 1.0, 1.0]]}])
    path = write_report([read_run(folder)], folder)
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, color_scheme=scheme)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.images.length") >= 10
    assert all(url.startswith(("file:", "data:")) for url in asked)
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 24, 27)")
    context.close()


def test_losses_too_large_to_draw_are_left_out_as_those_that_are_no_numbers(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    losses = [0.7, 1e308, -1e308, float("nan"), 3e38, 0.5]
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    run = read_run(make_run(lines=lines))
    assert run.series("loss") == ([1, 5, 6], [0.7, 3e38, 0.5])
    assert write_report([run], tmp_path / "out").is_file()


def test_facts_that_nobody_would_write_into_a_run_folder_still_make_a_page(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_run("no text \udcff", lines=[step | {"tokens_images": "many"} for step in SHORT])
    facts = {"mfu_peak_source": ["a", "list"], "cpu": "\ud800"}
    (folder / "environment.json").write_text(json.dumps(facts))
    (folder / "config.yaml").write_text(f"data: {{train: {tmp_path / 'pairs.jsonl'}, image_root: -1}}")
    assert "no text ?" in write_report([read_run(folder)], folder).read_text(encoding="utf-8")
