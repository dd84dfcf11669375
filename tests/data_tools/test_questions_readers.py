"""Source formats of questions: every one is read, repaired, or told."""

import pytest
from turns import gpt, human

from fasttrain_data.errors import UserError
from fasttrain_data.questions.readers import Draft, Unusable
from fasttrain_data.questions.text import clean_text


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


# of SciGraphQA: the second answer has several lines, each a turn of its own
SPLIT = [
    human("What does it show?\n<image>"),
    gpt("Growth."),
    human("Why?"),
    gpt("The reasons are:"),
    human("* First one."),
    gpt("* Second one."),
]


def test_scigraphqa_takes_the_first_question_and_cuts_fake_human_turns(drafts):
    record = {
        "image_file": "2001.00001v1-Figure3-1.png",
        "id": "2001.00001v1-Figure3-1",
        "conversations": SPLIT,
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
        "conversations": [*SPLIT, human("And then?"), gpt("Nothing.")],
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


def test_instructions_and_turns_of_text_only_files_are_asked(drafts):
    """Alpaca's and FastChat's files ended the command: their keys were known of evaluation files alone."""
    alpaca = {"instruction": "Translate.", "input": "Chat", "output": "Cat"}
    rows = [
        alpaca,
        {"instruction": "Why?", "input": "", "output": "So."},
        {"question_id": 81, "turns": ["A?", "B?"]},
    ]
    asked = [(draft.question, draft.reference, draft.source_id, draft.changed) for draft in drafts(*rows)]
    assert asked == [
        ("Translate.\nChat", "Cat", None, ["input put with the instruction"]),
        ("Why?", "So.", None, []),
        ("A?", None, "81", ["later turns left out"]),
    ]
    assert drafts(rows[2], {"question_id": 82, "turns": []})[1] == ("line 2", "no question")
