/* Writes new keys and values to their places in a cache, on their way rotated or made 8-bit floats where that is asked
 * for; and rotates the queries that come with them. See aiter_cache_write_problem.
 *
 *   block    one token: of the query, the new keys or the new values; where it goes is worked out once, in scalars
 *
 *   thread   runs of 8 elements    [ head 0: run 0 | run 1 | ... ][ head 1: ... ]
 *                                      |       |
 *            loaded in one piece, with the run that holds the other halves of its pairs, where elements lie at multiples
 *            of 8; else one by one. What stays as it is moves as bits.
 *
 * Built for one dtype and one kind of cache, any sizes. */
#define AITER_CACHE_WRITE
/* Its spec names no head_dim (0: any); the target, which is written for attention, wants one that attention takes. */
#undef AITER_HEAD_DIM
#define AITER_HEAD_DIM 8
#include "gpu/arch.h"

#include "cache_rows.h"

namespace aiter {

constexpr int THREADS = 128, RUN = 8;
enum Aligned { ALIGNED_QUERY = 1, ALIGNED_KEY = 2, ALIGNED_VALUE = 4, ALIGNED_ANGLES = 8 };

#if defined(__HIP__)
typedef u32x4 Bytes16;
typedef u32x2 Bytes8;
#else
typedef uint4 Bytes16;
typedef uint2 Bytes8;
#endif

/* In pairs, as they are in registers. */
struct Run {
    uint32_t pairs[RUN / 2];

    __device__ __forceinline__ Element get(int j) const {
        return static_cast<Element>(j % 2 ? pairs[j / 2] >> 16 : pairs[j / 2]);
    }
    /* Once each, from zeros. */
    __device__ __forceinline__ void set(int j, Element x) { pairs[j / 2] |= static_cast<uint32_t>(x) << j % 2 * 16; }
};

__device__ __forceinline__ Run load_run(const Element *from, int64_t step, int count, bool aligned) {
    Run run = {};
    if (aligned && count == RUN) {
        const Bytes16 bytes = global_load<Bytes16>(from);
        __builtin_memcpy(&run, &bytes, sizeof run);
    } else {
#pragma unroll
        for (int j = 0; j < RUN; ++j)
            if (j < count) run.set(j, global_load<Element>(from + j * step));
    }
    return run;
}

__device__ __forceinline__ Element nearest_even(float x) {
#if defined(AITER_DTYPE_BF16)
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return static_cast<Element>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
#else
    return to_element(x);
#endif
}

/* The elements of `run`, `first` ... of a row at `row`, rotated where they are in a pair. */
__device__ __forceinline__ void rotate(float (&x)[RUN], const Run &run, const Element *row, int first,
                                       const CacheToken &token, const aiter_cache_write_call &call, bool aligned,
                                       bool aligned_angles) {
    const aiter_cache_write_problem &p = call.problem;
    const int pairs = token.rotary_dim / 2;
    const Element *cosines = static_cast<const Element *>(call.tensors.rotary_cos) + token.angles * p.cos_stride;
    const Element *sines = static_cast<const Element *>(call.tensors.rotary_sin) + token.angles * p.sin_stride;
    if (!p.interleaved && pairs % RUN == 0) { /* the run is in one half */
        const bool low = first < pairs;
        const int pair = low ? first : first - pairs;
        const Run other =
            load_run(row + (low ? first + pairs : pair) * token.from_element, token.from_element, RUN, aligned);
        const Run cosine = load_run(cosines + pair, 1, RUN, aligned_angles);
        const Run sine = load_run(sines + pair, 1, RUN, aligned_angles);
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
            const float s = to_float(sine.get(j));
            x[j] = to_float(run.get(j)) * to_float(cosine.get(j)) + to_float(other.get(j)) * (low ? -s : s);
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < RUN; ++j) {
        const int d = first + j;
        if (d >= token.rotary_dim) continue;
        const bool low = p.interleaved ? j % 2 == 0 : d < pairs;
        const int pair = p.interleaved ? d / 2 : low ? d : d - pairs;
        const Element other =
            p.interleaved ? run.get(j ^ 1) : global_load<Element>(row + (low ? d + pairs : pair) * token.from_element);
        const float s = to_float(global_load<Element>(sines + pair));
        x[j] = x[j] * to_float(global_load<Element>(cosines + pair)) + to_float(other) * (low ? -s : s);
    }
}

__device__ __forceinline__ void store_run(Element *to, int64_t step, const Run &run, int count, bool aligned) {
    if (aligned && count == RUN) {
        Bytes16 bytes;
        __builtin_memcpy(&bytes, &run, sizeof bytes);
        global_store(to, bytes);
    } else {
#pragma unroll
        for (int j = 0; j < RUN; ++j)
            if (j < count) global_store(to + j * step, run.get(j));
    }
}

#if AITER_FP8_CACHE
__device__ __forceinline__ void store_fp8(Fp8 *to, int64_t step, const float (&x)[RUN], float scale, int count,
                                          bool aligned) {
    Fp8 run[RUN];
#pragma unroll
    for (int j = 0; j < RUN; ++j) run[j] = to_fp8(x[j] / scale);
    if (aligned && count == RUN) {
        Bytes8 bytes;
        __builtin_memcpy(&bytes, run, sizeof bytes);
        global_store(to, bytes);
    } else {
#pragma unroll
        for (int j = 0; j < RUN; ++j)
            if (j < count) global_store(&to[j * step].bits, run[j].bits);
    }
}
#endif

__global__ void __launch_bounds__(THREADS) cache_write(const aiter_cache_write_call call, const int alignment) {
    let_next_start();
    wait_for_previous();
    CacheToken token = cache_token(call, block());
    if (token.fate == TOKEN_HAS_NO_PLACE && token.which == 0) token.rotary_dim = 0;
    else if (token.fate != TOKEN_IS_WRITTEN) return;
    const bool aligned = alignment & (ALIGNED_QUERY << token.which), aligned_angles = alignment & ALIGNED_ANGLES;
    const int runs = (token.dim + RUN - 1) / RUN;
    for (int n = thread_in_block(); n < token.heads * runs; n += THREADS) {
        const int head = n / runs, first = (n - head * runs) * RUN;
        const int count = token.dim - first < RUN ? token.dim - first : RUN;
        const Element *row = static_cast<const Element *>(token.from) + token.from_at + head * token.from_head;
        Run run = load_run(row + first * token.from_element, token.from_element, count, aligned);
        const int64_t target = token.to_at + head * token.to_head + first * token.to_element;
        const bool rotated = first < token.rotary_dim, quantised = AITER_FP8_CACHE && token.which != 0;
        float x[RUN];
        if (rotated || quantised) {
#pragma unroll
            for (int j = 0; j < RUN; ++j) x[j] = to_float(run.get(j));
            if (rotated) rotate(x, run, row, first, token, call, aligned, aligned_angles);
        }
#if AITER_FP8_CACHE
        if (quantised) {
            const float scale = token.scale ? global_load<float>(token.scale + head * token.scale_stride) : 1.0f;
            store_fp8(static_cast<Fp8 *>(token.to) + target, token.to_element, x, scale, count, aligned);
            continue;
        }
#endif
        if (rotated) {
            run = {};
#pragma unroll
            for (int j = 0; j < RUN; ++j) run.set(j, nearest_even(x[j]));
        }
        store_run(static_cast<Element *>(token.to) + target, token.to_element, run, count, aligned);
    }
}

/* Do runs begin at multiples of their size, in elements of `bytes` bytes? */
inline bool aligned(const void *address, const int64_t *strides, int bytes) {
    return reinterpret_cast<uintptr_t>(address) % (RUN * bytes) == 0 && strides[3] == 1 &&
           (strides[0] | strides[1] | strides[2]) % RUN == 0;
}

} // namespace aiter

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *) { return 0; }

AITER_EXPORT int aiter_launch(const aiter_call *call, void *stream) {
    using namespace aiter;
    const aiter_cache_write_problem &p = call->problem;
    const aiter_cache_write_tensors &t = call->tensors;
    constexpr int CACHE_BYTES = AITER_FP8_CACHE ? 1 : 2;
    const int64_t angles[4] = {p.cos_stride, p.sin_stride, 0, 1};
    const int alignment =
        (aligned(t.query, p.query_strides, 2) && aligned(t.rotated, p.rotated_strides, 2) ? ALIGNED_QUERY : 0) |
        (aligned(t.key, p.key_strides, 2) && aligned(t.key_cache, p.key_cache_strides, CACHE_BYTES) ? ALIGNED_KEY : 0) |
        (aligned(t.value, p.value_strides, 2) && aligned(t.value_cache, p.value_cache_strides, CACHE_BYTES)
             ? ALIGNED_VALUE
             : 0) |
        (aligned(t.rotary_cos, angles, 2) && aligned(t.rotary_sin, angles, 2) ? ALIGNED_ANGLES : 0);
    return launch_next(aiter::cache_write, cache_write_units(*call), THREADS, 0, stream, *call, alignment);
}

AITER_EXPORT const char *aiter_error_text(int code) { return aiter::error_text(code); }
