"""Proves, without a GPU, that the Triton kernels stay within their tensors, race with nobody and overflow nowhere.

Each part first finds faults that are planted (``plants.py``), then none in the kernels as they are.

- ``plants`` and ``kernels``, at small shapes, and ``large``, at shapes of more than 2**31 elements, run the kernels in
  Triton's interpreter (``cases.py``) and watch every access (``watch.py``). Large tensors are reserved but never
  touched; of each launch the first and last programs run.
- ``barriers`` compiles the kernels that work in place, for five architectures, and looks for a ``bar.sync`` between
  what some threads of a program read and what others overwrite (``barriers.py``).

What this cannot see: what ptxas makes of the PTX; configurations and shapes that do not run here; an int32 loop counter
that runs past 2**31, because the interpreter counts in Python's integers; at large shapes races, programs that were not
sampled, and what lies between the elements of a view; whether numbers are right.
"""
