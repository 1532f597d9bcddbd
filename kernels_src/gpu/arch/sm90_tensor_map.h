/* The bulk copy engine of sm_90 (TMA): one thread sets off the copy of a whole tile from global into shared memory, by
 * a map of the tensor that the host has made. Elements outside of the tensor arrive as zeros.
 *
 *   a tensor   (batch, token, head, column), columns adjacent; packed: one sequence, of all tokens
 *   a box      64 columns (of 8-bit elements 128) of some heads of some tokens, token by token, rows of 128 bytes with
 *              the swizzle of wgmma (arch/sm90.h)
 *
 * The map reaches the kernel as a parameter. What makes it is a function of the driver. */
#ifndef AITER_GPU_ARCH_SM90_TENSOR_MAP_H
#define AITER_GPU_ARCH_SM90_TENSOR_MAP_H

#include "gpu/arch/sm90.h"

#include <cuda.h>

namespace aiter {
namespace tensor_map {

constexpr int LINE_BYTES = 128; /* of a box's rows */

/* Keys of a page that are copied together, of tiles of `keys`: rows of shared memory are permuted in eights. A window
 * begins at one of their multiples. 0: none can be. */
inline int box_of(int page_size, int keys) {
    int box = WINDOW ? 16 : keys;
    while (keys % box != 0 || page_size % box != 0) --box;
    return box % 8 == 0 ? box : 0;
}

extern "C" void *aiter_driver_function(const char *name); /* gpu/cuda_runtime.cpp */

/* How often other blocks ask for what a box has brought. ONCE or nearly so: where a box has half of a row, the L2 cache
 * would be told to fetch the other half too, which is on its way already, and less came through it
 * (docs/hopper_decoding.md). */
enum class Reuse { ONCE, OFTEN };

/* Whether it could be made: it cannot of a tensor with strides of 0 or of 2^40 bytes, for instance. */
inline bool make(CUtensorMap &map, Reuse reuse, const void *tensor, const int64_t strides[3], int64_t batch,
                 int64_t tokens, int64_t heads, int columns, int box_tokens, int box_heads = 1, int element_bytes = 2) {
    static const auto encode =
        reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(aiter_driver_function("cuTensorMapEncodeTiled"));
    if (encode == nullptr) return false;
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(heads), cuuint64_t(tokens), cuuint64_t(batch)};
    /* The stride of a dimension of size 1 is never used, but must be one that could be. */
    const auto bytes = [&](int64_t size, int64_t stride) {
        return cuuint64_t(size == 1 ? 16 : stride * element_bytes);
    };
    const cuuint64_t steps[] = {bytes(heads, strides[2]), bytes(tokens, strides[1]), bytes(batch, strides[0])};
    const cuuint32_t box[] = {cuuint32_t(LINE_BYTES / element_bytes), cuuint32_t(box_heads), cuuint32_t(box_tokens), 1},
                     every[] = {1, 1, 1, 1};
    for (const cuuint64_t step : steps)
        if (step == 0) return false;
    const CUtensorMapDataType type = element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 :
#if defined(AITER_DTYPE_BF16)
                                                        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
#else
                                                        CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
#endif
    return encode(&map, type, 4, const_cast<void *>(tensor), sizes, steps, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B,
                  reuse == Reuse::ONCE ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* That of a call's keys or values, whose boxes have as many tokens; 0: there cannot be any. */
template <class Call>
inline bool make_of_cache(CUtensorMap &map, Reuse reuse, const Call &call, const void *tensor, const int64_t strides[3],
                          int columns, int box_tokens) {
    const auto &p = call.problem;
    const int64_t batch = PAGED ? p.num_pages : p.packed_k ? 1 : p.batch;
    const int64_t tokens = PAGED ? p.page_size : p.packed_k ? p.total_k : p.seqlen_k;
    return box_tokens != 0 &&
           make(map, reuse, tensor, strides, batch, tokens, p.heads_kv, columns, box_tokens, 1, CACHED_BYTES);
}
template <class Call>
inline bool make_keys_and_values(CUtensorMap &key, CUtensorMap &value, Reuse reuse, const Call &call, int box_tokens) {
    const auto &p = call.problem;
    const auto &t = call.tensors;
    return make_of_cache(key, reuse, call, t.key, p.key_strides, HEAD_DIM, box_tokens) &&
           make_of_cache(value, reuse, call, t.value, p.value_strides, VALUE_DIM, box_tokens);
}

__device__ __forceinline__ void prefetch(const CUtensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Where a box of keys in pages is. Its page's number is asked for when the box is looked up, and waited for only when
 * it is used. */
struct PageBox {
    int entry;    /* of the page table */
    int position; /* of the first token in its page. -1: the box is past the end of the sequence or before its window */

    template <class Rows> static __device__ __forceinline__ PageBox look_up(const Rows &rows, int token, int tokens) {
        const unsigned t =
            static_cast<unsigned>(token); /* a tile ahead of the last token that there can be is past it */
        if (t >= static_cast<unsigned>(rows.count) || WINDOW && token <= rows.begin - tokens) return {0, -1};
        const int index = static_cast<int>(t / static_cast<unsigned>(rows.page_size));
        return {rows.pages[index], token - index * rows.page_size};
    }
    /* A page that is not there, of zeros, where there is no box. */
    template <class Rows> __device__ __forceinline__ int page(const Rows &rows) const {
        return position < 0 ? rows.last_page + 1 : clamp(entry, 0, rows.last_page);
    }
    __device__ __forceinline__ int token() const { return greater(position, 0); }
};

/* One box; its bytes count for the barrier (mbarrier::arrive_and_expect). ONCE: of all that the L2 cache holds, it may
 * forget this first. */
template <Reuse REUSE = Reuse::OFTEN>
__device__ __forceinline__ void copy(SharedAddress to, const CUtensorMap &map, int column, int token, int head,
                                     int batch, SharedAddress barrier) {
    if constexpr (REUSE == Reuse::ONCE) {
        uint64_t policy;
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
                     "l"(&map), "r"(column), "r"(head), "r"(token), "r"(batch), "r"(barrier), "l"(policy)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                     "l"(&map), "r"(column), "r"(head), "r"(token), "r"(batch), "r"(barrier)
                     : "memory");
    }
}
/* The other way, in the thread's bulk group (bulk::end): what is outside of the tensor is not written. */
__device__ __forceinline__ void store(const CUtensorMap &map, int column, int token, int head, int batch,
                                      SharedAddress from) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map),
                 "r"(column), "r"(head), "r"(token), "r"(batch), "r"(from)
                 : "memory");
}

} // namespace tensor_map
} // namespace aiter

#endif
