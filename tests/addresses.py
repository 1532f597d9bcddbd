"""Memory that lies far away: caches of more than 4 GiB, page numbers beyond 16 bits, tensors that lie across a multiple
of 4 GiB. What a kernel reads there must be what it reads when the same numbers lie close together.

Every check gives a call on near memory and the same on far memory; both are one computation, so that their results are
equal bit by bit. On CPUs, and where a GPU is emulated, far memory is mapped but mostly never touched.
"""

import ctypes
import mmap

import problems
import torch

import aiter

GIB = 1 << 30
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on; Linux's number


def far_empty(shape, dtype):
    """A tensor, mostly never touched, of any size."""
    if problems.DEVICE != "cpu":
        return torch.empty(shape, dtype=dtype, device=problems.DEVICE)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def across_4gib(tensor):
    """A copy of a CPU tensor whose middle lies at a multiple of 4 GiB; it stays mapped."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    nbytes = tensor.numel() * tensor.element_size()
    before = -(-nbytes // 2 // mmap.PAGESIZE) * mmap.PAGESIZE
    for multiple in range(0x100, 0x7000, 0x35):  # the first address that is free
        hint = multiple * 4 * GIB - before
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        address = libc.mmap(hint, 2 * before, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if address == hint:
            break
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(2 * before))
    else:
        raise MemoryError("no multiple of 4 GiB is free")
    start = multiple * 4 * GIB - nbytes // 2 // 64 * 64
    memory = (ctypes.c_char * nbytes).from_address(start)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    assert copy.data_ptr() >> 32 != (copy.data_ptr() + nbytes - 1) >> 32
    return copy


def same(near, far):
    for one, other in zip(near, far, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def check_far_pages(dtype, seq_q, head_dim=64, **options):
    """Pages beyond number 65,536 and beyond 4 GiB in the same cache, read as the first pages of a small one are."""
    heads, page, lengths = 2, 16, (70, 45)
    page_bytes = heads * page * head_dim * dtype.itemsize
    count = 5 * GIB // page_bytes
    far = [2, 65_536, 65_537, 70_001, 4 * GIB // page_bytes - 1, 4 * GIB // page_bytes, count - 1, 131_075]
    assert count > 4 * GIB // page_bytes + 1 and len(far) == 8
    table = torch.arange(10, dtype=torch.int32).view(2, 5)
    table[1, 3:] = -1
    numbers = torch.tensor([*far, 0, 0], dtype=torch.int32)  # the second sequence has three pages
    far_table = torch.where(table < 0, table, numbers[table.clamp(min=0)])
    near = [problems.randn(8, heads, page, head_dim, dtype=dtype) for _ in range(2)]
    caches = [far_empty((count, heads, page, head_dim), dtype) for _ in range(2)]
    for cache, rows in zip(caches, near, strict=True):
        cache[torch.tensor(far, device=cache.device)] = rows
    query = problems.randn(2, seq_q, 4, head_dim, dtype=dtype)
    options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32, device=problems.DEVICE)

    def attend(cache, table):
        return aiter.flash_attn_with_kvcache(
            query, tuple(cache), table.to(problems.DEVICE), page, True, return_lse=True, **options
        )

    same(attend(near, table), attend(caches, far_table))


def check_far_rows(dtype, seq_q, head_dim=64):
    """A batch whose sequences, heads and tokens lie more than 4 GiB apart."""
    batch, tokens, heads = 2, 300, 2  # GPU kernels take strides from token to token below 2^24 elements
    near = [problems.randn(batch, tokens, heads, head_dim, dtype=dtype) for _ in range(3)]
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):  # which dimension is the outermost in memory
        sizes = (batch, tokens, heads)
        outer = order[0]
        step = 9 * GIB // (2 * dtype.itemsize) // (sizes[outer] - 1) // head_dim * head_dim  # together 4.5 GiB
        far = []
        for tensor in near:
            memory = far_empty((step * (sizes[outer] - 1) + batch * tokens * heads * head_dim,), dtype)
            strides, inner = [0, 0, 0, 1], head_dim
            for dim in reversed(order[1:]):
                strides[dim], inner = inner, inner * sizes[dim]
            strides[outer] = step
            far.append(memory.as_strided(tensor.shape, strides).copy_(tensor))
        calls = [aiter.flash_attn_func(t[0][:, :seq_q], t[1], t[2], True, return_lse=True) for t in (near, far)]
        same(*calls)
        del memory, far


def check_across_4gib(dtype, seq_q, head_dim=64):
    """Tensors, and pages, that lie across a multiple of 4 GiB: the low half of an address wraps within them."""
    near = [problems.randn(2, n, heads, head_dim, dtype=dtype) for n, heads in ((seq_q, 4), (130, 2), (130, 2))]
    far = [across_4gib(tensor) for tensor in near]
    same(*(aiter.flash_attn_func(*tensors, True, return_lse=True) for tensors in (near, far)))

    pages = [problems.randn(20, 2, 16, head_dim, dtype=dtype) for _ in range(2)]
    table = torch.randperm(20, dtype=torch.int32).view(2, 10)
    caches = pages, [across_4gib(cache) for cache in pages]
    same(*(aiter.flash_attn_with_kvcache(near[0], tuple(c), table, 16, True, return_lse=True) for c in caches))
