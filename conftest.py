"""Modules that need what is not installed are not searched for examples."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["x3mat/kernels.py"]
