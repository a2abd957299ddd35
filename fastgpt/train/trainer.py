"""The training loop."""

import gc
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, TypeVar

import torch

from fastgpt import hardware
from fastgpt.data.loader import BatchLoader
from fastgpt.data.prefetch import Prefetcher
from fastgpt.data.prepare import prepare
from fastgpt.data.shards import Dataset, open_dataset
from fastgpt.errors import RequestError
from fastgpt.kernels import dispatch
from fastgpt.model import GPT
from fastgpt.model.config import GPT2_VOCABULARY, padded_vocab_size
from fastgpt.train import checkpoint, run_folder, trackers
from fastgpt.train.config import AUTO, TrainConfig
from fastgpt.train.diagnose import (
    CHECKPOINTS,
    DATA,
    EVALUATION,
    NAMED_SIZE,
    Facts,
    Finding,
    Monitor,
    standard_error,
    wanted_tokens_per_step,
)
from fastgpt.train.log import RunLog, mfu_sentence, plot_losses, read_metrics
from fastgpt.train.memory import keep_freed_memory, ran_out
from fastgpt.train.predict import micro_batch, roofline
from fastgpt.train.predict.trace import Setup
from fastgpt.train.reading import Moment, Reading
from fastgpt.train.schedule import learning_rate
from fastgpt.train.step import Batch, RecordingOutOfMemory, TrainStep, leave_default_stream

Result = TypeVar("Result")


class Trainer:
    """One run, from its configuration to its last checkpoint.

    Args:
        config: what to do.

    Raises:
        RequestError: the dataset, the device, the model or the folder does not fit the request; nothing of an
            earlier run has been touched by then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = hardware.find_device(config.device)
        self.dtype = config.torch_dtype(hardware.training_dtype(self.device))
        try:
            dispatch.backend_of(self.device, self.dtype)
        except RuntimeError as error:
            raise RequestError(str(error)) from error
        trackers.check(config)
        resuming = config.init_from == "resume"
        self.run = Path(config.out_dir) if resuming else run_folder.check(config)
        self.dataset = _open_or_prepare(config)
        self.tokenizer = self.dataset.tokenizer()
        # bare token files do not tell their vocabulary, and are taken for GPT-2's
        self.model_config = config.model(padded_vocab_size(self.dataset.vocab_size or GPT2_VOCABULARY))
        self._resizable = config.batch_size == AUTO
        self.config = config = self._settled(config)
        resumed = self._find_checkpoint() if resuming else None
        pin = self.device.type == "cuda"
        self.loaders = {
            split: BatchLoader(
                shards, config.batch_size, config.block_size, seed=config.seed, pin_memory=pin,
                what=f"the {name} split of {config.dataset}",
            )
            for split, shards, name in (
                ("train", self.dataset.train, "training"), ("val", self.dataset.val, "validation"),
            )
        }  # fmt: skip

        leave_default_stream(self.device)
        self.batches = Prefetcher(self.loaders["train"], self.device)
        torch.manual_seed(config.seed)
        self.model = GPT(self.model_config, config.recompute, config.deterministic)
        self.train_step = TrainStep(
            self.model,
            device=self.device,
            dtype=self.dtype,
            accumulation=config.gradient_accumulation_steps,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip or None,
            state_bits=config.state_bits,
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
        )
        # stays when the micro-batch is halved or a resumed run has another: evaluations are compared block by block
        self.eval_batch_size = config.batch_size
        self.step = self.tokens = 0
        self.val_loss: tuple[int, float] | None = None  # of the last evaluation, and its step
        self.best_val_loss: float | None = None  # among the checkpoints
        self.best_step: int | None = None
        self._readings: deque[Reading] = deque()  # of updates that are to be logged yet
        self._flops_per_second: float | None = None  # of the update logged last
        # A GPU tells of an update once the next one is under way, so that it never waits for the host.
        self._late = self.device.type == "cuda"
        if resumed is not None:
            self._load(resumed)
        self.diagnosis = Monitor(self._facts())
        if resumed is not None:
            self._recall()
        self._signal: int | None = None

    def _settled(self, config: TrainConfig) -> TrainConfig:
        """The request with what it leaves to the device; predicts the step on the way."""
        self.memory, _ = hardware.memory(self.device)
        # On a CPU only where a choice depends on it: measuring its ceilings and counting take two seconds.
        known = hardware.known_gpu(self.device) is not None
        machine = roofline.at_hand(self.device, self.dtype) if known or config.batch_size == AUTO else None
        setup = Setup(
            self.model_config, config.batch_size, self.device.type, self.dtype, config.state_bits,
            deterministic=config.deterministic,
        )  # fmt: skip
        found: list[micro_batch.Choice] = []
        if machine is not None and config.batch_size == AUTO:
            kinds = micro_batch.kinds_of_recompute(config, setup.device_type)
            found = micro_batch.choices(setup, machine, self.memory.amount, config.total_batch_size, kinds)
        config = micro_batch.settle(config, setup, self.memory, found)
        setup = replace(setup, batch_size=config.batch_size, recompute=config.recompute)
        self.prediction = roofline.predict(setup, machine) if machine is not None else None
        return config

    # ---- the loop ----

    def train(self) -> int:
        """Run to the end, to the time limit or to a signal; returns the exit status."""
        config = self.config
        if config.init_from == "scratch":
            run_folder.clear(self.run)
        tokenizer = self.tokenizer.to_meta() if self.tokenizer else None
        run_folder.write_config(self.run, config, self.model_config, tokenizer)
        if self.device.type == "cpu":
            keep_freed_memory()
        deadline = time.monotonic() + (config.max_hours * 3600 or math.inf)
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            told = trackers.start(config, self.run, self.step)
            with RunLog(self.run / run_folder.METRICS, config.max_iters, trackers=told) as log:
                known = self.diagnosis.findings
                self._tell(log, [finding for finding in known if finding.code == NAMED_SIZE])
                for line in self._introduction():
                    log.say(line)
                self._tell(log, [finding for finding in known if finding.code != NAMED_SIZE])
                status = self._loop(log, deadline)
                self._conclude(log)
                if status == 0:
                    plot = self.run / run_folder.PLOT
                    try:
                        plot_losses(self.run / run_folder.METRICS, plot, title=self._title())
                        log.say(f"loss plot: {plot}")
                    except Exception as error:  # such as a library that ulimit -v leaves no room for; the run is done
                        log.say(f"no loss plot: {error}")
                return status
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _loop(self, log: RunLog, deadline: float) -> int:
        config = self.config
        if self.step == 0:
            self._evaluate(log)
        started = Moment(self.device, self.step)  # of the updates that the next line's time is the mean of
        while self.step < config.max_iters:
            rate = self._update(log)
            self.step += 1
            self.tokens += config.tokens_per_step
            last = self.step == config.max_iters
            stopping = not last and (self._signal is not None or time.monotonic() > deadline)
            logged = last or self.step % config.log_interval == 0
            evaluated = last or self.step % config.eval_interval == 0
            saved = last or stopping or self._checkpoint_is_due(evaluated)
            if logged:
                self._readings.append(Reading(self.train_step, self.step, self.tokens, rate, started))
                started = self._readings[-1].end
            waiting = int(self._late and logged and not (evaluated or saved))
            if self._diverged(log, waiting):
                return 1
            if evaluated:
                self._evaluate(log)
            path = self._save() if saved else None
            if evaluated or saved:
                started = Moment(self.device, self.step)
            if stopping:
                why = "the time limit" if self._signal is None else signal.Signals(self._signal).name
                log.say(f"stopped by {why} at step {self.step}: {path}; --init_from resume goes on from there")
                return 0 if self._signal is None else 128 + self._signal
        return 0

    def _update(self, log: RunLog) -> float:
        """One update; returns its learning rate."""
        config = self.config
        rate = learning_rate(
            self.step, peak=config.learning_rate, floor=config.min_lr, warmup_iters=config.warmup_iters,
            decay_iters=config.lr_decay_iters,
        )  # fmt: skip
        self._in_memory(lambda: self.train_step(self._next_batch, rate), log)
        return rate

    def _in_memory(self, work: Callable[[], Result], log: RunLog) -> Result:
        """What ``work`` returns; if memory runs out, without recorded graphs or with smaller micro-batches."""
        graphs_freed = False
        while True:
            place = self.batches.state_dict()
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                smaller = self._smaller_micro_batch()
                recording = isinstance(error, RecordingOutOfMemory)
                # What a graph holds is free again once it is gone: an evaluation may need it.
                graphs_freed = not graphs_freed and not recording and self.train_step.free_graphs()
                if smaller is None and not recording and not graphs_freed:
                    raise RequestError(
                        f"out of memory with micro-batches of {self.config.batch_size}: a smaller --batch_size, "
                        "--recompute block or --state_bits 8 take less"
                    ) from error
            # not before the exception is gone, which holds what filled the memory
            if recording and smaller is None:
                self.train_step.do_without_graphs()
                log.say("out of memory where CUDA graphs are recorded: going on without them")
            elif not graphs_freed and smaller is not None:
                self._shrink(smaller, log)
            self._give_memory_back()
            self.batches.load_state_dict(place)

    def _give_memory_back(self) -> None:
        if self.device.type == "cuda":
            gc.collect()  # a frame that holds tensors may lie in a cycle
            torch.cuda.empty_cache()

    def _next_batch(self) -> Batch:
        start = time.perf_counter()
        batch = self.batches.next()
        # a GPU that is still at work did not wait for it
        if self.device.type != "cuda" or torch.cuda.current_stream(self.device).query():
            self.diagnosis.time_spent(DATA, time.perf_counter() - start)
        return batch

    def _smaller_micro_batch(self) -> int | None:
        """Half or less, such that an update can have as many tokens as before; ``None`` where it is not ours to say."""
        sequences = self.config.tokens_per_step // self.config.block_size
        half = self.config.batch_size // 2
        return max((n for n in range(1, half + 1) if sequences % n == 0), default=None) if self._resizable else None

    def _shrink(self, smaller: int, log: RunLog) -> None:
        """Go on with smaller micro-batches, and as many more of them."""
        self.config = config = self.config.with_batch_size(smaller)
        for loader in self.loaders.values():
            loader.batch_size = smaller
        self.train_step.start_over(config.gradient_accumulation_steps)
        log.say(
            f"out of memory: going on with micro-batches of {smaller}, {config.gradient_accumulation_steps} in an "
            f"update of {config.tokens_per_step:,} tokens as before"
        )

    # ---- evaluation, logging, checkpoints ----

    @torch.no_grad()
    def evaluate(self, split: str) -> list[float]:
        """Losses in eval mode of ``eval_iters`` batches: the same ones at every evaluation."""
        self.model.eval()
        batches = self.loaders[split].evenly_spaced(self.config.eval_iters, self.eval_batch_size)
        losses = [self._loss(*(t.to(self.device, non_blocking=True) for t in batch)) for batch in batches]
        self.model.train()
        return torch.stack(losses).tolist()

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch of any size, in micro-batches."""
        size = self.config.batch_size
        if len(x) <= size:
            return self.train_step.forward(x, y)
        parts = list(zip(x.split(size), y.split(size), strict=True))
        losses = torch.stack([self.train_step.forward(*part) for part in parts])
        return losses @ losses.new_tensor([len(part[0]) / len(x) for part in parts])

    def _evaluate(self, log: RunLog) -> None:
        start = time.perf_counter()
        train, val = (self._in_memory(partial(self.evaluate, split), log) for split in ("train", "val"))
        self.diagnosis.time_spent(EVALUATION, time.perf_counter() - start)
        self.val_loss = self.step, fmean(val)
        log.evaluate(
            step=self.step,
            train_loss=fmean(train),
            val_loss=fmean(val),
            val_loss_error=standard_error(val) if len(val) > 1 else None,
        )
        self._tell(log, self.diagnosis.evaluation(self.step, train, val))

    def _tell(self, log: RunLog, findings: Sequence[Finding]) -> None:
        for finding in findings:
            log.find(step=finding.step, code=finding.code, text=finding.text)

    def _diverged(self, log: RunLog, waiting: int) -> bool:
        """Log all updates that are to be but the last ``waiting``; whether the loss of one is no number."""
        while len(self._readings) > waiting:
            reading = self._readings.popleft()
            self._log_update(log, reading)
            if not math.isfinite(reading.loss()):
                log.say(
                    f"the loss is {reading.loss()} at step {reading.step}: the run has diverged and stops here, "
                    "without a checkpoint; a lower --learning_rate or a longer --warmup_iters usually mends it"
                )
                return True
        return False

    def _log_update(self, log: RunLog, reading: Reading) -> None:
        seconds = reading.seconds()
        self._flops_per_second = flops = self.model_config.flops_per_token * self.config.tokens_per_step / seconds
        peak = hardware.peak_flops(self.device, self.dtype)
        log.train(
            step=reading.step,
            loss=reading.loss(),
            lr=reading.lr,
            grad_norm=reading.grad_norm(),
            tokens=reading.tokens,
            ms=seconds * 1e3,
            tokens_per_s=self.config.tokens_per_step / seconds,
            tflops=flops / 1e12,
            mfu=flops / peak if peak else None,
        )
        self._tell(log, self.diagnosis.update(reading.step, reading.loss(), reading.grad_norm(), reading.lr, seconds))

    def _checkpoint_is_due(self, evaluated: bool) -> bool:
        interval = self.config.checkpoint_interval
        return self.step % interval == 0 if interval else evaluated

    def _save(self) -> Path:
        start = time.perf_counter()
        evaluated, loss = self.val_loss or (-1, math.inf)
        if evaluated == self.step and loss < (math.inf if self.best_val_loss is None else self.best_val_loss):
            self.best_val_loss, self.best_step = loss, self.step
        state = checkpoint.State(
            step=self.step,
            best_val_loss=self.best_val_loss,
            best_step=self.best_step,
            tokens=self.tokens,
            loader=self.batches.state_dict(),
            model=asdict(self.model_config),
            state_bits=self.config.state_bits,
            loss_scale=self.train_step.loss_scale,
            updates_since_overflow=self.train_step.updates_since_overflow,
            eval_batch_size=self.eval_batch_size,
            optimizer_seeds=[group["seed"] for group in self.train_step.optimizer.param_groups if "seed" in group],
        )
        moments = {kind: self.train_step.store.named(flat) for kind, flat in self.train_step.moments.items()}
        path = checkpoint.save(self.run, state, self.train_step.store.named(self.train_step.store.master), moments)
        self.diagnosis.time_spent(CHECKPOINTS, time.perf_counter() - start)
        return path

    def _find_checkpoint(self) -> Path:
        """The checkpoint to resume from, its architecture and its moments checked."""
        path = checkpoint.newest(self.run)
        state = checkpoint.load_state(path)
        saved, wanted = state.model, asdict(self.model_config)
        free = {"dropout"}  # may change from one part of a run to the next
        if any(saved[name] != wanted[name] for name in saved if name not in free):
            raise RequestError(
                f"cannot resume: {path} holds a model of {_shape(saved)}, the request is {_shape(wanted)}"
            )
        if state.state_bits != self.config.state_bits:
            raise RequestError(
                f"cannot resume: {path} holds moments of {state.state_bits} bits; pass --state_bits {state.state_bits}"
            )
        return path

    def _load(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        self.train_step.store.load(checkpoint.load_parameters(path))
        for kind, named in checkpoint.load_moments(path).items():
            for name, view in self.train_step.store.named(self.train_step.moments[kind]).items():
                view.copy_(named[name])
        for optimizer_state in self.train_step.optimizer.state.values():
            optimizer_state["step"].fill_(state.step)
        for group, seed in zip(self.train_step.optimizer.param_groups, state.optimizer_seeds, strict=False):
            group["seed"] = seed
        self.train_step.set_loss_scale(state.loss_scale, state.updates_since_overflow)
        self.eval_batch_size = state.eval_batch_size or self.eval_batch_size
        self.step, self.tokens = state.step, state.tokens
        self.best_val_loss, self.best_step = state.best_val_loss, state.best_step
        self.batches.load_state_dict(state.loader)

    def _recall(self) -> None:
        """Show the diagnosis what the run logged before it was resumed; what was said then is not said again."""
        metrics = self.run / run_folder.METRICS
        for record in read_metrics(metrics)["train"] if metrics.exists() else []:
            if record["step"] <= self.step:
                loss = math.nan if record["loss"] is None else record["loss"]
                self.diagnosis.update(record["step"], loss, record["grad_norm"], record["lr"])

    # ---- words ----

    def _facts(self) -> Facts:
        c = self.config
        cuda = self.device.type == "cuda"
        return Facts(
            c,
            self.model_config,
            sum(map(len, self.dataset.train)),
            self.prediction.seconds(c.gradient_accumulation_steps) if self.prediction is not None else None,
            hardware.peak_flops(self.device, self.dtype),
            torch.cuda.get_device_properties(self.device).multi_processor_count if cuda else None,
            wanted_tokens_per_step(c),
        )

    def _introduction(self) -> list[str]:
        c, m = self.config, self.model_config
        start = f"from step {self.step} to" if self.step else "for"
        planned = c.max_iters * c.tokens_per_step
        threads = torch.get_num_threads()
        cores = f"{threads} thread{'s'[: threads != 1]}, " if self.device.type == "cpu" else ""
        lines = [
            f"{c.preset}: {m.n_params / 1e6:.2f}M parameters ({m.n_params_without_positions / 1e6:.2f}M without "
            f"positions), {m.n_layer} layers of {m.n_embd}, vocabulary {m.vocab_size}",
            f"data: {self.dataset.path}, {c.tokens_per_step:,} tokens a step ({c.gradient_accumulation_steps} x "
            f"{c.batch_size} x {c.block_size}) {start} {c.max_iters:,} steps, {planned / 1e6:,.1f}M tokens, "
            f"{planned / m.n_params_without_positions:.3g} a parameter",
            f"learning rate: {c.learning_rate:g} to {c.min_lr:g} over {c.lr_decay_iters:,} steps",
            f"device: {hardware.device_name(self.device)}, {cores}{self.memory.amount / 2**30:.1f} GiB free "
            f"({self.memory.source}), {str(self.dtype).removeprefix('torch.')}, recompute {c.recompute}",
        ]
        p, accumulation = self.prediction, c.gradient_accumulation_steps
        if p is not None:
            mfu = f", MFU {p.mfu(accumulation):.1%} of {p.peak / 1e12:.1f} TFLOP/s" if p.peak is not None else ""
            lines.append(
                f"predicted: {p.tokens_per_second(accumulation):,.0f} tokens/s{mfu}, {p.memory / 2**30:.2f} GiB in "
                f"tensors and {p.reserve / 2**30:.2f} beside them; "
                + roofline.error_words(hardware.device_name(self.device))
            )
        return lines

    def _conclude(self, log: RunLog) -> None:
        """Speed and findings, once more and all together."""
        if self._flops_per_second is not None:
            device, peak = hardware.device_name(self.device), hardware.peak_flops(self.device, self.dtype)
            log.say(f"speed: {mfu_sentence(self._flops_per_second, peak, device, self.dtype)}")
        if self.diagnosis.findings:
            log.say("what this run should make you think of:")
        for finding in self.diagnosis.findings:
            log.say(f"- {finding.text}")

    def _title(self) -> str:
        m = self.model_config
        return f"{self.config.preset}: {m.n_params / 1e6:.1f}M parameters, {self.tokens / 1e6:.1f}M tokens"

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """The first signal lets the step finish and saves; a second one of either kind ends at once."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = number
        print("\nstopping after this step; once more stops at once, without a checkpoint", file=sys.stderr)


def _shape(model: dict[str, Any]) -> str:
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")
    return ", ".join(f"{name}={model[name]}" for name in names)


def _open_or_prepare(config: TrainConfig) -> Dataset:
    """The run's dataset; the one that every machine can make offline is made here if it is missing."""
    try:
        return open_dataset(config.dataset, config.data_dir)
    except RequestError:
        if config.dataset != "stdlib":
            raise
        return open_dataset(prepare("stdlib", data_dir=config.data_dir))
