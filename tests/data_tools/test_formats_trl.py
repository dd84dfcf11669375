"""TRL takes the export as it is: `datasets` decodes it and DPOTrainer makes a step on it."""

import pytest

from fasttrain_data.formats.write import export_pairs


@pytest.fixture
def pairs(tmp_path, write_rows, draw):
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.png", 2)

    def row(number, images):
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": f"what colour is {number}"}]
        return {
            "id": str(number),
            "images": images,
            "prompt": [{"role": "user", "content": content}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red and green"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
            "score_chosen": 12.0,
        }

    return write_rows(tmp_path / "pairs.jsonl", [row(1, ["a.png"]), row(2, ["b.png"]), row(3, ["a.png"])])


def test_datasets_decodes_the_images_of_the_parquet_export(pairs, tmp_path):
    from datasets import load_dataset

    from fasttrain_data.formats import read_pairs

    export_pairs(pairs, tmp_path / "trl.parquet", "trl")
    data = load_dataset(
        "parquet", data_files=str(tmp_path / "trl.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert data[0]["images"][0].size == (9, 7)
    assert data[0]["images"][0].getpixel((0, 0)) == (1, 0, 40)
    assert [row["id"] for row in read_pairs(tmp_path / "trl.parquet")] == ["1", "2", "3"]


def test_trl_makes_a_dpo_step_on_the_export(pairs, tmp_path, tiny_llava):
    from datasets import load_dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    export_pairs(pairs, tmp_path / "trl.parquet", "trl")
    data = load_dataset(
        "parquet", data_files=str(tmp_path / "trl.parquet"), split="train", cache_dir=str(tmp_path)
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=3,
        report_to=[],
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(tiny_llava),
        args=arguments,
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(tiny_llava),
    )
    result = trainer.train()
    assert result.global_step == 1
    assert result.training_loss == pytest.approx(0.6931, abs=1e-3)
