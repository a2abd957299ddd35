"""Diagnoses a training run: reports in plain sentences what is wrong with it, each finding once.

The most expensive failure is a run that takes days and was misconfigured from the start: a model of another size than
its name states, dropout on data that is seen once, ten times more tokens than the model can use, a schedule that does
not end with the run. All findings come from numbers that the trainer computes anyway. A finding must be significant
against the noise of these numbers; otherwise nothing is reported.

    monitor = Monitor(Facts(config, gpt_config, dataset_tokens))
    for finding in monitor.findings:  # known before the run
        print(finding.text)
    ...
    for finding in monitor.update(step, loss, grad_norm, lr, seconds):  # at every logged update
        print(finding.text)
    for finding in monitor.evaluation(step, train_losses, val_losses):  # at every evaluation, a loss per batch
        print(finding.text)

Modules, in the order in which to read them: ``findings.py`` (a finding, and the facts about a run), ``preflight.py``
(checks before the run), ``statistics.py`` (standard errors, robust spread, trends), ``monitor.py`` (checks during the
run).
"""

from fastgpt.train.diagnose.findings import Facts, Finding, wanted_tokens_per_step
from fastgpt.train.diagnose.monitor import CHECKPOINTS, DATA, EVALUATION, LOGGING, Monitor
from fastgpt.train.diagnose.preflight import CHINCHILLA, NAMED_SIZE
from fastgpt.train.diagnose.statistics import standard_error

__all__ = [
    "CHECKPOINTS", "CHINCHILLA", "DATA", "EVALUATION", "LOGGING", "NAMED_SIZE", "Facts", "Finding", "Monitor",
    "standard_error", "wanted_tokens_per_step",
]  # fmt: skip
