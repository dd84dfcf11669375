"""One-line advice from predictions side by side."""

from __future__ import annotations

from collections.abc import Iterator

from fasttrain.config import DPOConfig
from fasttrain.plan.predict import Machine, Prediction


def advise(config: DPOConfig, machine: Machine, predictions: list[Prediction]) -> list[str]:
    """What to change in the recipe, most telling first; empty if nothing."""
    return list(_advice(config, machine, predictions))


def _advice(config: DPOConfig, machine: Machine, predictions: list[Prediction]) -> Iterator[str]:
    fitting = [p for p in predictions if p.fits]
    if not fitting:
        yield (
            "nothing fits: more GPUs with zero_stage 3, a GPU with more memory"
            + ("" if config.model.quantize or not config.lora else ", or model.quantize: nf4")
            + ("" if config.lora else ", or a LoRA section in place of full fine-tuning")
            + (", or shorter sequences (data.max_length)" if any(p.exceeded for p in predictions) else "")
        )
        return
    best = min(fitting, key=lambda p: (p.timing.step_s, p.stage))
    wanted = config.distributed.zero_stage or 0
    mine = next((p for p in predictions if p.stage == wanted), None)
    if mine is not None and not mine.fits:
        yield f"{_name(wanted)} does not fit; {_name(best.stage)} does"
    elif mine is not None and best.stage != wanted and best.timing.step_s < 0.98 * mine.timing.step_s:
        yield (
            f"{_name(best.stage)} fits and is predicted {mine.timing.step_s / best.timing.step_s:.2f} x as fast as {_name(wanted)}"
            + (": the weights fit whole, so they need not be gathered for every pack" if wanted == 3 else "")
        )
    if wanted == 3 and config.lora and any(p.stage == 2 and p.fits for p in predictions):
        two = next(p for p in predictions if p.stage == 2)
        three = mine if mine is not None else two
        saved = three.communication.total - two.communication.total
        yield f"distributed.zero_stage: 2 holds the frozen weights whole and moves {saved / 1e9:,.0f} GB less per GPU and step"
    for p in fitting:
        if config.train.gradient_checkpointing is True and p.largest >= max(
            2048, min(p.tokens_per_pack, 4096), p.longest_sequence
        ):
            yield (
                f"{_name(p.stage)}: train.gradient_checkpointing can be off: packs of up to {p.largest:,} tokens fit without it, "
                "and it costs about a third more operations"
            )
    if mine is not None and mine.fits and mine.tokens_per_pack < 2048 and not config.model.quantize:
        yield f"packs of {mine.tokens_per_pack:,} tokens are small for {machine.gpu.name}: its matrix products will be slow"
    if best.work.balance > 1.02 and machine.gpus > 1:
        yield (
            f"the busiest rank has {best.work.balance:.2f} x the mean tokens: {best.work.pairs / machine.gpus:.0f} pairs a rank and "
            "step are few; more pairs_per_step, or fewer GPUs, balance better"
        )


def _name(stage: int) -> str:
    return f"ZeRO-{stage}" if stage else "one whole copy per GPU"
