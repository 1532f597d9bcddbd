"""ROCm/aiter's names (https://github.com/ROCm/aiter, distribution amd-aiter) on this package's kernels.

    names.py      which of its modules and functions there are here, what is said of the others, and of an installation
                  of both; needs no PyTorch, as `import aiter` reads it
    attention.py  its attention functions and cache writes, with their signatures
    triton.py     those of aiter.ops.triton

The two packages have one import name, and programs that were written for that one look under its names:
`from aiter.mla import mla_decode_fwd` finds attention.mla_decode_fwd.
"""
