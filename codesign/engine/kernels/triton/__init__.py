"""Kernels in Triton, for CUDA. `available.py` says whether they run here; `matmul.py` is what weight formats call,
`attend.py` and `column_sums.py` what attention calls.

Every other module here imports triton and is imported only where that is known to be there.
"""
