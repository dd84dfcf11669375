"""Sources of questions: formats, repairs, duplicates, overlap, sampling, the account."""

import base64
import itertools
import json
import random

import pytest
from PIL import Image

from fasttrain_data.errors import UserError
from fasttrain_data.questions.build import QuestionSettings, build_questions
from fasttrain_data.questions.duplicates import image_key
from fasttrain_data.questions.readers import Draft, Unusable, read_drafts
from fasttrain_data.questions.sample import BottomK, Shuffled, share_out
from fasttrain_data.questions.text import clean_text


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.fixture
def drafts(tmp_path, write_rows):
    def read(*rows, form=None, turns=None):
        return list(read_drafts(write_rows(tmp_path / "source.jsonl", rows), form, turns))

    return read


@pytest.mark.parametrize(
    ("text", "clean", "repairs"),
    [
        ("<image>\nWhy?", "Why?", []),
        ("Why?\n<image>", "Why?", ["placeholder moved to the front"]),
        ("<image>\nWhat <image> is it?<image>", "What is it?", ["several placeholders"]),
        ("Why?", "Why?", []),
        (
            "<image>\nWhy?\nPlease answer the question such that your response is in the following attributes in "
            "5-point Likert\nscale:\nHelpfulness:4,Correctness:4,Coherence:4,Complexity:4,Verbosity:4",
            "Why?",
            ["attribute prompt removed"],
        ),
    ],
)
def test_placeholders_and_attribute_prompts_are_taken_out(text, clean, repairs):
    assert clean_text(text) == (clean, repairs)


def test_scigraphqa_takes_the_first_question_and_cuts_fake_human_turns(drafts):
    record = {
        "image_file": "2001.00001v1-Figure3-1.png",
        "id": "2001.00001v1-Figure3-1",
        "conversations": [
            human("What does it show?\n<image>"),
            gpt("Growth."),
            human("Why?"),
            gpt("The reasons are:"),
            human("* First one."),
            gpt("* Second one."),
        ],
    }
    [first] = drafts(record)
    assert (first.question, first.reference, first.images) == (
        "What does it show?",
        "Growth.",
        [record["image_file"]],
    )
    assert first.changed == ["fake human turns cut", "placeholder moved to the front"]
    each = drafts(record, turns="each")
    assert [draft.question for draft in each] == ["What does it show?", "Why?"]
    assert [turn.text for turn in each[1].history] == ["What does it show?", "Growth."]
    [last] = drafts(record, turns="last")
    assert last.question == "Why?"


def test_scigraphqa_answers_of_several_lines_are_whole_or_left_out(drafts):
    record = {
        "image_file": "a.png",
        "conversations": [
            human("What does it show?\n<image>"),
            gpt("Growth."),
            human("Why?"),
            gpt("The reasons are:"),
            human("* First one."),
            gpt("* Second one."),
            human("And then?"),
            gpt("Nothing."),
        ],
        "response": "\n Question: What does it show?\nAnswer: Growth.\n\nQuestion: Why?\nAnswer: The reasons are:\n\n"
        "* First one.\n* Second one.\n\nQuestion: And then?\nAnswer: Nothing.",
    }

    def read(**changes):
        return [(draft.reference, draft.changed[1:]) for draft in drafts({**record, **changes}, turns="each")]

    moved = "placeholder moved to the front"
    whole = ("The reasons are:\n\n* First one.\n* Second one.", [moved, "split answer put together again"])
    assert read() == [("Growth.", [moved]), whole]
    left_out = (None, [moved, "split answer left out"])
    for unknown in (None, "no questions in it", record["response"].replace("reasons", "causes"), 5):
        assert read(response=unknown) == [("Growth.", [moved]), left_out]
    # a request without a question mark ends the conversation too, and splits no answer
    request = [*record["conversations"][:4], human("Describe the axes."), gpt("Two.")]
    asked = "Question: Why?\nAnswer: The reasons are:\nQuestion: Describe the axes.\nAnswer: Two."
    assert read(conversations=request, response=asked)[1] == ("The reasons are:", [moved])
    # the last line of an odd number of lines is in no turn, and no fake turn tells of it
    end = {
        "conversations": record["conversations"][:2],
        "response": "Question: What does it show?\nAnswer: Growth.\n\nAll in all.",
    }
    [draft] = drafts({**record, **end})
    assert draft.reference == "Growth.\n\nAll in all."


def test_scigraphqa_drops_a_record_that_begins_with_an_answer(drafts):
    record = {"image_file": "a.png", "conversations": [human("The figure shows scores."), gpt("Also.")]}
    assert drafts(record) == [("line 1", "first human turn asks nothing")]
    record["conversations"][0] = human("Describe the figure.")
    assert isinstance(drafts(record)[0], Draft)


def test_scigraphqa_reads_question_answer_pairs_without_conversations(drafts):
    [draft] = drafts({"image_file": "a.png", "q_a_pairs": [["Why?", "So."], ["When?", "Now."]]})
    assert (draft.question, draft.reference) == ("Why?", "So.")


def test_lrv_names_the_image_by_id_and_keeps_the_task(drafts):
    [draft] = drafts(
        {"image_id": "2356371", "question": "Which objects?", "answer": "Cups.", "task": "count"}
    )
    assert (draft.images, draft.category, draft.reference) == (["2356371.jpg"], "count", "Cups.")
    [draft] = drafts({"image_id": 5, "question": "A sign at X:105 Y:350 Width:258 Height:258?"})
    assert draft.images == ["5.jpg"]
    assert draft.changed == ["holds pixel coordinates"]


def test_llava_conversations_keep_their_turns(drafts):
    record = {
        "id": "1",
        "image": "a.jpg",
        "conversations": [human("<image>\nWho?"), gpt("Ann."), human("Where?"), gpt("Rome.")],
    }
    [draft] = drafts(record)
    assert (draft.question, draft.reference) == ("Where?", "Rome.")
    assert [(turn.role, turn.text) for turn in draft.history] == [("user", "Who?"), ("assistant", "Ann.")]
    record["conversations"] = [human("Who?"), human("Where?")]
    assert drafts(record) == [("line 1", "human and gpt turns do not alternate")]


def test_a_system_turn_or_column_begins_the_history(drafts):
    system = {"from": "system", "value": "Be brief."}
    turns = [human("Who?"), gpt("Ann."), human("Where?")]
    both = {"conversations": [system, *turns], "system": "Be long."}
    for row in ({"conversations": [system, *turns]}, {"conversations": turns, "system": "Be brief."}, both):
        first, second = drafts(row, turns="each")
        assert [(turn.role, turn.text) for turn in first.history] == [("system", "Be brief.")]
        assert [turn.role for turn in second.history] == ["system", "user", "assistant"]
        assert (first.question, second.question) == ("Who?", "Where?")
    [draft] = drafts({"conversations": turns[:1], "system": ""})
    assert draft.history == []
    late = drafts({"conversations": [*turns[:2], system, turns[2]]})
    assert late == [("line 1", "human and gpt turns do not alternate")]


def test_a_question_of_several_choices_keeps_them(drafts):
    row = {"image": "a.png", "hint": "Look left.", "question": "Which?", "options": {"A": "red", "B": "blue"}}
    [draft] = drafts(row)
    assert draft.question == "Look left.\nWhich?\nA. red\nB. blue"
    assert draft.changed == ["hint or options put with the question"]
    [draft] = drafts(row | {"hint": None, "options": {"A": "red", "B": "blue", "C": None, "D": None}})
    assert draft.question == "Which?\nA. red\nB. blue"
    for options in ({"A": 1}, {}, {"A": None}):
        [draft] = drafts(row | {"hint": "", "options": options})
        assert (draft.question, draft.changed) == ("Which?", [])


def test_images_of_evaluation_rows_that_ask_nothing_usable_are_left_out_too(tmp_path, write_rows, command):
    unusable = [
        {"image_file": "a.png", "conversations": [human("The figure shows scores."), gpt("Also.")]},
        {"image_id": 5, "question": None},
        {"image": "c.png", "conversations": [human("Why?"), human("And?")]},
        {"image_id": None, "question": "Why?"},
        {"image_id": "7.png", "question": None},
    ]
    evaluation = write_rows(tmp_path / "evaluation.jsonl", unusable)
    rows = [
        {"image": name, "question": "What is it?"}
        for name in ("a.png", "5.jpg", "c.png", "None.jpg", "7.jpg")
    ]
    source = write_rows(tmp_path / "source.jsonl", rows)
    arguments = ("--missing-images", "keep", "--eval-file", evaluation)
    code, stdout, _ = command("questions", source, "-o", tmp_path / "q.jsonl", *arguments)
    assert code == 0 and "5 read, 1 kept" in stdout and "4  overlap with evaluation" in stdout


def test_the_benchmarks_own_files_are_evaluation_files(tmp_path, write_rows, read_rows, command):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "one.png")
    rows = [{"image": "one.png", "question": "In MMBench?"}, {"image": "v1_7.png", "question": "In MM-Vet?"}]
    rows += [{"question": "In MT-Bench?"}, {"question": "In AlpacaEval?"}, {"question": "In none?"}]
    source = write_rows(tmp_path / "source.jsonl", rows)
    folder = tmp_path / "evaluation"
    folder.mkdir()
    cell = base64.b64encode((tmp_path / "one.png").read_bytes()).decode()
    table = [["index", "question", "A", "B", "image"], ["3", "Which?", "x", "y", cell]]
    (folder / "MMBench.tsv").write_text("".join("\t".join(cells) + "\n" for cells in table))
    mm_vet = {"v1_7": {"imagename": "v1_7.png", "question": "What?", "answer": "x", "capability": ["ocr"]}}
    (folder / "mm-vet.json").write_text(json.dumps(mm_vet, indent=1))
    write_rows(
        folder / "question.jsonl", [{"question_id": 81, "category": "stem", "turns": ["In MT-Bench?", "B"]}]
    )
    (folder / "alpaca.json").write_text(json.dumps([{"instruction": "In AlpacaEval?", "output": "-"}]))
    files = [word for path in sorted(folder.iterdir()) for word in ("--eval-file", path)]
    arguments = ("-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    code, stdout, stderr = command("questions", source, *arguments, *files)
    assert code == 0 and "4  overlap with evaluation" in stdout, stderr
    assert [row["question"] for row in read_rows(tmp_path / "q.jsonl")] == ["In none?"]
    (folder / "MMBench.tsv").write_text("index\tquestion\n")
    code, _, stderr = command("questions", source, *arguments, *files)
    assert code == 2 and "MMBench.tsv: wanted MMBench's columns, got none called 'A'" in stderr


def test_a_key_that_seems_to_hold_an_image_and_is_not_read_is_told(drafts):
    rows = [{"question": "Why?", "image_path": "a.png"}, {"question": "How?", "images": [], "img": None}]
    assert [draft.changed for draft in drafts(*rows)] == [["image_path is not read: no image"], []]


def test_rows_of_several_formats_in_one_file_keep_their_images(drafts):
    rows = [
        {"image": "a.png", "question": "Plain?"},
        {"image_id": 5, "question": "LRV?"},
        {"image_file": "f.png", "conversations": [human("SciGraphQA?"), gpt("Yes."), human("Fake turn.")]},
        {"image": "b.png", "conversations": [human("LLaVA?")]},
        {"question_id": 1, "text": "A question file?", "image": "c.png"},
        {"question": "Text alone?"},
    ]
    found = [(draft.question, draft.images) for draft in drafts(*rows)]
    assert found == [
        ("Plain?", ["a.png"]),
        ("LRV?", ["5.jpg"]),
        ("SciGraphQA?", ["f.png"]),
        ("LLaVA?", ["b.png"]),
        ("A question file?", ["c.png"]),
        ("Text alone?", []),
    ]
    keys = {key: None for row in rows for key in row}  # as datasets fills them up
    keys |= {"id": None, "prompt": None}
    filled = drafts(*(keys | row for row in rows))
    assert [draft.source_id for draft in filled] == [None, "5", "f.png", None, "1", None]
    assert [(draft.question, draft.images) for draft in filled] == found
    assert drafts(rows[1], rows[5]) == [
        drafts(rows[1])[0],
        ("line 2", "no image_id"),
    ]  # no image is no other format
    assert drafts(rows[3], rows[2], form="llava")[1] == (
        "line 2",
        "names its image as scigraphqa does, not as llava",
    )


def test_an_image_given_as_inline_base64_is_a_missing_image(tmp_path, write_rows, read_rows, command):
    inline = "data:image/png;base64," + "iVBORw0KGgo" * 500
    rows = [{"question": "Why?"}, {"question": "What is it?", "image": inline}]
    source = write_rows(tmp_path / "source.jsonl", rows)
    code, stdout, stderr = command("questions", source, "-o", tmp_path / "q.jsonl")
    assert (code, stderr) == (0, "")
    assert "1  missing image" in stdout
    [skipped] = read_rows(tmp_path / "q.skipped.jsonl")
    assert skipped["detail"].startswith("no path of a file (File name too long): data:image/png")
    assert len(skipped["detail"]) < 400


def test_question_files_are_read_and_scigraphqa_is_recognised_by_its_image_names(drafts):
    rows = [
        {"question_id": 0, "text": "Why?", "image": "1801.01974v2-Figure10-1.png", "category": "conv"},
        {"question_id": 1, "text": "Why?", "image": "000000441147.jpg", "category": "detail"},
        {"question_id": 2, "text": "Why?", "image": "hep-th9901001v3-Figure1-1.png"},
    ]
    assert [draft.source for draft in drafts(*rows)] == ["scigraphqa", "llava-questions", "scigraphqa"]
    without_id = {"text": "Why?", "image": "1.jpg"}
    assert [draft.source_id for draft in drafts(rows[0], without_id)] == ["0", None]


def test_rows_that_hold_no_question_are_counted_not_skipped_in_silence(drafts):
    rows = [{"question": "Why?"}, {"question": 3}, {"question": " <image> "}, {"question": "So?", "image": 4}]
    assert drafts(*rows)[1:] == [
        ("line 2", "no question"),
        ("line 3", "no question"),
        ("line 4", "image is not a file name"),
    ]


def test_an_unknown_record_is_a_mistake_of_the_user(drafts):
    with pytest.raises(UserError, match="scigraphqa, lrv, llava"):
        drafts({"foo": 1})
    assert issubclass(Unusable, Exception)


def test_share_out_gives_a_short_stratum_what_it_has_and_the_rest_to_others():
    rng = random.Random(5)
    assert share_out(6000, {"sci": 295_602, "lrv": 300_000}) == {"sci": 3000, "lrv": 3000}
    assert share_out(10, {"a": 2, "b": 0, "c": 100, "d": 3}) == {"a": 2, "b": 0, "c": 5, "d": 3}
    for _ in range(50):
        available = {name: rng.randrange(20) for name in "abcde"}
        total = rng.randrange(120)
        shares = share_out(total, available)
        assert sum(shares.values()) == min(total, sum(available.values()))
        capped = [name for name in shares if shares[name] < available[name]]
        assert all(shares[name] <= available[name] for name in shares)
        assert all(max(shares.values()) - shares[name] <= 1 for name in capped)


def test_the_sample_does_not_depend_on_the_order_of_the_rows():
    keys = [f"k{number}" for number in range(400)]
    picked = []
    for order in (keys, keys[::-1]):
        heap = BottomK(31, seed=7)
        for key in order:
            heap.offer(key, key)
        picked.append(heap.ordered())
    assert picked[0] == picked[1]
    assert len(set(picked[0])) == 31
    other = BottomK(31, seed=8)
    for key in keys:
        other.offer(key, key)
    assert other.ordered() != picked[0]


@pytest.fixture
def folder(tmp_path, draw, write_rows):
    for number in range(6):
        draw(tmp_path / "img" / f"{number}.png", number)
    draw(tmp_path / "img" / "copy of 0.png", 0)
    (tmp_path / "img" / "broken.png").write_bytes(b"no image")
    return tmp_path


def test_every_row_is_kept_or_counted_with_its_reason(folder, write_rows, read_rows):
    source = write_rows(
        folder / "source.jsonl",
        [
            {"question": "What is it?", "image": "img/0.png"},
            {"question": "what is IT", "image": "img/0.png"},
            {"question": "What is it?", "image": "img/1.png"},
            {"question": "What is it?", "image": "img/copy of 0.png"},
            {"question": "What is it?", "image": "img/none.png"},
            {"question": "What is it?", "image": "../img/0.png"},
            {"question": "What is it?", "image": "img/broken.png"},
            {"question": "Anything to say?"},
            {"question": ""},
        ],
    )
    account = build_questions([str(source)], folder / "questions.jsonl", QuestionSettings())
    rows = read_rows(folder / "questions.jsonl")
    assert [(row["images"], row["question"]) for row in rows] == [
        (["img/0.png"], "What is it?"),
        (["img/1.png"], "What is it?"),
        ([], "Anything to say?"),
    ]
    assert account.dropped["source.jsonl"] == {
        "duplicate": 2,
        "missing image": 2,
        "broken image": 1,
        "no question": 1,
    }
    listed = read_rows(folder / "questions.skipped.jsonl")
    assert [row["where"].rsplit(" ", 1)[1] for row in listed] == ["2", "4", "5", "6", "7", "9"]
    assert len({row["id"] for row in rows}) == 3


def test_ids_follow_the_image_bytes_not_the_file_name(folder, write_rows, read_rows):
    ids = []
    for name in ("img/0.png", "img/copy of 0.png", "img/1.png"):
        source = write_rows(folder / "source.jsonl", [{"question": "What?", "image": name}])
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
        ids.append(read_rows(folder / "q.jsonl")[0]["id"])
    assert ids[0] == ids[1] != ids[2]


def test_missing_images_are_kept_only_on_demand_and_marked(folder, write_rows, read_rows):
    source = write_rows(folder / "source.jsonl", [{"question": "What?", "image": "img/none.png"}])
    with pytest.raises(UserError, match=r"1 missing image.*--image-root"):
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    assert not (folder / "q.jsonl").exists()
    with pytest.raises(UserError, match="wanted an existing file"):
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="stop"))
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="keep"))
    assert read_rows(folder / "q.jsonl")[0]["image_sha256"] == [None]


def test_names_are_relative_to_the_output_or_to_the_given_root(folder, write_rows, read_rows):
    source = write_rows(folder / "sub" / "source.jsonl", [{"question": "What?", "image": "../img/0.png"}])
    with pytest.raises(UserError, match="missing image"):  # leaves the folder of the file that names it
        build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    write_rows(source, [{"question": "What?", "image": "0.png"}])
    root = QuestionSettings(image_root=folder / "img")
    build_questions([str(source)], folder / "out" / "q.jsonl", root)
    assert read_rows(folder / "out" / "q.jsonl")[0]["images"] == ["0.png"]
    inner = write_rows(folder / "img" / "source.jsonl", [{"question": "What?", "image": "0.png"}])
    account = build_questions([str(inner)], folder / "q.jsonl", QuestionSettings())
    assert read_rows(folder / "q.jsonl")[0]["images"] == ["img/0.png"]
    assert account.notes == []
    account = build_questions([str(inner)], folder / "out" / "q.jsonl", QuestionSettings())
    assert read_rows(folder / "out" / "q.jsonl")[0]["images"] == ["0.png"]
    assert "--image-root" in account.notes[0]


def test_overlap_with_evaluation_is_judged_by_bytes_where_both_images_are_there(
    folder, write_rows, read_rows
):
    source = write_rows(
        folder / "source.jsonl",
        [{"question": "What?", "image": f"img/{number}.png"} for number in range(4)]
        + [{"question": "Why me?"}],
    )
    evaluation = write_rows(
        folder / "eval" / "eval.jsonl",
        [
            {"question_id": 1, "text": "Is it?", "image": "COCO_val2014_1.png"},  # absent: by name
            {"question_id": 2, "text": "why me"},
            {"question_id": 3, "text": "Is it?", "image": "2.png"},  # there, but another picture
            {"question_id": 4, "text": "Is it?", "image": "other name.png"},  # the same bytes as 3.png
        ],
    )
    (folder / "eval" / "2.png").write_bytes((folder / "img" / "5.png").read_bytes())
    (folder / "eval" / "other name.png").write_bytes((folder / "img" / "3.png").read_bytes())
    settings = QuestionSettings(eval_files=(evaluation,))
    account = build_questions([str(source)], folder / "q.jsonl", settings)
    assert [row["images"] for row in read_rows(folder / "q.jsonl")] == [["img/0.png"], ["img/2.png"]]
    assert account.dropped["source.jsonl"] == {"overlap with evaluation": 3}
    refusing = QuestionSettings(eval_files=(evaluation,), on_overlap="refuse")
    with pytest.raises(UserError, match=r"line 2: image img/1.png is in an evaluation file"):
        build_questions([str(source)], folder / "q.jsonl", refusing)
    assert image_key("x/COCO_val2014_000000310196.jpg") == image_key("000000310196.png")


def test_a_limit_is_shared_by_the_sources_and_broken_images_are_replaced(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": f"img/{number % 6}.png"} for number in range(40)]
    rows += [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(40)]
    one = write_rows(folder / "one.jsonl", rows)
    two = write_rows(folder / "two.jsonl", [{"image_id": "0", "question": "Which?"}])
    (folder / "0.jpg").write_bytes((folder / "img" / "0.png").read_bytes())
    settings = QuestionSettings(limit=20, seed=4)
    build_questions([str(one), str(two)], folder / "q.jsonl", settings)
    first = read_rows(folder / "q.jsonl")
    assert [row["source_file"] for row in first] == ["one.jsonl"] * 19 + ["two.jsonl"]
    places = [int(row["source_place"].split()[1]) for row in first[:-1]]
    assert places == sorted(places)
    build_questions([str(one), str(two)], folder / "again.jsonl", settings)
    again = read_rows(folder / "again.jsonl")
    assert [row["id"] for row in again] == [row["id"] for row in first]
    build_questions([str(one), str(two)], folder / "q.jsonl", QuestionSettings(limit=20, seed=5))
    assert [row["id"] for row in read_rows(folder / "q.jsonl")] != [row["id"] for row in first]


def test_what_a_stratum_turns_out_not_to_have_the_others_give(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": f"img/{number % 6}.png"} for number in range(40)]
    one = write_rows(folder / "one.jsonl", rows)
    rows = [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(30)]
    rows[7]["image"] = rows[8]["image"] = "img/0.png"
    two = write_rows(folder / "two.jsonl", rows)
    settings = QuestionSettings(limit=20, seed=4)
    account = build_questions([str(two), str(one)], folder / "q.jsonl", settings)
    kept = read_rows(folder / "q.jsonl")
    assert [row["source_file"] for row in kept] == ["two.jsonl"] * 2 + ["one.jsonl"] * 18
    assert account.notes == ["sampled two.jsonl: 2 of 30", "sampled one.jsonl: 18 of 40"]
    build_questions([str(two), str(one)], folder / "again.jsonl", settings)
    assert [row["id"] for row in read_rows(folder / "again.jsonl")] == [row["id"] for row in kept]
    build_questions([str(two), str(one)], folder / "q.jsonl", QuestionSettings(limit=99))
    assert len(read_rows(folder / "q.jsonl")) == 42


def test_a_limit_is_met_however_many_bad_images_are_drawn_before(folder, write_rows, read_rows):
    rows = [{"question": f"What is {number}?", "image": "img/broken.png"} for number in range(300)]
    for number in range(0, 300, 20):
        rows[number]["image"] = f"img/{number // 20 % 6}.png"
    source = write_rows(folder / "s.jsonl", rows)
    found = []
    for limit in (5, 12, 15, 16):
        account = build_questions([str(source)], folder / "q.jsonl", QuestionSettings(limit=limit, seed=3))
        found.append({row["id"] for row in read_rows(folder / "q.jsonl")})
    assert [len(ids) for ids in found] == [5, 12, 15, 15]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(found))
    assert account.notes == [
        "sampled s.jsonl: 15 of 300",
        "wanted 16 questions (--limit), got 15: no more can be used",
    ]
    build_questions(
        [str(write_rows(folder / "s.jsonl", rows[::-1]))],
        folder / "q.jsonl",
        QuestionSettings(limit=5, seed=3),
    )
    assert {row["id"] for row in read_rows(folder / "q.jsonl")} == found[0]


def test_strata_are_drawn_in_a_seeded_order_that_is_not_the_rows():
    drawn = []
    for seed, keys in ((7, range(400)), (7, range(399, -1, -1)), (8, range(400))):
        items = Shuffled(seed)
        for key in keys:
            items.add("even" if key % 2 == 0 else "odd \udcff", str(key), {"key": key})
        assert items.sizes["even"] == items.sizes["odd \udcff"] == 200
        drawn.append([item["key"] for item in items.draw("even")])
        items.close()
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == list(range(0, 400, 2)) != drawn[0]


def test_rows_of_the_paper_can_be_cut_out(folder, write_rows, read_rows):
    source = write_rows(folder / "s.jsonl", [{"question": f"What is {number}?"} for number in range(9)])
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings(rows=(3, 5)))
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["What is 3?", "What is 4?"]
    turns = [
        [human(f"What is {number}?"), gpt("A."), human(f"Why {number}?"), gpt("B.")] for number in range(4)
    ]
    turns[1][0] = gpt("no question")  # a row all the same
    rows = [{"image": "img/0.png", "conversations": conversation} for conversation in turns]
    source = write_rows(folder / "s.jsonl", rows)
    settings = QuestionSettings(rows=(1, 3), turns="each")
    account = build_questions([str(source)], folder / "q.jsonl", settings)
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["What is 2?", "Why 2?"]
    assert account.dropped["s.jsonl"] == {"outside --rows": 4, "no question": 1}


def test_real_scigraphqa_files_are_read_whole_and_the_dirt_is_found(shared_data, tmp_path, command):
    folder = shared_data / "scigraphqa"
    records = folder / "mplug_owl_answer_and_openai_rating.jsonl"
    questions = folder / "updated_llava_eval_questions_first1500.jsonl"
    out = tmp_path / "q.jsonl"
    code, stdout, _ = command("questions", records, "-o", out, "--missing-images", "keep")
    assert code == 0
    assert "99 read, 98 kept" in stdout
    # 12 of the 99 are known to be damaged; "<image>" follows the question in 55
    assert "changed       11  fake human turns cut" in stdout
    assert "changed        3  split answer put together again" in stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    [split] = [row for row in rows if row["source_place"] == "line 3"]
    lines = split["reference_answer"].splitlines()
    assert lines[0] == "The main takeaways from the graph in Figure 9 are as follows:"
    assert lines[2].startswith("* The runtime of pruned") and lines[-1].startswith("These results verify")
    assert "dropped        1  first human turn asks nothing" in stdout
    assert "changed       55  placeholder moved to the front" in stdout
    assert not any("<image>" in line for line in out.read_text().splitlines())
    code, stdout, _ = command("questions", questions, "-o", out, "--missing-images", "keep")
    assert "1,500 read, 1,500 kept" in stdout
    code, _, stderr = command("questions", questions, "-o", out)
    assert (code, "1,500 missing image" in stderr) == (2, True)


def test_real_lrv_and_llava_files_are_read_whole(shared_data, tmp_path, command):
    lrv = shared_data / "lrv_instruction" / "evaluation_set.json"
    rows = json.loads(lrv.read_text())
    code, stdout, _ = command("questions", lrv, "-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    assert (code, f"{len(rows):,} read" in stdout) == (0, True)
    coordinates = sum("X:" in row["question"] for row in rows)
    assert f"{coordinates:>8,}  holds pixel coordinates" in stdout
    llava = shared_data / "llava" / "qa90_questions.jsonl"
    code, stdout, _ = command("questions", llava, "-o", tmp_path / "q.jsonl", "--missing-images", "keep")
    assert (code, "90 read, 90 kept" in stdout) == (0, True)
    samples = shared_data / "mmbench_samples" / "questions.jsonl"
    code, stdout, _ = command(
        "questions", samples, "-o", tmp_path / "q.jsonl", "--image-root", samples.parent
    )
    assert (code, "12 read, 12 kept" in stdout) == (0, True)


def test_images_of_one_name_in_two_folders_are_two_images(folder, draw, write_rows, read_rows):
    draw(folder / "photos" / "0.png", 40)
    draw(folder / "img" / "0.webp", 41)  # another picture beside 0.png
    (folder / "link.png").symlink_to(folder / "img" / "0.png")
    names = (
        "img/0.png",
        "photos/0.png",
        "img/0.webp",
        "link.png",
        "img/../img/0.png",
        "img/none.png",
        "none.png",
    )
    source = write_rows(folder / "s.jsonl", [{"question": "Describe it.", "image": name} for name in names])
    account = build_questions([str(source)], folder / "q.jsonl", QuestionSettings(missing_images="keep"))
    kept = [row["images"][0] for row in read_rows(folder / "q.jsonl")]
    assert kept == ["img/0.png", "photos/0.png", "img/0.webp", "img/none.png"]
    assert account.dropped["s.jsonl"] == {"duplicate": 3}


def test_text_that_no_record_can_hold_is_a_dropped_row(folder, write_rows, read_rows):
    conversation = [human("<image>\nWho \ud83d?"), gpt("Ann."), human("Where?"), gpt("Rome.")]
    rows = [
        {"question": "What is it \ud83d?"},
        {"question": "What?", "answer": "\udfff"},
        {"question": "What?", "history": [{"role": "user", "text": "\ud83d"}]},
        {"question": "Who?", "other column": "\ud83d"},
    ]
    for name, content in (
        ("plain", rows),
        ("llava", [{"image": "img/0.png", "conversations": conversation}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = [str(folder / "plain.jsonl"), str(folder / "llava.jsonl")]
    account = build_questions(sources, folder / "q.jsonl", QuestionSettings())
    assert [row["question"] for row in read_rows(folder / "q.jsonl")] == ["Who?"]
    assert account.dropped == {
        "plain.jsonl": {"text that is not valid Unicode": 3},
        "llava.jsonl": {"text that is not valid Unicode": 1},
    }


def test_wrong_shapes_of_histories_and_answer_pairs_are_counted(drafts):
    assert drafts({"question": "What?", "history": 5}) == [
        ("line 1", "history is not a list of turns with role and text")
    ]
    for pairs in (5, ["Why?"], [["Why?", None]], [None], {"a": 1}):
        [(place, reason)] = drafts({"image_file": "a.png", "q_a_pairs": pairs})
        assert (place, reason.split(" ", 1)[0]) == ("line 1", "q_a_pairs"), pairs


def test_an_empty_list_of_images_does_not_hide_the_one_beside_it(drafts):
    [draft] = drafts({"question": "What?", "images": [], "image": "a.png"})
    assert draft.images == ["a.png"]


def test_a_failed_run_leaves_the_listing_of_the_last_good_one(folder, write_rows):
    rows = [{"question": "What?", "image": "img/0.png"}, {"question": ""}]
    source = write_rows(folder / "s.jsonl", rows)
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    listing = folder / "q.skipped.jsonl"
    before = listing.read_bytes()
    write_rows(source, [{"question": ""}] * 3)
    for output in ("q", "never"):
        with pytest.raises(UserError, match="got none"):
            build_questions([str(source)], folder / f"{output}.jsonl", QuestionSettings())
    assert listing.read_bytes() == before
    assert not list(folder.glob("*never*"))
    write_rows(source, rows[:1])
    build_questions([str(source)], folder / "q.jsonl", QuestionSettings())
    assert not listing.exists()


def test_only_rows_with_images_need_an_image_root(folder, write_rows):
    source = write_rows(
        folder / "in" / "s.jsonl", [{"question": "Why?"}, {"question": "So?", "image": "no.png"}]
    )
    account = build_questions([str(source)], folder / "out" / "q.jsonl", QuestionSettings())
    assert (account.total_kept(), account.notes) == (1, [])


def test_a_tilde_that_no_shell_expands_is_the_home_folder(tmp_path, write_rows, command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in" / "s.jsonl", [{"question": "Why?"}])
    code, _, stderr = command("questions", "plain:~/in/s.jsonl", "--out=~/q.jsonl", "--image-root=~/in")
    assert (code, stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "q.jsonl"]
