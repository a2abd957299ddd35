"""Models of fastgpt for lm-evaluation-harness (``pip install fastgpt[lm-eval]``).

    import lm_eval
    from fastgpt.evaluation.lm_eval import FastGPT

    lm_eval.simple_evaluate(model=FastGPT("runs/gpt2-124m"), tasks=["lambada_openai", "hellaswag"])

On its command line the model is called ``fastgpt``, once this module has been imported:

    python -m fastgpt.evaluation.lm_eval --model fastgpt --model_args pretrained=runs/gpt2-124m --tasks lambada_openai
"""

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fastgpt import hardware
from fastgpt.data.stream import decode_stream, until
from fastgpt.errors import RequestError
from fastgpt.evaluation.tasks import scores
from fastgpt.model.generate import generate
from fastgpt.train.models import open_model

NEW_TOKENS = 256  # that are generated where a task does not say; the harness's default


@register_model("fastgpt")
class FastGPT(TemplateLM):
    """A model for the harness.

    Args:
        pretrained: what ``fastgpt.eval`` takes: a run's folder, a folder as Hugging Face keeps it, or a name.
        checkpoint: of a run: ``latest``, ``best`` or a step.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        dtype: of the weights.
        batch_size: texts at a time; what is not a number means 8.
        kwargs: the harness's other arguments, which have no meaning here.

    Raises:
        RequestError: there is no such model, or its tokenizer is unknown or has no token that parts documents.
    """

    def __init__(
        self, pretrained: str, checkpoint: str = "latest", device: str = "auto", dtype: str = "float32",
        batch_size: int | str = 8, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        opened = open_model(pretrained, str(checkpoint))
        if opened.tokenizer is None or opened.tokenizer.eot is None:
            raise RequestError(f"{pretrained}: the harness needs a tokenizer with a token that parts documents")
        self.tokenizer = opened.tokenizer
        self.model = opened.model.to(hardware.find_device(device or "auto"), getattr(torch, dtype))
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8

    @property
    def eot_token_id(self) -> int:
        """The token that parts documents. It stands before a text that has no context."""
        assert self.tokenizer.eot is not None
        return self.tokenizer.eot

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text."""
        return self.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, and whether greedy decoding would give it."""
        T = self.model.config.block_size
        encoded = [((context + continuation)[-(T + 1) :], len(continuation)) for _, context, continuation in requests]
        found = scores(self.model, self.tokenizer.vocab_size, encoded, self.batch_size)
        return [(score.log_likelihood, score.greedy) for score in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats: each token is predicted once, in windows that do not overlap."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.model.config.block_size, context_len=1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue the contexts, up to a stop string; the likeliest tokens unless a task samples."""
        texts = []
        for context, options in (request.args for request in requests):
            stop = options.get("until") or []
            tokens = generate(
                self.model,
                torch.tensor([self.tok_encode(context) or [self.eot_token_id]], device=self._where()),
                int(options.get("max_gen_toks", NEW_TOKENS)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                vocab_size=self.tokenizer.vocab_size,
            )
            pieces = decode_stream(self.tokenizer, map(int, tokens))
            texts.append("".join(until(pieces, [stop] if isinstance(stop, str) else stop)))
        return texts

    def _where(self) -> torch.device:
        return next(self.model.parameters()).device


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
