"""The demo's yes-or-no questions in POPE's form: labels are the charts' truth, the benchmark's reader takes them."""

import json
from pathlib import Path

from fasttrain.demo.chart_files import write_pope
from fasttrain.demo.charts import examples
from fasttrain.evaluate.benchmarks import ReadOptions, benchmark_of
from fasttrain.evaluate.pope import read


def test_popes_reader_takes_the_charts_and_labels_are_the_truth(tmp_path: Path) -> None:
    folder = write_pope(tmp_path / "pope", 40, 11, "held_out")
    assert benchmark_of(folder) == "pope"
    (questions,) = read(folder, ReadOptions(suffix="")).values()
    rows = [json.loads(line) for line in (folder / "charts_pope_held_out.json").read_text().splitlines()]
    assert [question.text for question in questions] == [row["text"] for row in rows]
    truth = {"yes": 0, "no": 0}
    stream = (e for e in examples(11, "held_out") if e.question.kind in ("present", "compare"))
    for row, example in zip(rows, stream):
        assert row["label"] == example.question.answer.split(",")[0].lower()
        truth[row["label"]] += 1
    assert min(truth.values()) > 10
