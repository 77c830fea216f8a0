"""What benchmarks/kernels.py measures: one module an op, named as it.

Each has ``CASES``, a list of dicts: ``name``; ``shapes`` and ``dtype``, for the record; ``run``, the op; ``baselines``,
{name: callable}, the same work by others or a floor; ``check``, which raises AssertionError where the op is wrong. The
callables take no argument; inputs are made when one of them is first called.
"""
