"""`fasttrain dpo` and `sft`, top to bottom: fill the reference cache, step, log, evaluate, checkpoint, write the adapter."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttrain.config import DPOConfig, LossConfig
from fasttrain.data.batch import PackBatch, load_packs, whole
from fasttrain.data.packs import Order, Pack, Step, plan_step
from fasttrain.data.prepared import PreparedData
from fasttrain.environment import collect_facts
from fasttrain.errors import UserError
from fasttrain.files import user_path
from fasttrain.model.load import stop_token_ids
from fasttrain.progress import Progress, say
from fasttrain.ranks import ranks
from fasttrain.run_lines import read_steps
from fasttrain.signals import on_sigterm
from fasttrain.train.caller import memory_let_go, modes_of_a_run, only_run_here
from fasttrain.train.checkpoint import (
    delete_old,
    latest_checkpoint,
    list_checkpoints,
    read_state,
    restore_checkpoint,
    save_checkpoint,
)
from fasttrain.train.engine import Engine, join_ranks, make_engine
from fasttrain.train.final import write_final
from fasttrain.train.first_step import check_first_step, check_routing, check_sharing
from fasttrain.train.inputs import check_inputs, fingerprints
from fasttrain.train.job import Job, all_or_none, build_job
from fasttrain.train.losses import PairLoss
from fasttrain.train.metrics import (
    check_finite,
    peak_memory,
    peak_rate,
    step_metrics,
)  # fmt: skip
from fasttrain.train.objective import Objective
from fasttrain.train.open_images import open_images_of_run
from fasttrain.train.optimizer import learning_rate_factor
from fasttrain.train.references import fill_references
from fasttrain.train.run_facts import run_facts
from fasttrain.train.run_folder import (
    check_output,
    first_start,
    open_run_folder,
    write_environment,
    write_skipped,
)
from fasttrain.train.run_lock import RunLock
from fasttrain.train.run_log import RunLog
from fasttrain.train.sft_loss import AnswerLoss
from fasttrain.train.step import StepRunner, evaluate
from fasttrain.train.step_work import of_all_ranks, speed_metrics, work_of
from fasttrain.train.watch import Watcher


@dataclass(frozen=True)
class RunResult:
    """A finished (or, after SIGTERM, cleanly stopped) run: its folder, the lines of its metrics.jsonl, and final/ in it.

    `adapter` is there once the last step is done; with `lora: null` it is the whole model.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    adapter: Path


def train_dpo(config: DPOConfig, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Run a recipe; UserError for a mistake in it. Every file of the run is in `config.train.output`."""
    return train(config, PairLoss(_recipe(config).loss), resume=resume, overwrite=overwrite)


def train_sft(config: DPOConfig, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """The same machinery with the cross-entropy of answers (`completion`, or `chosen` of pairs) and no reference."""
    return train(config, AnswerLoss(_recipe(config).loss), resume=resume, overwrite=overwrite)


def _recipe(config: DPOConfig) -> DPOConfig:
    if not isinstance(config, DPOConfig):
        raise UserError(
            f"config: wanted a DPOConfig, which load_config(path) reads from a recipe, got {config!r}"
        )
    return config


OBJECTIVES: dict[str, Callable[[LossConfig], Objective]] = {"dpo": PairLoss, "sft": AnswerLoss}


def train(config: DPOConfig, loss: Objective, *, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Run a recipe with an objective, whatever the caller's gradient mode, autocast, default dtype and device.

    What torch draws for the caller afterwards is what it would have drawn without the run.
    """
    with (
        memory_let_go(),
        only_run_here(),
        modes_of_a_run(),
        contextlib.closing(RunLock()) as lock,
    ):
        return _train(config, loss, lock, resume, overwrite)


def _train(config: DPOConfig, loss: Objective, lock: RunLock, resume: bool, overwrite: bool) -> RunResult:
    join_ranks(config)
    folder, main = user_path(config.train.output), ranks().main
    with all_or_none():
        if main:
            lock.take(folder)
        check_output(config, loss.command, resume=resume, overwrite=overwrite)
    with all_or_none():  # apart: here the ranks ask each other
        began = first_start(folder, resume=resume)
    with contextlib.closing(build_job(config, loss, began)) as job:
        with all_or_none():  # only now: a mistake in the data leaves no folder
            if main:
                open_run_folder(config, loss.command, lock, resume=resume, overwrite=overwrite)
        return Trainer(job, folder, resume).run()


class Trainer:
    """One run of one job."""

    def __init__(self, job: Job, folder: Path, resume: bool) -> None:
        self.job, self.folder, self.resume = job, folder, resume
        self.config = job.config
        self.loss = job.loss
        self._stop = self._told_split = False
        self._inputs: dict[str, str] = {}
        self._watcher = Watcher(
            job.policy,
            job.processor,
            stop_token_ids(job.processor, job.model_folder),
            job.watches,
            self.config.model.bos,
            job.chat.today,
        )

    def run(self) -> RunResult:
        job, config, main = self.job, self.config.train, ranks().main
        with all_or_none():
            self._inputs = fingerprints(job)
            checkpoint = latest_checkpoint(self.folder / "checkpoints") if self.resume else None
            if checkpoint is not None:
                check_inputs(checkpoint, self._inputs)
        self._check_same(checkpoint)
        engine = make_engine(job.policy, self.config, job.checkpointing)
        check_routing(self.config.loss.router_aux_weight, job.policy)
        check_sharing(job)
        if self.loss.needs_reference:
            report = fill_references(job)
            say(
                f"reference: {report.completions:,} completions, {report.computed:,} computed now "
                f"({report.tokens:,} tokens in {report.seconds:.1f} s), cache {job.cache.path}"
            )
        elif self.config.data.on_bad_row == "skip":
            open_images_of_run(job)
        if main:
            write_skipped(self.folder, [line for data in job.datasets for line in data.skipped_lines()])
        order = job.order
        total = config.max_steps or order.total_steps(config.epochs)
        peak_flops, peak_source = peak_rate(job.device, job.policy.model.dtype)
        if ranks().size > 1:
            peak_flops, peak_source = peak_flops * ranks().size, f"{ranks().size} x {peak_source}"
        if main:
            write_environment(self.folder, collect_facts() | run_facts(job, total, peak_flops, peak_source))
        job.policy.train()
        self._watcher.open(self.folder)
        torch.manual_seed(config.seed + ranks().rank)  # every rank drops out units of its own
        done = self._restore(engine, checkpoint)
        log = RunLog(self.folder, self.config.to_dict(), done, main=main, changes=self.loss.needs_reference)
        if checkpoint is not None and main:
            log.tell_lost(read_state(checkpoint)["lines"])
        say(self._account(total, done))
        try:
            with (
                on_sigterm(self._finish_this_step),
                Progress(self.loss.command, total, "steps", initial=done) as progress,
            ):
                done = self._steps(engine, order, done, total, log, progress, peak_flops)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._kept()) from None
        finally:
            log.close()
        if done < total:
            say(f"stopped by SIGTERM after step {done} of {total}; checkpoint saved, go on with --resume")
        else:
            write_final(job, engine.optimizer, self.folder)
        engine.close()
        return RunResult(self.folder, read_steps(self.folder / "metrics.jsonl"), self.folder / "final")

    def _steps(
        self, engine: Engine, order: Order, done: int, total: int, log: RunLog, progress: Progress,
        peak_flops: float,
    ) -> int:  # fmt: skip
        job, config = self.job, self.config.train
        balance = self.config.loss.router_aux_weight
        runner = StepRunner(engine, self.loss, job.train, balance)
        planned: deque[Step] = deque()
        batches = self._batches(order, done + 1, total, planned)
        worst = torch.zeros(
            (), device=job.device
        )  # norm since the last look: under ZeRO an update with inf is left out
        with contextlib.closing(batches):
            for number in range(done + 1, total + 1):
                runner.clock.start()
                first = next(batches)
                step = planned.popleft()
                if step.split and not self._told_split:
                    self._told_split = True
                    say(
                        f"warning: {job.train.where(min(step.split))}: its prompt and answers exceed train.tokens_per_pack = "
                        f"{job.tokens_per_pack}; such groups run in parts, each with the prompt again"
                    )
                keep = number == 1
                due = bool(config.eval_every and number % config.eval_every == 0)
                logged = number % config.log_every == 0 or number == total or due
                result = runner.run(step, itertools.chain([first], batches), keep, logged)
                if keep and self.loss.needs_reference:
                    check_first_step(job, engine, result)
                runner.clock.mark("other")
                factor = learning_rate_factor(config, number, total)
                norm = engine.step(factor)
                worst = torch.maximum(worst, norm.detach())
                if keep and not float(norm):
                    say(
                        "warning: nothing that trains has a gradient in the first step: do these pairs run through it "
                        "(lora.targets, model.train_projector)?"
                    )
                runner.clock.mark("update")
                stop = ranks().any(self._stop)
                last = number == total or stop
                # after SIGTERM there may be seconds left: they belong to the checkpoint
                evaluates = bool(job.eval or job.watches) and (number == total or (due and not stop))
                note = ""
                if logged or last:
                    line: dict[str, Any] = {"step": number, "epoch": round(step.epoch, 6)}
                    work = work_of(job, step, result, runner.clock.read())
                    sums, work, changes, memory = of_all_ranks(
                        job.train, result, work, peak_memory(job.device)
                    )
                    check_finite(number, sums, worst)
                    line |= step_metrics(self.loss, sums, norm, step.pairs, balance)
                    line["learning_rate"] = config.learning_rate * factor
                    line |= speed_metrics(work, self.loss.unit, peak_flops, memory)
                    line |= self._evaluate(engine, final=number == total) if evaluates else {}
                    log.write(line, changes)
                    note = self.loss.note(line)
                progress.tick(1, note)
                done = number
                last = last or ranks().any(
                    self._stop
                )  # told meanwhile: a run must not end without a checkpoint
                if last or (config.checkpoint_every and number % config.checkpoint_every == 0):
                    check_finite(number, torch.tensor(ranks().sum(result.sums.tolist())), worst)
                    log.sync()
                    save_checkpoint(
                        self.folder / "checkpoints",
                        number,
                        engine.optimizer,
                        config.keep_checkpoints,
                        self._inputs,
                        log.lines(),
                    )
                if last:
                    break
        return done

    def _batches(self, order: Order, first: int, last: int, planned: deque[Step]) -> Generator[PackBatch]:
        """Batches of all steps from `first`; each step is put in `planned` when its first pack is asked for."""
        job = self.job

        def packs() -> Iterator[Pack]:
            steps = job.train.with_tokens(order.steps(first, last), job.workers)
            for number, epoch, groups in steps:
                step = self._plan(job.train, number, epoch, groups)
                planned.append(step)
                yield from step.packs

        maker = job.maker(job.train, self.loss.needs_reference)
        return whole(load_packs(maker, packs(), job.workers, job.device.type == "cuda"), job.train)

    def _plan(self, data: PreparedData, number: int, epoch: float, groups: np.ndarray) -> Step:
        """This rank's share of a step."""
        job, here = self.job, ranks()
        step = plan_step(
            data,
            number,
            epoch,
            groups,
            job.tokens_per_pack,
            job.policy.shared,
            here.size,
            job.packs_filled_to,
        )
        return step.for_rank(here.rank)

    def _evaluate(self, engine: Engine, final: bool) -> dict[str, float]:
        """Metrics of the evaluation pairs and benchmarks; none when SIGTERM comes before the last step is done."""
        job, data = self.job, self.job.eval

        def stopped() -> bool:
            return self._stop and not final

        if data is None:
            return self._watcher.metrics(stopped)
        groups = np.array([number for number in range(len(data)) if data.pair_count(number)])
        step = self._plan(data, 0, 0.0, groups)
        maker = job.maker(data, self.loss.needs_reference)
        batches = whole(load_packs(maker, step.packs, job.workers, job.device.type == "cuda"), data)
        balance = self.config.loss.router_aux_weight
        means = evaluate(engine, self.loss, data, step, batches, stopped, balance)
        return means | self._watcher.metrics(stopped)

    def _check_same(self, checkpoint: Path | None) -> None:
        """UserError on all ranks unless they go on from the same checkpoint."""
        names = [name or "none" for name in ranks().gather(checkpoint and checkpoint.name)]
        if len(set(names)) > 1:
            mistake = (
                f"--resume: wanted all ranks to see the same checkpoints in {self.folder}, got {', '.join(names)} as their last: "
                "is train.output on storage that all machines share?"
            )
            ranks().share_mistake(UserError(mistake))

    def _restore(self, engine: Engine, path: Path | None) -> int:
        if path is None:
            return 0
        done = restore_checkpoint(path, engine.optimizer)
        if ranks().main:  # a kill may have come between the newest and the deletion of the oldest
            delete_old(path.parent, self.config.train.keep_checkpoints)
        say(f"resumed from {path}")
        return done

    def _account(self, total: int, done: int) -> str:
        account, policy = self.job.train.account, self.job.policy
        if done >= total:
            return f"nothing to train: the run stands at step {done} of {total}"
        return (
            f"training: {account.pairs:,} {self.loss.unit} in {account.groups:,} groups, steps {done + 1} to {total}, "
            f"prompts {'shared' if policy.shared else 'not shared'}, packs of {self.job.packs_filled_to:,} tokens"
        )

    def _kept(self) -> str:
        """What Ctrl-C leaves of the steps."""
        found = list_checkpoints(self.folder / "checkpoints")
        if not found:
            return "; there is no checkpoint yet (train.checkpoint_every), --resume begins at the first step"
        return f"; the checkpoint {found[-1].name} is kept, go on from it with --resume"

    def _finish_this_step(self) -> None:
        """SIGTERM: end the run after the step that is running, with a checkpoint."""
        self._stop = True
