"""A record of every layout that pairs are read from, and what it means."""

from turns import turn

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301"
    "0100c9fe92ef0000000049454e44ae426082"
)


def expected(images=("a.png",), prompt=None, chosen="good", rejected="bad"):
    placeholders = [None] * len(images)
    return {
        "images": list(images),
        "prompt": prompt or [turn("user", *placeholders, "Why?")],
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
    }


def vl_answer(text, **ratings):
    return {
        "response": text,
        "model": text,
        "annotations": {name: {"Rating": value} for name, value in ratings.items()},
    }


# layout -> (a record as its project publishes it, what it means)
RECORDS = {
    "trl": (
        {
            "images": ["a.png"],
            "prompt": [turn("user", None, "Why?")],
            "chosen": [turn("assistant", "good")],
            "rejected": [turn("assistant", "bad")],
        },
        expected(),
    ),
    "trl implicit": (
        {
            "images": [],
            "chosen": [turn("user", "Why?"), turn("assistant", "good")],
            "rejected": [turn("user", "Why?"), turn("assistant", "bad")],
        },
        expected(images=()),
    ),
    "trl said again": (
        {
            "prompt": "Why?",
            "chosen": [turn("user", "Why?") | {"content": "Why?"}, turn("assistant", "good")],
            "rejected": [turn("user", "Why?") | {"content": "Why?"}, turn("assistant", "bad")],
        },
        expected(images=()),
    ),
    "trl said again in parts": (
        {
            "prompt": "Why?",
            "chosen": [turn("user", "Why?"), turn("assistant", "good")],
            "rejected": [turn("user", "Why?"), turn("assistant", "bad")],
        },
        expected(images=()),
    ),
    "alpaca": (
        {"image": "a.png", "instruction": "Why?", "input": "", "chosen": "good", "rejected": "bad"},
        expected(),
    ),
    "alpaca argilla": (
        {"image": "a.png", "input": "Why?", "chosen_response": "good", "rejected_response": "bad"},
        expected(),
    ),
    "trl short": ({"image": "a.png", "prompt": "Why?", "chosen": "good", "rejected": "bad"}, expected()),
    "mllm-dpo": (
        {
            "image": "a.png",
            "question": {"from": "human", "value": "<image>\nWhy?"},
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "ref_win_logp": -12.5,
        },
        expected(),
    ),
    "mllm-dpo literal": (
        {
            "image": "a.png",
            "question": "{'from': 'human', 'value': '<image>\\nWhy?'}",
            "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "good"}],
            "rejected": {"from": "gpt", "value": "bad"},
        },
        expected(),
    ),
    "rlaif-v": (
        {
            "ds_name": "x",
            "image_path": "a.png",
            "question": "Why?",
            "chosen": "good",
            "rejected": "bad",
            "idx": 7,
            "logps": "[-1.5, -0.1]",
        },
        expected(),
    ),
    "vlfeedback": (
        {
            "id": "v",
            "prompt": "Why?",
            "img_path": "a.png",
            "models": ["good", "bad"],
            "completions": [
                vl_answer("so so", Helpfulness="3", Safety="N/A"),
                vl_answer("good", Helpfulness="5", Visual="4"),
                vl_answer("bad", Helpfulness="1", Visual="2"),
            ],
        },
        expected(),
    ),
    "llama-factory": (
        {
            "conversations": [{"from": "human", "value": "<image>Why?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
            "images": ["a.png"],
        },
        expected(),
    ),
    "ms-swift": (
        {
            "messages": [
                {"role": "user", "content": "<image>Why?"},
                {"role": "assistant", "content": "good"},
            ],
            "rejected_response": "bad",
            "images": ["a.png"],
        },
        expected(),
    ),
    "llava-next": (
        {
            "id": 3,
            "image": "a.png",
            "prompt": "<image>\nWhy?",
            "answer": "x",
            "chosen": "good",
            "rejected": "bad",
        },
        expected(),
    ),
    "helpsteer3": (
        {
            "domain": "d",
            "language": "en",
            "context": [{"role": "user", "content": "Why?"}],
            "response1": "good",
            "response2": "bad",
            "overall_preference": -2,
        },
        expected(images=()),
    ),
    "ultrafeedback": (
        {
            "prompt": "Why?",
            "chosen": [turn("user", "Why?"), turn("assistant", "good")],
            "rejected": [turn("user", "Why?"), turn("assistant", "bad")],
            "chosen-rating": 4.5,
            "rejected-rating": 2,
        },
        expected(images=()),
    ),
}
