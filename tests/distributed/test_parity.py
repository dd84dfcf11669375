"""However many ranks share a step, and whatever ZeRO partitions, loss and gradient are those of one process."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fasttrain.config import config_from_dict
from fasttrain.ranks import full_shape, ranks
from fasttrain.train.loop import train_dpo

_spec = importlib.util.spec_from_file_location(
    "tiny_families", Path(__file__).parent.parent / "tiny_families.py"
)
assert _spec is not None and _spec.loader is not None
tiny_families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_families)

pytestmark = pytest.mark.forks
MIXTURE = "mixtral"
MIXED = "llava"  # its pairs: prompts with one image, two and none

CASES: dict[str, tuple[str, list[str]]] = {
    "text": ("text", []),
    "images": (MIXED, []),
    "full": (MIXED, ["lora=null", "model.train_projector=true", "train.learning_rate=1e-4"]),
    "split": (MIXED, ["train.tokens_per_pack=40", "train.gradient_checkpointing=true", "model.train_projector=true"]),
    "unshared": (MIXED, ["train.share_prefix=false"]),
    "coupled": ("text", ["loss.kind=aot"]),
    "projector rests": (  # some steps have no image: the projector's gradient is zero, not the last step's
        MIXED, ["model.train_projector=true", "train.pairs_per_step=1", "train.max_steps=9"],
    ),
    "tower alone": (  # a pack without images has no gradient
        MIXED, [r"lora.targets=model\.vision_tower\..*q_proj", "train.pairs_per_step=1", "train.max_steps=9"],
    ),
    "mixture": (MIXTURE, ["loss.router_aux_weight=0.5", "train.tokens_per_pack=110"]),
    "experts": (  # alone, so that nothing before the first layer's has a gradient
        MIXTURE, ["lora.targets=[mlp.experts.gate_up_proj,mlp.experts.down_proj]", "train.learning_rate=1e-3"],
    ),
    "nf4": (MIXED, ["model.quantize=nf4"]),
    "few": ("text", ["train.pairs_per_step=1", "data.limit_pairs=5", "train.epochs=4"]),  # a group a step
}  # fmt: skip


@pytest.fixture
def recipes(
    tiny_text: Path,
    tiny_llava: Path,
    text_pairs: Callable[..., Path],
    vision_pairs: Callable[..., Path],
    tiny_models: Any,
    tmp_path: Path,
) -> Callable[[str, str], Any]:
    text = text_pairs(tmp_path / "text.jsonl", 21)
    mixture = tiny_models.build_mixture(tmp_path / "mixture")
    models = {"text": tiny_text, MIXED: tiny_llava, MIXTURE: mixture}
    files = {"text": text, MIXTURE: text, MIXED: vision_pairs(tmp_path / "images", 21)}

    def make(case: str, tag: str, *overrides: str) -> Any:
        kind, changes = CASES[case]
        raw = {
            "model": {"name": str(models[kind])},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(files[kind]), "eval": str(files[kind]), "workers": 0},
            "train": {
                "output": str(tmp_path / f"{case}-{tag}"), "epochs": 3, "pairs_per_step": 8, "learning_rate": 1e-2,
                "tokens_per_pack": 150, "warmup_ratio": 0.0, "schedule": "constant", "checkpoint_every": 4,
            },
            "track": [],
        }  # fmt: skip
        return config_from_dict(raw, [*changes, *overrides])

    return make


@pytest.fixture
def deepspeed_config(tmp_path: Path) -> Callable[..., str]:
    """Writes settings of DeepSpeed's zero_optimization; the override that names the file."""

    def write(**zero: Any) -> str:
        path = tmp_path / f"deepspeed-{len(list(tmp_path.glob('deepspeed-*')))}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        return f"distributed.deepspeed_config={path}"

    return write


# Tiny weights too are held in parts: DeepSpeed keeps those below 100,000 elements whole.
IN_PARTS = {"stage3_param_persistence_threshold": 0}
ON_CPU = {"offload_optimizer": {"device": "cpu"}}


def lines(config: Any) -> list[dict[str, Any]]:
    path = Path(config.train.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_changes(ours: Any, truth: Any) -> None:
    """The pairs that moved most and least of all ranks' pairs."""
    paths = [Path(config.train.output) / "pair_changes.jsonl" for config in (ours, truth)]
    for a, b in zip(*(path.read_text().splitlines() for path in paths), strict=True):
        moved = [
            [chosen - rejected for _, _, chosen, rejected in json.loads(line)["pairs"]] for line in (a, b)
        ]
        assert moved[0] == pytest.approx(moved[1], abs=1e-3)


def assert_same(ours: list[dict[str, Any]], truth: list[dict[str, Any]]) -> None:
    assert len(ours) == len(truth) >= 9
    for a, b in zip(ours, truth, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5 if a["step"] == 1 else 1e-4), a[
            "step"
        ]
        for name in ("pairs", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    assert ours[-1]["eval_loss"] == pytest.approx(truth[-1]["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "zero", "cases"),
    [
        ("null", {}, ["images", "unshared", "coupled", "mixture"]),
        ("2", {}, ["text", "full", "split", "projector rests", "tower alone", "nf4", "mixture"]),
        ("2", ON_CPU, ["projector rests"]),
        ("3", IN_PARTS, ["full", "few", "projector rests", "tower alone", "unshared", "mixture"]),
        ("3", IN_PARTS, ["experts"]),
        ("3", {**IN_PARTS, **ON_CPU, "offload_param": {"device": "cpu"}}, ["full", "projector rests"]),
    ],
)
def test_two_ranks_take_the_steps_of_one_process(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str], stage: str,
    zero: dict[str, Any], cases: list[str],
) -> None:  # fmt: skip
    truth, one = {}, {}
    for case in cases:
        config = recipes(case, "one")
        train_dpo(config)
        truth[case] = lines(config)
        one[case] = config
        assert truth[case][-1]["loss"] != pytest.approx(truth[case][0]["loss"], rel=1e-3), (
            "nothing was learned"
        )
    settings = [f"distributed.zero_stage={stage}", *([deepspeed_config(**zero)] if zero else [])]
    shared = [recipes(case, "two", *settings) for case in cases]

    def body() -> None:
        for config in shared:
            train_dpo(config)

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for case, config in zip(cases, shared, strict=True):
        assert_same(lines(config), truth[case])
        assert_same_changes(config, one[case])
        if (
            case == "few"
        ):  # idle ranks repeat work, and weights are in parts: neither changes what is reported
            for ours, alone in zip(lines(config), truth[case], strict=True):
                assert ours["tokens"] == alone["tokens"]
                assert ours["tflops"] * ours["step_s"] == pytest.approx(alone["tflops"] * alone["step_s"])


def test_ranks_that_tokenize_as_steps_ask_take_the_same_steps(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a large pair file, of which a short run sees a part."""
    from fasttrain.data import prepare, prepared

    changes = [
        "train.pairs_per_step=2",
        "train.max_steps=1",
        "data.eval=null",
        "train.gradient_checkpointing=false",
    ]
    alone = recipes("images", "one", *changes)
    train_dpo(alone)
    monkeypatch.setattr(prepare, "LAZY_FROM", 1)
    monkeypatch.setattr(prepared.PreparedData, "complete", lambda *given: pytest.fail("all were tokenized"))
    shared = recipes("images", "two", *changes, "data.workers=1")
    ended = run_ranks(lambda: train_dpo(shared) and None)
    assert ended.codes == [0, 0], ended.stderr
    (ours,), (truth,) = lines(shared), lines(alone)
    assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    assert ours["pairs"] == truth["pairs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "stage", "more"),
    [
        ("Qwen2.5-VL", "3", []),
        # a weight of the embeddings read outside of them
        ("Gemma 4", "3", []),
        # features of several layers of the tower; ranks with images beside ranks without
        ("Qwen3-VL", "2", ["model.train_projector=true", "train.pairs_per_step=2", "train.max_steps=9"]),
        ("Mllama", "null", []),
    ],
)
def test_other_families_take_the_steps_of_one_process(
    family: str, stage: str, more: list[str], tiny_models: ModuleType, recipes: Callable[..., Any], run_ranks: Callable[..., Any],
    deepspeed_config: Callable[..., str], tmp_path: Path,
) -> None:  # fmt: skip
    """Mllama runs other layers with images than without: only where ranks need not run the same modules."""
    # one process runs fused norms, ZeRO-3 transformers' own: steps of the usual size would amplify the rounding
    name = f"model.name={tiny_families.save(tiny_models, tmp_path / 'model', family)}"
    changes = [name, "train.learning_rate=1e-3", *more]
    one = recipes("images", "one", *changes)
    train_dpo(one)
    settings = [] if stage == "null" else [f"distributed.zero_stage={stage}", deepspeed_config(**IN_PARTS)]
    two = recipes("images", "two", *changes, *settings)
    ended = run_ranks(lambda: train_dpo(two))
    assert ended.codes == [0, 0], ended.stderr
    assert_same(lines(two), lines(one))
    if family == "Mllama":
        refused = run_ranks(lambda: train_dpo(recipes("images", "zero", name, "distributed.zero_stage=2")))
        assert "distributed.zero_stage: wanted null for MllamaFor" in refused.stderr


@pytest.mark.slow
def test_experts_load_under_zero_3_whichever_way_they_lie_in_their_files(
    tiny_models: ModuleType, recipes: Callable[..., Any], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """Qwen3-VL-MoE's, as its publisher has them and as transformers saves them; of a part no shape told which."""
    from safetensors.torch import load_file, save_file

    saved = tiny_families.save(tiny_models, tmp_path / "saved", "Qwen3-VL-MoE")
    published = Path(shutil.copytree(saved, tmp_path / "published"))
    weights = load_file(saved / "model.safetensors")
    turned = {name: x.mT.contiguous() if ".mlp.experts." in name else x for name, x in weights.items()}
    save_file(turned, published / "model.safetensors", metadata={"format": "pt"})
    changes = ["train.max_steps=1", "data.eval=null"]
    configs = [
        recipes("text", folder.name, f"model.name={folder}", "distributed.zero_stage=3", *changes)
        for folder in (saved, published)
    ]
    ended = run_ranks(lambda: [train_dpo(config) for config in configs] and None)
    assert ended.codes == [0, 0], ended.stderr
    truth = recipes("text", "one", f"model.name={saved}", *changes)
    train_dpo(truth)
    for config in configs:
        for name in ("logps/chosen", "grad_norm"):
            assert lines(config)[0][name] == pytest.approx(lines(truth)[0][name], rel=1e-5)


@pytest.mark.slow
def test_layers_that_run_once_for_every_image_are_refused_under_zero_3(
    tiny_models: ModuleType, recipes: Callable[..., Any], run_ranks: Callable[..., Any], tmp_path: Path
) -> None:
    """PaddleOCR-VL's projector: ranks with other numbers of images gathered its weights another number of times, and hung."""
    name = f"model.name={tiny_families.save(tiny_models, tmp_path / 'model', 'PaddleOCR-VL')}"
    ended = run_ranks(lambda: train_dpo(recipes("images", "zero", name, "distributed.zero_stage=3")))
    assert "distributed.zero_stage: wanted 2 for PaddleOCRVL" in ended.stderr
    assert "projector.pre_norm runs once for every image" in ended.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_another_stage_and_another_number_of_ranks(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str]
) -> None:
    """One process, ZeRO-3 on two ranks with its optimizer on the CPU, ZeRO-2 on three, one process: one process's losses."""
    truth = recipes("split", "one")
    train_dpo(truth)

    def leg(steps: int, stage: str, *settings: str) -> Any:
        return recipes(
            "split", "legs", f"train.max_steps={steps}", f"distributed.zero_stage={stage}", *settings
        )

    train_dpo(leg(2, "null"))
    for config, size in ((leg(4, "3", deepspeed_config(**ON_CPU)), 2), (leg(6, "2"), 3)):
        ended = run_ranks(lambda config=config: train_dpo(config, resume=True), size)
        assert ended.codes == [0] * size, ended.stderr
    train_dpo(recipes("split", "legs"), resume=True)
    assert_same(lines(recipes("split", "legs")), lines(truth))


def test_a_finished_run_under_zero_holds_no_memory(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any]
) -> None:
    """DeepSpeed's hooks on weights keep an engine, its model and buffers, where Python finds no ring."""
    config = recipes("text", "zero", "train.max_steps=2", "distributed.zero_stage=2", "data.eval=null")

    def body() -> None:
        from fasttrain.model.policy import Policy

        train_dpo(config)
        gc.collect()
        assert not any(type(found) is Policy for found in gc.get_objects())

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr


@pytest.mark.parametrize(
    ("stage", "zero", "held"),
    [("2", {}, None), ("3", {}, None), ("3", {"reduce_bucket_size": 99_999}, 99_999)],
)
def test_deepspeed_lays_out_room_for_the_gradients_that_there_are(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], deepspeed_config: Callable[..., str], tmp_path: Path,
    stage: str, zero: dict[str, int], held: int | None,
) -> None:  # fmt: skip
    """Its own buckets are of 2 GB each in fp32; what the recipe's file says stands."""
    changes = [
        "train.max_steps=1",
        "data.eval=null",
        f"distributed.zero_stage={stage}",
        deepspeed_config(**zero),
    ]
    config = recipes("text", "zero", *changes)

    def body() -> None:
        from fasttrain.train.zero_engine import ZeroEngine

        backward = ZeroEngine.backward

        def told(engine: Any, loss: torch.Tensor) -> None:
            backward(engine, loss)
            trained = sum(full_shape(p).numel() for p in engine.policy.parameters() if p.requires_grad)
            seen = {"trained": trained, "bucket": engine.engine.optimizer.reduce_bucket_size}
            (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen))

        ZeroEngine.backward = told
        train_dpo(config)

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        assert seen["bucket"] == (held or seen["trained"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "holds weights of the embedding or the head"),
        ({"use_dora": True}, "has use_dora, for which peft reads whole weights"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights pissa, for which"),
        ({"trainable_token_indices": [3]}, "has trainable_token_indices, for which"),
    ],
    ids=str,
)
def test_an_adapter_that_needs_whole_weights_is_refused_under_zero_3(
    recipes: Callable[..., Any], run_ranks: Callable[..., Any], tiny_text: Path, tmp_path: Path, options: dict[str, Any], words: str,
) -> None:  # fmt: skip
    import peft
    from transformers import AutoModelForCausalLM

    about = peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_text), about)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    changes = ["lora={}", f"lora.init_from={tmp_path / 'adapter'}", "distributed.zero_stage=3"]
    ended = run_ranks(lambda: train_dpo(recipes("text", "zero", *changes)))
    assert f"adapter {words}" in ended.stderr


@pytest.mark.slow
def test_zero_3_gathers_a_frozen_head_once_a_pass_and_never_in_the_backward(
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    deepspeed_config: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Counted where it is sent: all-gathers of the head's size. The embeddings have the same one, and are frozen too."""
    # the cache is full: from here on passes are steps
    train_dpo(recipes("images", "one", "train.max_steps=1", "data.eval=null"))
    config = recipes(
        "images", "two", "train.max_steps=2", "data.eval=null", "distributed.zero_stage=3",
        deepspeed_config(**IN_PARTS, stage3_prefetch_bucket_size=0),
    )  # fmt: skip

    def body() -> None:
        from fasttrain.model.head import LogprobHead
        from fasttrain.train.zero_engine import ZeroEngine

        gather, seen, size = torch.distributed.all_gather_into_tensor, [], []

        def counted(*arguments: Any, **options: Any) -> Any:
            output = options["output_tensor"] if "output_tensor" in options else arguments[0]
            if size and output.numel() == size[0]:
                seen.append("gathered")
            return gather(*arguments, **options)

        def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(engine: Any, *arguments: Any, **options: Any) -> Any:
                if not size:  # before it the head was compared with the model's own logits
                    head = next(m for m in engine.policy.modules() if isinstance(m, LogprobHead))
                    size.append(head.weight.ds_numel)
                seen.append(name)
                return call(engine, *arguments, **options)

            return wrapped

        torch.distributed.all_gather_into_tensor = counted
        ZeroEngine.forward = told("pass", ZeroEngine.forward)
        ZeroEngine.backward = told("backward", ZeroEngine.backward)
        train_dpo(config)
        (tmp_path / f"seen{ranks().rank}.json").write_text(json.dumps(seen))

    ended = run_ranks(body)
    assert ended.codes == [0, 0], ended.stderr
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen{rank}.json").read_text())
        passes = " ".join(seen).split("pass")[1:]
        assert len(passes) >= 4 and sum("backward" in held for held in passes) >= 4
        for held in passes:  # embeddings and head; a split group's packs pass twice, of which one goes back
            assert held.split() in (["gathered"] * 2, ["gathered"] * 2 + ["backward"]), held


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "legs"), [("2", {"again": 2, "plain": 1}), ("3", {"again": 2, "three": 3})]
)
def test_8_bit_states_resume_to_the_same_bits_and_on_other_ranks_to_8_bits(
    recipes: Callable[..., Any],
    run_ranks: Callable[..., Any],
    stage: str,
    legs: dict[str, int],
) -> None:
    """Scales belong to blocks of what a rank holds: another cut rounds the moments anew."""
    states = ["train.optimizer=adamw_8bit", "lora.rank=64", "lora.alpha=64", "train.learning_rate=1e-3"]
    zero = [f"distributed.zero_stage={stage}"]
    one, whole = recipes("text", "one", *states), recipes("text", "two", *states, *zero)
    train_dpo(one)
    assert run_ranks(lambda: train_dpo(whole)).codes == [0, 0]
    truth = lines(one)

    def close(found: list[dict[str, Any]]) -> bool:
        assert len(found) == len(truth) == 9 and truth[0]["loss"] - truth[-1]["loss"] > 0.1
        return all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in zip(found, truth, strict=True))

    assert close(lines(whole))
    for tag, size in legs.items():
        start = recipes("text", tag, *states, *zero, "train.max_steps=4")
        assert run_ranks(lambda config=start: train_dpo(config)).codes == [0, 0]
        rest = recipes("text", tag, *states, *(zero if size > 1 else []))
        ended = run_ranks(lambda config=rest: train_dpo(config, resume=True), size)
        assert ended.codes == [0] * size, ended.stderr
        assert close(lines(rest))
        if tag == "again":
            same = [
                (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
                for a, b in zip(lines(rest), lines(whole))
            ]
            assert all(same)
