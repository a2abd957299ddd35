"""The training loop.

    trainer = Trainer(settle(config))
    status = trainer.train()

``settle.py`` has decided device, dtype, data and micro-batch by then. :meth:`Trainer.train` opens the run,
:meth:`Trainer._loop` is the loop. One update is in ``step.py``.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from fastgpt import hardware
from fastgpt.data.loader import BatchLoader
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.verify import ShardVerifier
from fastgpt.errors import RequestError
from fastgpt.model import GPT
from fastgpt.train import checkpoint, introduction, provenance, report, resume, run_folder, samples, trackers
from fastgpt.train.checkpoint_writer import CheckpointWriter
from fastgpt.train.config import divisors
from fastgpt.train.diagnose import CHECKPOINTS, DATA, EVALUATION, NAMED_SIZE, Finding, Monitor, standard_error
from fastgpt.train.log import RunLog, mfu_sentence, plot_losses, read_metrics
from fastgpt.train.memory import keep_freed_memory, ran_out
from fastgpt.train.metrics import Timestamp, UpdateMetrics
from fastgpt.train.run_folder import RunConfig, RunLock
from fastgpt.train.settle import Settled
from fastgpt.train.skipped import SkippedUpdates
from fastgpt.train.step import Batch, RecordingOutOfMemory, TrainStep, leave_default_stream
from fastgpt.train.stop import Interrupted, StopRequest
from fastgpt.units import count_of

Result = TypeVar("Result")

DIVERGED_ADVICE = "A lower --learning_rate or a longer --warmup_iters usually helps."


class Diverged(Exception):
    """The run cannot go on: gradients or weights are not finite. The message is for the user."""


class Trainer:
    """One run, from its initial weights or a checkpoint to its last checkpoint.

    Args:
        settled: the request, as this machine can meet it.

    Attributes:
        config: the request. Its micro-batch shrinks if memory runs out; all else stays.
        step: updates done.
        tokens: trained on so far.
        log_late: whether an update is logged while the next one runs, so that a GPU never waits for the host.

    Raises:
        RequestError: the dataset is too short, or the checkpoint to resume from does not match the request. Nothing of
            an earlier run has been touched by then.
    """

    def __init__(self, settled: Settled) -> None:
        self.settled = settled
        self.config = config = settled.config
        self.device, self.dtype, self.run_dir = settled.device, settled.dtype, settled.run_dir
        self.lock = RunLock(self.run_dir)
        self.shards = ShardVerifier(settled.dataset)
        self.resumed_from: Path | None = None
        self._damage: list[str] = []  # of newer checkpoints
        self._steps_found: list[int] = []  # those with a checkpoint, before the lock is held
        if config.init_from == "resume":
            found = resume.find(self.run_dir, config, settled.gpt_config, settled.dataset)
            self.resumed_from, self._damage = found
            self._steps_found = checkpoint.steps(self.run_dir)
        self.loaders = {
            split: BatchLoader(
                shards, config.micro_batch_size, config.block_size, seed=config.seed,
                pin_memory=self.device.type == "cuda", what=f"the {name} split of {config.dataset}",
                names=[str(file) for file in settled.dataset.files(split)], vocab_size=settled.gpt_config.vocab_size,
            )
            for split, shards, name in (
                ("train", settled.dataset.train, "training"), ("val", settled.dataset.val, "validation"),
            )
        }  # fmt: skip

        leave_default_stream(self.device)  # before any work is queued on it
        self.batches = Prefetcher(self.loaders["train"], self.device)
        torch.manual_seed(config.seed)
        self.model = GPT(settled.gpt_config, config.recompute, config.deterministic)
        if settled.initial is not None:
            self.model.load_state_dict(settled.initial)
        self.train_step = TrainStep(
            self.model,
            device=self.device,
            dtype=self.dtype,
            accumulation=config.accumulation_at(0),
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip or None,
            state_bits=config.state_bits,
            muon=config.optimizer == "muon",
            muon_lr_ratio=config.muon_lr_ratio,
            momentum=config.momentum,
            skip_spikes=config.skip_spikes,
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
        )
        # Stays when the micro-batch is halved, or when a resumed run has another one: evaluations are compared batch
        # by batch, so each must see the same tokens.
        self.eval_batch_size = config.micro_batch_size
        self.step = self.tokens = 0
        self._n_evaluations = 0  # in this process
        self.val_loss: tuple[int, float] | None = None  # of the last evaluation, and its step
        self.best_val_loss: float | None = None  # among the checkpoints
        self.best_step: int | None = None
        self._from_old_checkpoint = False  # one that does not state when the run was last evaluated
        self._not_logged: deque[UpdateMetrics] = deque()
        self.skipped = SkippedUpdates(self.loaders["train"])
        self._flops_per_second: float | None = None  # of the update logged last
        self._n_damaged = 0  # lines of metrics.jsonl
        self._ending = False  # because of an error
        self.log_late = self.device.type == "cuda"
        self.log = RunLog(self.run_dir / run_folder.METRICS, config.max_iters, work=config.tokens_before)
        self.stop = StopRequest(self.run_dir, config.max_hours)
        self.writer = CheckpointWriter(self.run_dir)
        if self.resumed_from is not None:
            self._load(self.resumed_from)
        self.monitor = Monitor(settled.facts())
        if self.resumed_from is not None:
            self._replay_metrics()

    # ---- the loop ----

    def train(self) -> int:
        """Run to the end, to the time limit or to a signal; returns the exit status."""
        with self.lock:
            if self.resumed_from is not None and checkpoint.steps(self.run_dir) != self._steps_found:
                raise RequestError(f"another process has trained in {self.run_dir} meanwhile; start again")
            new = self.config.init_from != "resume"
            little_room = run_folder.check_room(self.run_dir, *self._checkpoints_to_come(), replaced=new)
            if new:
                run_folder.clear(self.run_dir)
            tokenizer = self.settled.tokenizer.to_meta() if self.settled.tokenizer else None
            run_config = RunConfig(asdict(self.config), self.settled.gpt_config, tokenizer, self.settled.left_open)
            run_folder.write_config(self.run_dir, run_config)
            if self.device.type == "cpu":
                keep_freed_memory()
            with self.stop:
                self.log.trackers = trackers.start(self.config, self.run_dir, self.step)
                with self.log:
                    self._introduce()
                    if little_room is not None:
                        self.log.say(little_room)
                    self.log.note("start", step=self.step, **provenance.of(self.settled))
                    start = time.perf_counter()
                    status = self._run()
                    self.log.note(
                        "end", step=self.step, time=provenance.now(), status=status, reason=self._why_ended(status),
                        seconds=time.perf_counter() - start, peak_bytes=provenance.peak_bytes(self.device),
                    )  # fmt: skip
                    self._conclude()
                    if status == 0:
                        self._plot()  # a signal's grace may be too short for pictures
        return status

    def _why_ended(self, status: int) -> str:
        if self.stop.requested and self.step < self.config.max_iters:
            return f"stopped by {self.stop.reason}"
        return "done" if status == 0 else "failed"

    def _run(self) -> int:
        try:
            try:
                status = self._loop()
                self._wait_for_checkpoint()
                return status
            except Interrupted:  # in the middle of an update or an evaluation
                self._log_updates(keep=0)
                return self._stop()
        except KeyboardInterrupt:
            self.lock.until_exit = not self.writer.idle
            raise
        except Diverged as error:
            self._wait_and_report()
            self.log.say(str(error))
            return 1
        except RequestError:  # the data or the memory of the next update, which is abandoned
            self._ending = True
            self._wait_and_report()
            if self.step not in checkpoint.steps(self.run_dir):
                with suppress(RequestError, Diverged, checkpoint.NotSaved):
                    self._save()
            raise
        except checkpoint.NotSaved as error:
            left = checkpoint.steps(self.run_dir)
            newest = f"the newest is of step {left[-1]}" if left else "there is none"
            self.log.say(f"the checkpoint of step {self.step} could not be written ({error}); {newest}")
            return 1
        except Exception:
            self._ending = True
            self._wait_and_report()
            raise

    def _loop(self) -> int:
        config = self.config
        if config.eval_only:
            self._evaluate()
            return 0
        if self._evaluation_is_missing():
            self._evaluate()
            if self.step:  # the checkpoint may turn out to be the best one
                self._save_in_background()
        since = Timestamp(self.device, self.step)  # the next logged time is the mean over the updates since then
        while self.step < config.max_iters:
            self.shards.check()
            if self.writer.idle:
                self._wait_and_report()
            lr = self.update()
            self.tokens += config.tokens_at(self.step)
            self.step += 1

            last = self.step == config.max_iters
            stopping = not last and self.stop.requested
            evaluating = last or self.step % config.eval_interval == 0
            saving = self.stop.take_save_request() or last or self._checkpoint_is_due(evaluating)
            logging = last or self.step % config.log_interval == 0
            if logging:
                self._not_logged.append(UpdateMetrics(self.train_step, self.step, self.tokens, lr, since))
                since = self._not_logged[-1].end
            # An evaluation or a checkpoint waits for the device anyway, so nothing is gained by logging after it.
            self._log_updates(keep=int(self.log_late and logging and not (evaluating or saving or stopping)))
            if stopping:
                return self._stop()

            if evaluating:
                self._evaluate()
                saving = saving and (config.always_save_checkpoint or self._is_best())
            if last:
                self._wait_for_shards()
                self._save()
            elif saving:
                self._save_in_background()
            if evaluating or saving:
                since = Timestamp(self.device, self.step)  # their time is not an update's
        return 0

    def _stop(self) -> int:
        """Save a checkpoint before the end of the run; returns the exit status."""
        path = self._save()
        self.stop.remove_file()
        self.log.say(f"stopped by {self.stop.reason} at step {self.step}; --init_from resume continues: {path}")
        return self.stop.exit_status

    def update(self) -> float:
        """One update; returns its learning rate. ``step`` and ``tokens`` do not count it yet.

        After an error the run stands where it stood before the update.

        Raises:
            Interrupted: a signal was received.
            RequestError: the data are damaged, or no micro-batch fits the memory.
        """
        lr, number = self.config.learning_rate_at(self.step), self.step + 1
        self.train_step.set_accumulation(self.config.accumulation_at(self.step))
        position, random_state = self.batches.state_dict(), checkpoint.random_state()
        self.skipped.begin(number, position)

        def next_batch() -> Batch:
            if self.batches.state_dict() != position:  # between two micro-batches
                self.stop.check()
            return self._next_batch()

        try:
            self._in_memory(lambda: self.train_step(next_batch, lr, number))
        except (Interrupted, RequestError):  # back to the start of the update, as if it had not begun
            self.train_step.start_over(self.config.accumulation_at(self.step))
            self.batches.load_state_dict(position)
            checkpoint.set_random_state(random_state)
            raise
        return lr

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = self.batches.next()
        # A GPU that still has work queued did not wait for this batch.
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self.monitor.time_spent(DATA, time.perf_counter() - start)
        return batch

    # ---- when memory runs out ----

    def _in_memory(self, work: Callable[[], Result]) -> Result:
        """The result of ``work``. While it runs out of memory, it is repeated with less to hold.

        Raises:
            RequestError: nothing is left to give up.
        """
        freed_graphs = False
        while True:
            position = self.batches.state_dict()
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                recording = isinstance(error, RecordingOutOfMemory)
                # An evaluation may need the memory that recorded graphs hold; the next update records them again.
                free_graphs = self.train_step.has_graphs and not recording and not freed_graphs
                smaller = self._smaller_micro_batch()
                has_copies = self.device.type == "cpu" and self.writer.has_copies
                if smaller is None and not recording and not free_graphs and not has_copies:
                    remedy = ", --state_bits 8" if self.config.state_bits == 32 else ""
                    raise RequestError(
                        f"out of memory with micro-batches of {self.config.batch_size}: a smaller --batch_size{remedy} "
                        "or --recompute block takes less"
                    ) from error
            # Only here, after the exception is gone: it holds the frames, and they hold what filled the memory.
            if self.device.type == "cpu" and self.writer.free_copies():
                self.batches.load_state_dict(position)
                continue
            freed_graphs = free_graphs
            if free_graphs:
                self.train_step.free_graphs()
            elif smaller is not None:
                self.shrink_micro_batch(smaller)
            else:
                self.train_step.do_without_graphs()
                self.log.say("out of memory while CUDA graphs were recorded: continuing without them")
            if self.device.type == "cuda":
                gc.collect()  # a frame that holds tensors may be part of a reference cycle
                torch.cuda.empty_cache()
            self.batches.load_state_dict(position)

    def _smaller_micro_batch(self) -> int | None:
        """Half the micro-batch or less, such that an update keeps its tokens; ``None`` if the user chose it."""
        sequences = self.config.tokens_at(0) // self.config.block_size
        half = self.config.micro_batch_size // 2
        found = [n for n in divisors(sequences) if n <= half]
        return max(found, default=None) if self.settled.resizable else None

    def shrink_micro_batch(self, smaller: int) -> None:
        """Continue with micro-batches of ``smaller`` sequences, and more of them in an update."""
        self.config = config = self.config.with_batch_size(smaller)
        for loader in self.loaders.values():
            loader.batch_size = smaller
        self.train_step.start_over(config.accumulation_at(self.step))
        self.log.say(
            f"out of memory: continuing with micro-batches of {smaller}, {config.gradient_accumulation_steps} in an "
            f"update of {config.tokens_per_step:,} tokens as before"
        )

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, split: str) -> list[float]:
        """Losses of ``eval_iters`` batches without dropout. The batches are the same in every evaluation."""
        losses = []
        self.model.eval()
        try:
            for x, y in self.loaders[split].evenly_spaced(self.config.eval_iters, self.eval_batch_size):
                self.stop.check()
                losses.append(self._loss(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)))
        finally:
            self.model.train()
        return torch.stack(losses).tolist()  # one wait for the device, not one a batch

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean loss of a batch ``(x, y)``, (B, T), in parts of at most a micro-batch. 0-dim."""
        size = self.config.micro_batch_size
        if len(x) <= size:
            return self.train_step.forward(x, y)
        parts = list(zip(x.split(size), y.split(size), strict=True))
        losses = torch.stack([self.train_step.forward(*part) for part in parts])
        return losses @ losses.new_tensor([len(part[0]) / len(x) for part in parts])  # the last part may be smaller

    def _evaluation_is_missing(self) -> bool:
        """Whether this step should have been evaluated: the first one, or one at which the run was interrupted."""
        due = self.step % self.config.eval_interval == 0 or self.step == self.config.max_iters
        return due and (self.val_loss is None or self.val_loss[0] != self.step) and not self._from_old_checkpoint

    def _is_best(self) -> bool:
        """Whether the last evaluation has found the lowest validation loss among the checkpoints."""
        assert self.val_loss is not None
        self._wait_and_report()  # it may have been the best
        return self.best_val_loss is None or self.val_loss[1] < self.best_val_loss

    def _evaluate(self) -> None:
        start = time.perf_counter()
        train, val = (self._in_memory(partial(self.evaluate, split)) for split in ("train", "val"))
        seconds = time.perf_counter() - start
        self.val_loss = self.step, fmean(val)
        self.log.evaluate(
            step=self.step,
            train_loss=fmean(train),
            val_loss=fmean(val),
            val_loss_error=standard_error(val) if len(val) > 1 else None,
        )
        self._report(self.monitor.evaluation(self.step, train, val))
        start = time.perf_counter()
        self._sample()
        seconds += time.perf_counter() - start
        if self._n_evaluations:  # not the first, which compiles kernels; the first update does not count either
            self.monitor.time_spent(EVALUATION, seconds)
        self._n_evaluations += 1

    def _sample(self) -> None:
        """Write down what the model writes at this step, for the report."""
        tokenizer = self.settled.tokenizer
        if tokenizer is None:
            return
        prompt = samples.prompt_of(self.settled.dataset)
        text = samples.sample(self.model, tokenizer, prompt, self.config.seed, self.stop.check)
        if text is not None:
            self.log.note("sample", step=self.step, prompt=tokenizer.decode(prompt), text=text)

    # ---- logging ----

    def _log_updates(self, keep: int) -> None:
        """Log finished updates, all but the last ``keep``.

        Raises:
            Diverged: too many in a row were skipped. A checkpoint has been saved if the weights are finite.
        """
        while len(self._not_logged) > keep:
            metrics = self._not_logged.popleft()
            self._log_update(metrics)
            self._report_skipped(metrics)

    def _log_update(self, metrics: UpdateMetrics) -> None:
        seconds, loss, grad_norm = metrics.seconds(), metrics.loss(), metrics.grad_norm()
        first, last = metrics.first, metrics.step  # the time is the mean of these updates
        tokens = (self.config.tokens_before(last) - self.config.tokens_before(first)) / (last - first)
        flops = self.settled.gpt_config.flops_per_token * tokens / seconds
        peak = hardware.peak_flops(self.device, self.dtype)
        self._flops_per_second = flops
        self.log.train(
            step=metrics.step,
            loss=loss,
            lr=metrics.lr,
            grad_norm=grad_norm,
            tokens=metrics.tokens,
            ms=seconds * 1e3,
            tokens_per_s=tokens / seconds,
            tflops=flops / 1e12,
            mfu=flops / peak if peak else None,
        )
        self._report(self.monitor.update(metrics.step, loss, grad_norm, metrics.lr, seconds))

    def _report(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            self.log.find(step=finding.step, code=finding.code, text=finding.text)

    def _report_skipped(self, metrics: UpdateMetrics) -> None:
        """Report updates that were skipped since the last report; raise ``Diverged`` if they are too many in a row."""
        in_a_row = metrics.most_in_a_row()
        ending = in_a_row >= self.config.max_skipped_updates
        # In fp16 gradients overflow now and then, because that is how the loss scale is found.
        overflows = ending or self.dtype != torch.float16
        found = self.skipped.report(
            metrics, overflows=overflows, sigmas=self.config.skip_spikes,
            micro_batches=self.config.accumulation_at,
        )  # fmt: skip
        if found is not None:
            text, blocks = found
            self.log.find(step=metrics.step, code="skipped", text=text, blocks=blocks)
        if ending:
            try:
                saved = f"The weights are saved, beside earlier ones: {self._save()}"
            except checkpoint.NotSaved as error:
                saved = f"The weights could not be saved: {error}"
            raise Diverged(
                f"the gradients of {count_of(in_a_row, 'update')} in a row were not finite, up to step {metrics.step}: "
                f"the run ends. {saved}. {DIVERGED_ADVICE}"
            )

    def _introduce(self) -> None:
        known = self.monitor.findings
        # A model of another size than its preset's name says is reported before anything else.
        self._report([finding for finding in known if finding.code == NAMED_SIZE])
        for line in introduction.lines(self.settled, self.step):
            self.log.say(line)
        for problem in self._damage:
            self.log.say(f"{problem}: resuming from {self.resumed_from}")
        if self._n_damaged:
            self.log.say(f"{run_folder.METRICS}: skipped {count_of(self._n_damaged, 'damaged line')}")
        self._report([finding for finding in known if finding.code != NAMED_SIZE])

    def _conclude(self) -> None:
        """Say the speed, and all findings once more."""
        if self._flops_per_second is not None:
            device, peak = hardware.device_name(self.device), hardware.peak_flops(self.device, self.dtype)
            self.log.say(f"speed: {mfu_sentence(self._flops_per_second, peak, device, self.dtype)}")
        if self.monitor.findings:
            self.log.say("findings:")
        for finding in self.monitor.findings:
            self.log.say(f"- {finding.text}")

    def _plot(self) -> None:
        plot, n_params = self.run_dir / run_folder.PLOT, self.settled.gpt_config.n_params
        title = f"{self.config.preset}: {n_params / 1e6:.1f}M parameters, {self.tokens / 1e6:.1f}M tokens"
        try:
            plot_losses(self.run_dir / run_folder.METRICS, plot, title)
            self.log.say(f"loss plot: {plot}")
            report.write([self.run_dir], self.run_dir / run_folder.REPORT)
            self.log.say(f"report: {self.run_dir / run_folder.REPORT}")
        except Exception as error:  # such as a library that does not fit ulimit -v; the run itself is complete
            self.log.say(f"no plot or no report: {error}")

    # ---- checkpoints ----

    def _checkpoint_is_due(self, evaluating: bool) -> bool:
        interval = self.config.checkpoint_interval
        return self.step % interval == 0 if interval else evaluating

    def _checkpoints_to_come(self) -> tuple[int, int]:
        """How many checkpoints the disk has to hold besides those that are there, and the bytes of one."""
        config = self.config
        to_write = -(-(config.max_iters - self.step) // (config.checkpoint_interval or config.eval_interval))
        # the newest ones, the best one, and the one that is being written
        there = len(checkpoint.steps(self.run_dir)) if config.init_from == "resume" else 0
        at_most = config.keep_checkpoints + 2 - there
        model = self.settled.gpt_config
        size = checkpoint.n_bytes(model, config.state_bits, config.optimizer)
        return min(to_write, max(1, at_most)), size

    def _save(self) -> Path:
        """Save a checkpoint, and wait until it is on the disk.

        Raises:
            RequestError: a shard of the dataset has been found to be damaged.
            Diverged: the weights are not finite.
            NotSaved: the disk does not take it.
        """
        self._save_in_background(before_writing=self.shards.check)
        self._wait_for_checkpoint()
        return checkpoint.folder(self.run_dir, self.step)

    def _wait_for_shards(self) -> None:
        """Wait until the shards have been compared: what is saved comes from the data that it says it comes from."""
        self.shards.wait(give_up=lambda: self.stop.requested or self._ending)

    def _wait_for_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, and note if it is the best. The errors are those of `_save`"""
        start = time.perf_counter()
        state = self.writer.wait()
        if state is not None:
            self.best_val_loss, self.best_step = state.best_val_loss, state.best_step
        self.monitor.time_spent(CHECKPOINTS, time.perf_counter() - start)

    def _wait_and_report(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. If the disk does not take it, say so only."""
        try:
            self._wait_for_checkpoint()
        except checkpoint.NotSaved as error:
            self.log.say(f"no checkpoint at step {self.writer.step}: {error}; the run goes on")

    def _save_in_background(self, before_writing: Callable[[], None] | None = None) -> None:
        """Save a checkpoint while training goes on. After skipped updates, earlier ones are kept: they may be better.

        Args:
            before_writing: waits for the shards if ``None``.

        Raises:
            Diverged: the weights are not finite.
        """
        self._wait_and_report()
        start = time.perf_counter()
        evaluated, loss = self.val_loss or (-1, math.inf)
        best_val_loss, best_step = self.best_val_loss, self.best_step
        if evaluated == self.step and loss < (math.inf if best_val_loss is None else best_val_loss):
            best_val_loss, best_step = loss, self.step
        step = self.train_step
        extremes = torch.stack(torch.aminmax(step.store.master))  # NaN if one weight is; isfinite takes temporaries
        if not extremes.isfinite().all():
            raise Diverged(
                f"the weights are not finite at step {self.step}: the run has diverged and ends without another "
                f"checkpoint. {DIVERGED_ADVICE}"
            )
        state = checkpoint.State(
            step=self.step,
            best_val_loss=best_val_loss,
            best_step=best_step,
            evaluated_step=evaluated,
            data=checkpoint.DataOrigin(str(self.settled.dataset.path), self.settled.dataset.identity),
            tokens=self.tokens,
            loader=self.batches.state_dict(),
            model=self.settled.gpt_config,
            state_bits=self.config.state_bits,
            optimizer=self.config.optimizer,
            eval_batch_size=self.eval_batch_size,
            reported_skipped=self.skipped.skipped,
            reported_spikes=self.skipped.spikes,
            **step.state_dict(),
        )
        keep = None if state.skipped_in_a_row else self.config.keep_checkpoints
        self.writer.start(
            state, step.store, step.moments, keep, self.best_step, before_writing or self._wait_for_shards
        )
        self.monitor.time_spent(CHECKPOINTS, time.perf_counter() - start)

    def _load(self, path: Path) -> None:
        state, step = checkpoint.load_state(path), self.train_step
        step.store.load(checkpoint.load_parameters(path, step.store.named(step.store.master)))
        moments = {kind: step.store.named(flat, kind) for kind, flat in step.moments.items()}
        for kind, named in checkpoint.load_moments(path, moments).items():
            for name, tensor in named.items():
                moments[kind][name].copy_(tensor)
        checkpoint.set_random_state(checkpoint.load_random_state(path))
        try:
            step.load_state_dict(vars(state), state.step)
        except ValueError as error:
            raise RequestError(f"{path / 'state.json'}: {error}") from error
        reported = [
            total if told is None else told
            for total, told in ((state.skipped, state.reported_skipped), (state.spikes, state.reported_spikes))
        ]
        self.skipped = SkippedUpdates(self.loaders["train"], *reported)
        self.eval_batch_size = state.eval_batch_size or self.eval_batch_size
        self.step, self.tokens = state.step, state.tokens
        self.best_val_loss, self.best_step = state.best_val_loss, state.best_step
        self._from_old_checkpoint = state.evaluated_step is None
        if state.evaluated_step == state.step:
            self.val_loss = state.step, math.inf  # its loss counts in best_val_loss already
        self.batches.load_state_dict(state.loader)

    def _replay_metrics(self) -> None:
        """Give the diagnosis what the run logged before. What it finds in that has been reported already."""
        path = self.run_dir / run_folder.METRICS
        if not path.exists():
            return
        records = read_metrics(path)
        self._n_damaged = len(records["damaged"])
        for record in records["train"]:
            if record["step"] <= self.step:
                loss = math.nan if record["loss"] is None else record["loss"]
                self.monitor.update(record["step"], loss, record["grad_norm"], record["lr"])
