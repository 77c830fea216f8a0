"""What benchmarks/kernels.py measures: one module an op, named as it.

Each has ``CASES`` for the CPU, a list of dicts: ``name``; ``shapes`` and ``dtype``, for the record; ``run``, the op;
``baselines``, {name: callable}, the same work by others or a floor; ``check``, which raises AssertionError where the op
is wrong; ``bytes`` and ``flops``, what cannot be done without: every input and output once, every product once. The
callables take no argument; inputs are made when one of them is first called.

``CUDA_CASES`` are for a GPU: callables that make such a dict on a device, all sizes times a scale.
"""
