"""One update of a model: micro-batches forward and backward, then norm, clip and AdamW, or Muon.

No pass over memory only casts, zeroes or sums. The model reads weights in the training dtype, which the optimizer's
kernel has written. Gradients are accumulated in fp32 by the kernels that compute them. The optimizer's kernel sets them
to zero after use.

On a GPU the host never waits for the device. A micro-batch and the optimizer are each recorded in a CUDA graph, which
is then replayed. The learning rate, the loss and the gradient norm stay in tensors on the device.
"""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import FusedAdamW, FusedMuon
from fastgpt.model import GPT
from fastgpt.train.memory import ran_out
from fastgpt.train.parameters import ParameterStore
from fastgpt.train.spikes import SpikeDetector

Batch = tuple[Tensor, Tensor]

# torch.amp.GradScaler's, from Micikevicius et al., "Mixed Precision Training", 2018.
FIRST_LOSS_SCALE, GROWTH_INTERVAL = 65536.0, 2000
# Ours: gradients that overflow without a scale overflow with a smaller one too, or are lost.
LEAST_LOSS_SCALE = 1.0


class TrainStep:
    """Trains a model; each call is one update.

    With ``cuda_graphs``, the first update runs without graphs, because it compiles kernels and creates the optimizer's
    state. The second one is recorded. From then on the two graphs are replayed. CUDA cannot record on its default
    stream, so create and call this on another one (:func:`leave_default_stream`). Batches must keep their shape.

    An update whose gradients are not finite is skipped: the weights and the moments stay as they are. With
    ``skip_spikes`` so is one whose loss or gradient norm stands out.

    fp16 uses loss scaling: the loss is multiplied before the backward, so that small gradients do not become zero. The
    host then reads the gradient norm in each update.

    Args:
        model: fp32; its parameters move into ``store``.
        device: to train on; the model's if ``None``. A model on the CPU is copied parameter by parameter, so that the
            device never holds it twice.
        dtype: of the weights that the model computes with: fp32, bf16 or fp16.
        accumulation: micro-batches in an update; :meth:`set_accumulation` changes it between updates.
        betas: AdamW's.
        weight_decay: on matrices; vectors have none.
        max_grad_norm: gradients are scaled down to at most this L2 norm; ``None`` for no clipping.
        state_bits: of each of the optimizer's moments, 8 or 32.
        muon: update the matrices of the blocks by Muon.
        muon_lr_ratio: Muon's learning rate divided by AdamW's, for steps of the same size (``match_rms_adamw``).
        momentum: Muon's.
        skip_spikes: skip an update whose loss or gradient norm is more than this many standard deviations above the
            mean of the last ones (see :class:`SpikeDetector`); 0 for none.
        compile: run the model through ``torch.compile``; excludes graphs.
        cuda_graphs: use them where the model is on a GPU.

    Attributes:
        cuda_graphs: whether updates are recorded in CUDA graphs and replayed.
        store: the parameters and gradients, in flat buffers.
        optimizer: updates ``store``.
        moments: AdamW's, as flat buffers by kind.
        forward: the model, compiled or not.
        loss: 0-dim fp32 on the device, mean loss of the last update's micro-batches.
        skipped: 0-dim fp32 on the device, updates that were skipped so far.
        last_skipped: 0-dim fp32 on the device, the number of the last of them, counted from 1; 0 for none. Those whose
            gradients overflow because of fp16's scale do not count here.
        skipped_in_a_row: 0-dim fp32 on the device, updates since the last one whose gradients were finite. In fp16,
            where gradients overflow now and then because of the scale, it counts updates whose loss is not finite, or
            whose gradients overflow at the least scale.
        most_in_a_row: 0-dim fp32 on the device, the largest ``skipped_in_a_row`` so far.
        spikes: 0-dim fp32 on the device, updates that were skipped because they stood out.
        spike_detector: ``None`` without ``skip_spikes``.
        loss_scale: factor of the loss in fp16; 1 in other dtypes.
    """

    def __init__(
        self,
        model: GPT,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        accumulation: int = 1,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        max_grad_norm: float | None = 1.0,
        state_bits: int = 32,
        muon: bool = False,
        muon_lr_ratio: float = 1.0,
        momentum: float = 0.95,
        skip_spikes: float = 0.0,
        compile: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        self.store = ParameterStore(model, dtype, device, muon)
        groups = self.store.groups(weight_decay)
        options: dict[str, Any] = {
            "max_grad_norm": max_grad_norm, "copies": self.store.copies(groups), "state_bits": state_bits,
            "skip_nonfinite": True,
        }  # fmt: skip
        self.optimizer: FusedAdamW
        if muon:
            groups = [group if group["use_muon"] else {**group, "betas": betas} for group in groups]
            options |= {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.optimizer = FusedMuon(groups, 0.0, **options)
        else:
            self.optimizer = FusedAdamW(groups, 0.0, betas, **options)
        self.moments = self.store.moments(state_bits)
        for group in groups:
            for param in group["params"]:
                self.optimizer.use_state(param, self.store.state_of(param, self.moments))
        # Tensors, because a recorded graph reads their current value; fp64, so that it is the rate that was asked for.
        self.lr = torch.zeros((), dtype=torch.float64, device=self.store.master.device)
        self.muon_lr, self.muon_lr_ratio = torch.zeros_like(self.lr), muon_lr_ratio
        for group in self.optimizer.param_groups:
            group["lr"] = self.muon_lr if group.get("use_muon") else self.lr
        self.forward: Callable[..., Tensor] = torch.compile(model) if compile else model
        self.loss = torch.zeros((), device=self.lr.device)
        self.skipped, self.last_skipped, self.spikes = (torch.zeros_like(self.loss) for _ in range(3))
        self.skipped_in_a_row, self.most_in_a_row = (torch.zeros_like(self.loss) for _ in range(2))
        self.spike_detector = SpikeDetector(skip_spikes, self.loss.device) if skip_spikes else None
        self._number = torch.zeros_like(self.loss)  # of the update
        self._sum = torch.zeros_like(self.loss)  # of the losses of this update's micro-batches
        self._scale = torch.full_like(self.loss, FIRST_LOSS_SCALE) if dtype == torch.float16 else None
        self.loss_scale = FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._grad_scale = torch.zeros_like(self.loss)
        self.set_accumulation(accumulation)
        self.updates_since_overflow = 0
        self._batch: Batch | None = None  # the graph reads its micro-batch at this fixed address
        self.cuda_graphs = cuda_graphs and not compile and self.loss.is_cuda
        self._micro_graph: Any = None
        self._optimizer_graph: Any = None
        self._updates = 0  # since the start, or since graphs were given up

    @property
    def grad_norm(self) -> Tensor:
        """0-dim fp32 on the device, the last update's gradient norm before clipping."""
        assert self.optimizer.grad_norm is not None  # skip_nonfinite has it measured
        return self.optimizer.grad_norm

    def __call__(self, next_batch: Callable[[], Batch], lr: float, number: int = 0) -> None:
        """One update.

        Args:
            next_batch: gives micro-batches ``(x, y)``, (B, T) int64 on the model's device.
            lr: learning rate.
            number: of the update, for ``last_skipped``.

        Raises:
            RecordingOutOfMemory: there is no memory to record a CUDA graph in.
            RuntimeError: a CUDA graph could not be recorded.
        """
        self.lr.fill_(lr)
        self.muon_lr.fill_(lr * self.muon_lr_ratio)
        self._number.fill_(number)
        for _ in range(self.accumulation):
            self.micro_step(next_batch())
        self._finish()
        self._updates += 1

    def set_accumulation(self, accumulation: int) -> None:
        """Set the micro-batches of the updates from now on. Recorded graphs stay valid."""
        self.accumulation = accumulation
        # Gradients are sums over micro-batches of mean losses; this makes them the gradient of the mean.
        self._grad_scale.fill_(1.0 / (accumulation * self.loss_scale))

    def start_over(self, accumulation: int) -> None:
        """Forget the recorded graphs, and the micro-batches of an update that was not finished.

        Args:
            accumulation: micro-batches in an update from now on. Their shape may change too.
        """
        self.store.grad.zero_()
        self._sum.zero_()
        self.set_accumulation(accumulation)
        self._batch = self._micro_graph = self._optimizer_graph = None
        self.optimizer.forget_graphs()
        self._updates = 0

    @property
    def has_graphs(self) -> bool:
        """Whether CUDA graphs have been recorded, and hold memory."""
        return self._micro_graph is not None

    def free_graphs(self) -> None:
        """Give back the memory of the recorded graphs; an update that was not finished is forgotten.

        The next update runs without graphs, as the first one did, because the optimizer has to read from the device how
        many steps the replays took. The one after it records new graphs.
        """
        self.start_over(self.accumulation)

    def do_without_graphs(self) -> None:
        """Record no graphs from now on; an update that was not finished is forgotten."""
        self.cuda_graphs = False
        self.start_over(self.accumulation)

    def micro_step(self, batch: Batch) -> None:
        """Add the gradients of a micro-batch to ``store.grad``, and its loss to the sum of this update's losses.

        Args:
            batch: ``(x, y)``, (B, T) int64 on the model's device.
        """
        if not self.cuda_graphs or self._updates == 0:
            self._forward_backward(batch)
            return
        if self._batch is None:
            self._batch = torch.empty_like(batch[0]), torch.empty_like(batch[1])
        for place, tensor in zip(self._batch, batch, strict=True):
            place.copy_(tensor)
        if self._micro_graph is None:
            self._micro_graph = record_graph(lambda: self._forward_backward(self._batch), pool=None)
        self._micro_graph.replay()

    def _finish(self) -> None:
        torch.div(self._sum, self.accumulation, out=self.loss)
        self._sum.zero_()
        if self._scale is not None:
            self._update_scaled()
        elif not self.cuda_graphs or self._updates == 0:
            self.update()
        else:
            if self._optimizer_graph is None:
                # The same memory pool: the two graphs never run at the same time.
                self._optimizer_graph = record_graph(self.update, pool=self._micro_graph.pool())
            self._optimizer_graph.replay()

    def _forward_backward(self, batch: Batch | None) -> None:
        assert batch is not None
        loss = self.forward(*batch) if self._scale is None else self.forward(*batch, gradient_scale=self._scale)
        loss.backward()
        self._sum += loss.detach()

    def update(self) -> None:
        """Update parameters and moments from ``store.grad``, set it to zero, and count what is skipped."""
        detector = self.spike_detector
        limit = detector.norm_limit(self.loss) if detector is not None else None
        self.optimizer.step(grad_scale=self._grad_scale, zero_grad=True, skip_above=limit)
        skipped = self.optimizer.found_inf
        assert skipped is not None
        spike, told = torch.zeros_like(skipped), skipped
        if detector is not None:
            spike = skipped * self.grad_norm.isfinite()
            detector.add(self.loss, self.grad_norm)
        if self.loss_scale > LEAST_LOSS_SCALE:  # only fp16 has one: an overflow of a finite loss is the scale's
            told = torch.maximum(spike, skipped * self.loss.isfinite().logical_not())
        self.skipped += skipped
        self.spikes += spike
        self.last_skipped += told * (self._number - self.last_skipped)
        self.skipped_in_a_row.add_(1).mul_(told - spike)
        torch.maximum(self.most_in_a_row, self.skipped_in_a_row, out=self.most_in_a_row)

    def _update_scaled(self) -> None:
        """Do what :meth:`update` does, then adapt the loss scale: if gradients were not finite, halve it."""
        self.update()
        self.store.refresh()
        if math.isfinite(self.grad_norm.item()):
            self.updates_since_overflow += 1  # as torch.amp.GradScaler does, the scale doubles after enough of these
            if self.updates_since_overflow == GROWTH_INTERVAL:
                self.set_loss_scale(self.loss_scale * 2.0)
        else:
            self.set_loss_scale(max(self.loss_scale * 0.5, LEAST_LOSS_SCALE))

    def state_dict(self) -> dict[str, Any]:
        """What an update depends on besides parameters and moments, ready for JSON; waits for the device."""
        return {
            "skipped": int(self.skipped),
            "skipped_in_a_row": int(self.skipped_in_a_row),
            "most_in_a_row": int(self.most_in_a_row),
            "last_skipped": int(self.last_skipped),
            "spikes": int(self.spikes),
            "spike_window": self.spike_detector.state_dict() if self.spike_detector is not None else [],
            "loss_scale": self.loss_scale,
            "updates_since_overflow": self.updates_since_overflow,
            "optimizer_seeds": [group["seed"] for group in self.optimizer.param_groups if "seed" in group],
        }

    def load_state_dict(self, state: dict[str, Any], updates: int) -> None:
        """Continue from where the one that gave ``state`` stood.

        Args:
            state: from :meth:`state_dict`.
            updates: done by then, the skipped ones among them.

        Raises:
            ValueError: the window of the spike detector is not what it gives.
        """
        for optimizer_state in self.optimizer.state.values():
            optimizer_state["step"].fill_(updates - state["skipped"])
        for name in ("skipped", "skipped_in_a_row", "most_in_a_row", "last_skipped", "spikes"):
            getattr(self, name).fill_(state[name])
        if self.spike_detector is not None:
            self.spike_detector.load_state_dict(state["spike_window"])
        for group, seed in zip(self.optimizer.param_groups, state["optimizer_seeds"], strict=False):
            group["seed"] = seed
        self.set_loss_scale(state["loss_scale"], state["updates_since_overflow"])

    def set_loss_scale(self, scale: float, updates_since_overflow: int = 0) -> None:
        """Set the loss scale, and for how many updates it has been kept. No effect in dtypes other than fp16."""
        if self._scale is not None:
            self.loss_scale, self.updates_since_overflow = scale, updates_since_overflow
            self._scale.fill_(scale)
            self.set_accumulation(self.accumulation)


def leave_default_stream(device: torch.device) -> None:
    """Make a new stream the current one, on which CUDA can record graphs. No effect on other devices."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        torch.cuda.set_stream(stream)


class RecordingOutOfMemory(MemoryError):
    """Memory ran out while a CUDA graph was recorded, which takes somewhat more than the same step without one."""


def record_graph(function: Callable[[], None], pool: Any) -> Any:
    """Return a CUDA graph of the kernels that ``function`` launches. They are recorded, not run.

    Args:
        function: launches the kernels on the current stream.
        pool: of another graph, whose memory this one shares; ``None`` for memory of its own.

    Raises:
        RecordingOutOfMemory: there is no memory to record it in.
        RuntimeError: it could not be recorded for another reason.
    """
    graph = torch.cuda.CUDAGraph()
    # cuBLAS keeps a workspace for each stream. The graph must own one in its own memory pool: torch.compile clears all
    # other workspaces before it records, and a replay would then write to memory that belongs to somebody else.
    torch._C._cuda_clearCublasWorkspaces()
    # If Python's garbage collector destroyed a dead graph or kernel during the recording, the recording would fail.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            function()
    except RuntimeError as error:
        if ran_out(error):
            # not chained: the first exception holds the frames, and with them all that the step had in memory
            raise RecordingOutOfMemory(str(error)) from None
        # If ending the recording failed too, the error above hides the first one, and PyTorch's allocator and random
        # number generator stay in recording mode. There is no way to continue, even if only memory ran out.
        why = error.__context__ or error
        raise RuntimeError(f"a CUDA graph could not be recorded; --cuda_graphs False works without: {why}") from error
    finally:
        torch._C._cuda_clearCublasWorkspaces()  # nothing but the graph's replays may use its workspace
        if collecting:
            gc.enable()
    return graph
