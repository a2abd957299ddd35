"""Other programs' training steps as lists of calls, so that the roofline model can predict them too.

Matrix products and attention follow from the model's shape. Programs differ in the elementwise kernels between them:
in how often the activations of a layer, the logits and the weights pass through memory. These passes are counted by
hand, and not fitted. A kernel that reads x and writes y, both bf16, moves 2 + 2 bytes per element.
"""

from collections import Counter
from dataclasses import dataclass

from fastgpt.model import GPTConfig
from fastgpt.train.predict import roofline
from fastgpt.train.predict.trace import Call


@dataclass(frozen=True)
class Program:
    """The memory traffic of a program's elementwise kernels: all but matrix products, attention and activations.

    Attributes:
        stream: for each kernel of a layer on the residual stream (norms, sums, casts, biases), bytes per token and
            channel.
        heads: for each kernel of a layer on q, k and v (norms, rotary, concatenation of gradients), bytes per token
            and channel of q, k and v.
        logits: for each kernel of the loss, bytes per token and vocabulary entry.
        weights: bytes per parameter and micro-batch: casts, and accumulation of gradients.
        update: bytes per parameter and update: norm, clipping and optimizer.
    """

    stream: tuple[float, ...]
    heads: tuple[float, ...]
    logits: tuple[float, ...]
    weights: float
    update: float


# The eager kernels of half a layer (one norm, one residual sum); a layer has them twice.
# Forward: norm, cast, residual sum. Backward: casts of two gradients, the norm's two gradients, their sum.
_EAGER_FP32 = (8, 6, 10, 6, 6, 12, 8, 12)
_EAGER_BF16 = (4, 6, 6, 4, 6)  # norm, residual sum; the norm's two gradients, their sum
# fp32 weights under autocast: cast to bf16 (4 + 2), gradients cast to fp32 (2 + 4) and accumulated (4 + 4 + 4).
_AUTOCAST = 24
# fp32 AdamW: p, g, m, v read and p, m, v written (7 * 4 = 28); g read for the norm, then read and written to clip (12).
_ADAMW = 40

PROGRAMS = {
    # model.py without torch.compile. LayerNorm and residual stream are fp32. The loss has five kernels: cast,
    # log-softmax, their gradients, and zeros before a scatter.
    "nanoGPT": Program(2 * _EAGER_FP32, (4,), (6, 8, 4, 12, 6), _AUTOCAST, _ADAMW),
    # Three fused kernels per half layer: residual sum, norm and cast; their gradients; the gradients of the norm's
    # weights. Two kernels read the logits twice for the loss, and read and write them for the gradient.
    "nanoGPT, compiled": Program(2 * (12, 16, 6), (4,), (4, 4), _AUTOCAST, _ADAMW),
    # Norms without weights, also on q and k, and rotary embeddings. The residual stream is fp32.
    "modded-nanogpt": Program(2 * (12, 16), (4, 6), (4, 4), _AUTOCAST, _ADAMW),
    # The same, but the residual stream is bf16.
    "nanochat": Program(2 * (8, 8), (4, 6), (4, 4), _AUTOCAST, _ADAMW),
    # bf16 throughout, with fp32 master weights. The gradient of a bias reads the output gradient of its product: two of
    # width C (2 bytes each), the MLP's of width 4C (8 bytes per channel of C), and that of q, k and v (heads).
    "llm.c": Program((*(2 * (8, 8)), 2, 2, 8), (2,), (6,), 2, 30),
    # Like llm.c, without biases, with rotary embeddings, and with bf16 moments.
    "llmq": Program(2 * (8, 8), (4, 4), (6,), 2, 16),
    # MPT under FSDP, eager, in bf16.
    "llm-foundry": Program(2 * _EAGER_BF16, (4,), (6, 8, 4, 12, 6), 4, _ADAMW),
}


@dataclass(frozen=True)
class Workload:
    """The model and batch that a program trains on one GPU.

    Attributes:
        n_layer: layers.
        n_embd: width, C.
        n_head: heads of the queries.
        n_kv_head: heads of keys and values; fewer than ``n_head`` for grouped-query attention.
        hidden: width of the MLP.
        gated: whether the MLP is gated (SwiGLU), so that its first product is twice as wide.
        vocab_size: rows of the output matrix, V.
        context: tokens per sequence, T.
        micro_batch: sequences per micro-batch, B.
        accumulation: micro-batches per update.
        recompute: the part of the forward that the backward recomputes: ``none``, ``block`` (all of it), or ``inputs``
            (all but the output projections of attention and MLP).
        muon: whether Muon updates the matrices of the layers.
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
    recompute: str = "none"
    muon: bool = False
    shards: int = 1

    @classmethod
    def of(cls, gpt_config: GPTConfig, micro_batch: int, accumulation: int) -> "Workload":
        """Return the workload of a GPT-2 with this configuration."""
        c, C, H = gpt_config, gpt_config.n_embd, gpt_config.n_head
        return cls(c.n_layer, C, H, H, 4 * C, False, c.vocab_size, c.block_size, micro_batch, accumulation)

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch."""
        return self.micro_batch * self.context


def calls(program: Program, w: Workload) -> tuple[Counter[Call], Counter[Call]]:
    """Return the calls of a micro-batch and those of an update, each with the number of times it occurs.

    Communication between GPUs is left out: on NVLink the backward hides it.
    """
    micro_step: Counter[Call] = Counter()
    update: Counter[Call] = Counter()
    M, C, V, F, L = w.tokens, w.n_embd, w.vocab_size, w.hidden, w.n_layer
    qkv = (w.n_head + 2 * w.n_kv_head) * (C // w.n_head)  # width of q, k and v together
    # (inputs, outputs) of a layer's matrices: q, k, v; attention's projection; the MLP's first and second
    matrices = [(C, qkv), (C, C), (C, F * (1 + w.gated)), (F, C)]
    forward = L if w.recompute == "none" else 2 * L  # recomputed layers run their forward twice
    projections = 2 * L if w.recompute == "block" else L

    # the output layer (C, V) runs once and is never recomputed
    n_forward = [forward, projections, forward, projections, 1]
    for (K, N), n_ahead, n_back in zip([*matrices, (C, V)], n_forward, [L, L, L, L, 1], strict=True):
        micro_step[_product(M, N, K)] += n_ahead
        micro_step[_product(M, K, N)] += n_back  # gradient of the input
        micro_step[_product(K, N, M)] += n_back  # gradient of the weight

    # FLOPs of one product of attention, q k' or p v: 2 T D per query and head, of which half is masked. With M = B T
    # queries and C = H D that is M T C. The forward has two such products, the backward five.
    scores = float(M * w.context * C)
    micro_step[Call("attention", "attention", 2 * scores, 2.0 * M * (qkv + C), length=w.context)] += forward
    micro_step[Call("attention_backward", "attention", 5 * scores, 4.0 * M * (qkv + C), length=w.context)] += L

    for n_bytes in program.stream:
        micro_step[_pass(M * C * n_bytes)] += L
    for n_bytes in program.heads:
        micro_step[_pass(M * qkv * n_bytes)] += L
    for n_bytes in program.logits:
        micro_step[_pass(M * V * n_bytes)] += 1
    # The MLP's activation in bf16, 2 bytes per element. Forward: one tensor read (two if gated), one written. Backward:
    # the output's gradient and the inputs read, the inputs' gradients written.
    micro_step[_pass(M * F * (6 if w.gated else 4))] += forward
    micro_step[_pass(M * F * (10 if w.gated else 6))] += L

    parameters = L * sum(rows * columns for rows, columns in matrices) + V * C
    micro_step[_pass(parameters * program.weights)] += 1
    update[_pass(parameters * program.update / w.shards)] += 1
    if w.muon:
        # Muon orthogonalises each matrix X by five Newton-Schulz steps, of three products each: A = X X', A A and B X.
        # The matrices are q, k, v and attention's projection (C, C), and the MLP's two (C, F). A shard's layers are
        # batched, so their rows count together.
        for rows, columns in [(C, C)] * 4 + [(C, F)] * 2:
            layers = max(1, L // w.shards)
            for N, K in ((rows, columns), (rows, rows), (columns, rows)):
                update[_product(layers * rows, N, K)] += 5
    return micro_step, update


def tokens_per_second(program: Program, w: Workload, machine: roofline.Machine) -> float:
    """Return the predicted tokens per second of one GPU."""
    micro_step, update = calls(program, w)
    return w.accumulation * w.tokens / (w.accumulation * _seconds(micro_step, machine) + _seconds(update, machine))


def _seconds(counted: Counter[Call], machine: roofline.Machine) -> float:
    return sum(n * roofline.seconds(call, machine) for call, n in counted.items())


def _product(M: int, N: int, K: int) -> Call:
    """Return a bf16 matrix product (M, K) @ (K, N): 2 bytes per element of both operands and the result."""
    return Call("mm", "GEMM", 2.0 * M * N * K, 2.0 * (M * N + N * K + M * K), (M, N, K))


def _pass(n_bytes: float) -> Call:
    """Return an elementwise kernel that moves so many bytes."""
    return Call("elementwise", "other", 0.0, n_bytes)
