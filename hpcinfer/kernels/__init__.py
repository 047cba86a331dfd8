"""Operations that cost a pass over memory each when torch computes them one by one, fused on GPUs.

A file has its operations as torch computes them, which is the reference and what CPUs run; the file `triton_<name>` has the
same as Triton kernels, and is imported when a tensor on a GPU comes (`select`).
"""
