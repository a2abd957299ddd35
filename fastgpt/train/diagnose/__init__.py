"""What is wrong with a run, in plain sentences: from numbers that the trainer has anyway, each said once.

The failure to catch is a run that takes days and was never the run that was meant: a model of another size than its
name says, dropout on data seen once, ten times the tokens that the model can use, a schedule that ends elsewhere.
A finding must hold against the noise of the numbers that it rests on. What cannot be told from noise is not said.

    monitor = Monitor(Facts(config, model_config, dataset_tokens))
    for finding in monitor.findings:  # what is known before the run
        print(finding.text)
    ...
    for finding in monitor.update(step, loss, grad_norm, lr, seconds):  # of every logged update
        print(finding.text)
    for finding in monitor.evaluation(step, train_losses, val_losses):  # of every evaluation, batch by batch
        print(finding.text)

``preflight.py`` holds the checks before the run, ``monitor.py`` those during it, ``statistics.py`` what tells a change
from noise.
"""

from fastgpt.train.diagnose.findings import Facts, Finding, wanted_tokens_per_step
from fastgpt.train.diagnose.monitor import CHECKPOINTS, DATA, EVALUATION, LOGGING, Monitor
from fastgpt.train.diagnose.preflight import CHINCHILLA, NAMED_SIZE
from fastgpt.train.diagnose.statistics import standard_error

__all__ = [
    "CHECKPOINTS", "CHINCHILLA", "DATA", "EVALUATION", "LOGGING", "NAMED_SIZE", "Facts", "Finding", "Monitor",
    "standard_error", "wanted_tokens_per_step",
]  # fmt: skip
