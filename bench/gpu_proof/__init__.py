"""Checks, without a GPU, that the Triton kernels stay within their tensors, have no races and do not overflow int32.

Each part must first find planted faults (``plants.py``), and then no fault in the kernels as they are.

- ``plants`` and ``kernels``, at small shapes, and ``large``, at shapes of more than 2**31 elements, run the kernels in
  Triton's interpreter (``cases.py``) and check every access (``watch.py``). Large tensors are reserved but never
  touched; only the first and last programs of each launch run.
- ``barriers`` compiles the kernels that work in place, for five architectures. Where some threads of a program read
  what others overwrite, there must be a ``bar.sync`` in between (``barriers.py``).

Not checked: what ptxas makes of the PTX; configurations and shapes that do not run here; an int32 loop counter that
passes 2**31, because the interpreter counts in Python's integers; at large shapes, races, programs outside the sample,
and accesses between the elements of a view; whether results are correct.
"""
