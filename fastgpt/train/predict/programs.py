"""Other people's training steps as lists of calls, to be predicted by the same model as our own.

Products and attention follow from the shape. What differs between programs is what lies between them: how often a
layer's activations, the logits and the weights pass through memory: counted by hand, and not fitted. A kernel that
reads x and writes y, both bf16, moves 2 + 2 bytes a number.
"""

from collections import Counter
from dataclasses import dataclass

from fastgpt.model import GPTConfig
from fastgpt.train.predict import roofline
from fastgpt.train.predict.trace import Call


@dataclass(frozen=True)
class Program:
    """What a program moves through memory, beside the operands of products and attention.

    Attributes:
        stream: bytes a token and channel of each kernel of a layer on the residual stream: norms, sums, casts, biases.
        heads: bytes a token and channel of q, k and v of each kernel there: their norms, rotary, joining of gradients.
        logits: bytes a token and class of each kernel of the loss.
        weights: bytes a parameter and micro-batch: casts, gradients added up.
        update: bytes a parameter: norm, clipping, AdamW.
    """

    stream: tuple[float, ...]
    heads: tuple[float, ...]
    logits: tuple[float, ...]
    weights: float
    update: float


# Of half a layer: norm, cast, residual sum; then casts of two gradients, the norm's two gradients, their sum.
_EAGER_FP32 = (8, 6, 10, 6, 6, 12, 8, 12)
_EAGER_BF16 = (4, 6, 6, 4, 6)  # norm, residual sum; the norm's two gradients, their sum
# fp32 weights under autocast: cast (4 + 2); gradients cast (2 + 4), and added up (4 + 4 + 4).
_AUTOCAST = 24
_ADAMW = 40  # p, g, m, v read, p, m, v written (28); g read for the norm, and scaled by it (12)

PROGRAMS = {
    # model.py as it comes: LayerNorm and residual stream in fp32, and the loss: cast, log-softmax, the gradients of
    # both, zeros before a scatter.
    "nanoGPT": Program(2 * _EAGER_FP32, (4,), (6, 8, 4, 12, 6), _AUTOCAST, _ADAMW),
    # One kernel for residual sum, norm and cast, one for their gradients, one for those of the weights; logits read
    # twice for the loss, read and written for its gradient.
    "nanoGPT, compiled": Program(2 * (12, 16, 6), (4,), (4, 4), _AUTOCAST, _ADAMW),
    # Norms without weights, of q and k too, with rotary; a residual stream in fp32.
    "modded-nanogpt": Program(2 * (12, 16), (4, 6), (4, 4), _AUTOCAST, _ADAMW),
    # The same with a residual stream in bf16.
    "nanochat": Program(2 * (8, 8), (4, 6), (4, 4), _AUTOCAST, _ADAMW),
    # bf16 throughout, fp32 masters; gradients of biases are read off those of the products' outputs (2, 2, 4 * 2).
    "llm.c": Program((*(2 * (8, 8)), 2, 2, 8), (2,), (6,), 2, 30),
    # The same without biases but with rotary, and moments in bf16.
    "llmq": Program(2 * (8, 8), (4, 4), (6,), 2, 16),
    # MPT under FSDP: eager, in bf16.
    "llm-foundry": Program(2 * _EAGER_BF16, (4,), (6, 8, 4, 12, 6), 4, _ADAMW),
}


@dataclass(frozen=True)
class Workload:
    """What a program trains, on one GPU.

    Attributes:
        n_layer, n_embd, n_head, n_kv_head: of the model.
        hidden: width of the MLP.
        gated: whether its first product is twice as wide (SwiGLU).
        vocab_size: rows of the output matrix.
        context: tokens of a sequence, T.
        micro_batch: sequences, B.
        accumulation: micro-batches an update.
        again: what the backward computes again: ``none``, ``block``, or ``inputs``: all but the two projections.
        muon: whether matrices of layers are updated by it.
        shards: GPUs that share the update.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_kv_head: int
    hidden: int
    gated: bool
    vocab_size: int
    context: int
    micro_batch: int
    accumulation: int
    again: str = "none"
    muon: bool = False
    shards: int = 1

    @classmethod
    def of(cls, model: GPTConfig, micro_batch: int, accumulation: int) -> "Workload":
        """A GPT-2 of this shape."""
        C, H = model.n_embd, model.n_head
        return cls(
            model.n_layer, C, H, H, 4 * C, False, model.vocab_size, model.block_size, micro_batch, accumulation
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.context


def calls(program: Program, w: Workload) -> tuple[Counter[Call], Counter[Call]]:
    """Those of a micro-batch and those of an update, each with its number.

    What several GPUs exchange is taken to hide behind the backward, as it does on NVLink.
    """
    micro_step: Counter[Call] = Counter()
    update: Counter[Call] = Counter()
    M, C, V, F, L = w.tokens, w.n_embd, w.vocab_size, w.hidden, w.n_layer
    qkv = (w.n_head + 2 * w.n_kv_head) * (C // w.n_head)
    matrices = [(C, qkv), (C, C), (C, F * (1 + w.gated)), (F, C)]  # of a layer: inputs, outputs
    forward = L if w.again == "none" else 2 * L
    projections = 2 * L if w.again == "block" else L

    times = [forward, projections, forward, projections, 1]
    for (K, N), ahead, back in zip([*matrices, (C, V)], times, [L, L, L, L, 1], strict=True):
        micro_step[_product(M, N, K)] += ahead
        micro_step[_product(M, K, N)] += back  # the input's gradient
        micro_step[_product(K, N, M)] += back  # the weight's

    scores = float(M * w.context * C)  # FLOPs of one product, q k' or p v, without the masked half
    micro_step[Call("attention", "attention", 2 * scores, 2.0 * M * (qkv + C), length=w.context)] += forward
    micro_step[Call("attention_backward", "attention", 5 * scores, 4.0 * M * (qkv + C), length=w.context)] += L

    for n_bytes in program.stream:
        micro_step[_pass(M * C * n_bytes)] += L
    for n_bytes in program.heads:
        micro_step[_pass(M * qkv * n_bytes)] += L
    for n_bytes in program.logits:
        micro_step[_pass(M * V * n_bytes)] += 1
    micro_step[_pass(M * F * (6 if w.gated else 4))] += forward  # activation: one or two tensors read, one written
    micro_step[_pass(M * F * (10 if w.gated else 6))] += L

    parameters = L * sum(rows * columns for rows, columns in matrices) + V * C
    micro_step[_pass(parameters * program.weights)] += 1
    update[_pass(parameters * program.update / w.shards)] += 1
    if w.muon:
        # five Newton-Schulz steps, X X', A A and B X, for q, k, v, both projections and the first of the MLP
        for rows, columns in [(C, C)] * 4 + [(C, F)] * 2:
            many = max(1, L // w.shards)
            for N, K in ((rows, columns), (rows, rows), (columns, rows)):
                update[_product(many * rows, N, K)] += 5
    return micro_step, update


def tokens_per_second(program: Program, w: Workload, machine: roofline.Machine) -> float:
    """Predicted, of one GPU."""
    micro_step, update = calls(program, w)
    return w.accumulation * w.tokens / (w.accumulation * _seconds(micro_step, machine) + _seconds(update, machine))


def _seconds(counted: Counter[Call], machine: roofline.Machine) -> float:
    return sum(times * roofline.seconds(call, machine) for call, times in counted.items())


def _product(M: int, N: int, K: int) -> Call:
    return Call("mm", "GEMM", 2.0 * M * N * K, 2.0 * (M * N + N * K + M * K), (M, N, K))


def _pass(n_bytes: float) -> Call:
    return Call("elementwise", "other", 0.0, n_bytes)
