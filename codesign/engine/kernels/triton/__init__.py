"""Weight kernels in Triton, for CUDA. `available.py` says whether they run here; `matmul.py` is what formats call.

Every other module here imports triton and is imported only where that is known to be there.
"""
