"""Predicts the time and the memory of a training step on any device, without running it.

Modules, in the order in which to read them:

- ``trace.py``: runs the step on tensors without data (a dry run) and records its calls and its memory: the trace.
- ``roofline.py``: the time of each call on a device, and so of the step; the prediction's error where it was measured
  (``measured.json``, collected by ``bench/measured.py``).
- ``micro_batch.py``: the micro-batch and the recomputation that fit into memory and are the fastest.
- ``points.py``: what others have measured on GPUs (``points.json``), and which of these steps the model covers.
- ``programs.py``: other programs' steps as lists of calls, so that ``roofline.py`` can predict them too.
- ``fit.py``: fits the GPU constants of ``roofline.py`` to one half of the public steps, gives the error on the other.
"""
