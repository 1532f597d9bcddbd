/* From a launch to what one block works on: which sequence, heads and query rows, and where their tokens are.
 *
 * Every length, offset and page number that comes from device memory is clamped here, and nowhere else, so that no
 * address built from these views leaves the tensors. */
#ifndef AITER_GPU_SEQUENCE_H
#define AITER_GPU_SEQUENCE_H

#include "gpu/mask.h"
#include "gpu/score.h"

namespace aiter {

using Arguments = aiter_attention_call; /* the kernel parameter */

/* The tokens of all sequences on one side, queries or keys: what says where each sequence's are. */
struct Side {
    const int32_t *lengths, *starts; /* null where there are none; starts: of packed rows, or of lists of pages */
    int most;
    bool packed;
    int64_t total; /* packed: rows; lists of pages: entries of the table */
    /* Keys in lists of pages. */
    const int32_t *last_page_len;
    int page_size;
};
template <class Tensors>
__device__ __forceinline__ Side query_side(const aiter_attention_problem &p, const Tensors &t) {
    return {t.seqlens_q, t.starts_q, p.seqlen_q, p.packed_q != 0, p.total_q, nullptr, 0};
}
template <class Tensors> __device__ __forceinline__ Side key_side(const aiter_attention_problem &p, const Tensors &t) {
    if constexpr (PAGED)
        return {t.seqlens_k, t.page_indptr, p.seqlen_k, false, p.listed_pages, t.last_page_len, p.page_size};
    else return {t.seqlens_k, t.starts_k, p.seqlen_k, p.packed_k != 0, p.total_k, nullptr, 0};
}

/* Rows of one sequence: where they begin (packed), where in the table its list of pages begins, or 0; and how many there
 * are. */
struct Extent {
    int64_t begin;
    int count;
};

/* Where a sequence's rows begin, in elements. Factors are chosen and not products: all of them are then read at one time,
 * where each of two branches would wait for its own. */
__device__ __forceinline__ int64_t first_row(bool packed, const Extent &extent, int batch,
                                             const int64_t (&strides)[3]) {
    return (packed ? extent.begin : batch) * (packed ? strides[1] : strides[0]);
}

/* Of a packed sequence or list of pages with starts, or where the last one ends. */
__device__ __forceinline__ int64_t start_of(const Side &side, int batch) {
    return lesser<int64_t>(greater(uniform(side.starts[batch]), 0), side.total);
}

/* How many tokens the list of a sequence's pages holds. */
__device__ __forceinline__ int listed(const Side &side, int batch) {
    const auto start = [&](int b) { return lesser<int64_t>(greater(side.starts[b], 0), side.total); };
    const int64_t pages = start(batch + 1) - start(batch);
    if (pages <= 0) return 0;
    const int last =
        side.last_page_len == nullptr ? side.page_size : clamp(side.last_page_len[batch], 0, side.page_size);
    return static_cast<int>(lesser<int64_t>((pages - 1) * side.page_size + last, side.most));
}

/* How many rows a sequence has, as far as that can be told without adding up those before it. */
__device__ __forceinline__ int length_of(const Side &side, int batch) {
    int count = side.most;
    if (side.packed && side.starts != nullptr)
        count = lesser(count, greater(greater(side.starts[batch + 1], 0) - greater(side.starts[batch], 0), 0));
    if (PAGED && side.page_size > 0 && side.starts != nullptr) count = listed(side, batch);
    return side.lengths == nullptr ? count : lesser(count, clamp(side.lengths[batch], 0, side.most));
}

/* Without starts, a wave adds up the lengths before its sequence: all its lanes take part. */
__device__ __forceinline__ Extent extent(const Side &side, int batch) {
    Extent result = {0, side.most};
    if (side.packed) {
        if (side.starts != nullptr) {
            result.begin = start_of(side, batch);
            result.count = static_cast<int>(
                greater<int64_t>(lesser<int64_t>(start_of(side, batch + 1) - result.begin, side.most), 0));
        } else {
            int64_t sum = 0;
#pragma unroll 1
            for (int b = lane(); b < batch; b += WAVE) sum += clamp(side.lengths[b], 0, side.most);
            /* Over the wave in two parts, so that the exchange is of 32-bit words and neither part overflows. */
            result.begin = (static_cast<int64_t>(uniform(wave_sum(static_cast<int>(sum >> 24)))) << 24) +
                           uniform(wave_sum(static_cast<int>(sum & 0xffffff)));
            result.begin = lesser(result.begin, side.total);
        }
    }
    if (PAGED && side.page_size > 0 && side.starts != nullptr)
        result = {start_of(side, batch), uniform(listed(side, batch))};
    if (side.lengths != nullptr) result.count = lesser(result.count, uniform(clamp(side.lengths[batch], 0, side.most)));
    if (side.packed) result.count = static_cast<int>(lesser<int64_t>(result.count, side.total - result.begin));
    return result;
}

/* Calls clear(row, column) for every eighth column of the packed rows that belong to no sequence and stand between
 * sequence `batch` and the next one or, for the first, before it; rows count from its own first. Thread `thread` of
 * `threads` takes its share. Normally there are none. */
template <int COLUMNS, class Clear>
__device__ __forceinline__ void clear_rest(const Side &side, const Extent &own, int batch, int sequences, int thread,
                                           int threads, Clear clear) {
    constexpr int CHUNKS = COLUMNS / 8;
    const bool last = batch == sequences - 1;
    if (!side.packed || side.starts == nullptr && !last) return;
    const int64_t rest = (last ? side.total : start_of(side, batch + 1)) - own.begin - own.count;
#pragma unroll 1
    for (int64_t i = thread; i < rest * CHUNKS; i += threads) clear(own.count + i / CHUNKS, i % CHUNKS * 8);
    if (batch == 0)
#pragma unroll 1
        for (int64_t i = thread; i < own.begin * CHUNKS; i += threads) clear(-1 - i / CHUNKS, i % CHUNKS * 8);
}

/* Tokens of K and V of one sequence and KV head. `tile(first)` is the view of the tokens from `first` on; place(row,
 * step) is token row + step of it, or the last token of the sequence where that is past it. `row` differs from lane to
 * lane, `step` is the same for all: it goes into the scalar part of the address. Callers ask only for tiles of up to
 * 128 tokens that begin before `count`. Of a window's tokens before `begin` nobody sees any: pages that hold no others
 * are not looked up. */
template <bool PAGED> struct KeyValueRows;

template <> struct KeyValueRows<false> {
    KeyValueRows() = default;
    __device__ __forceinline__ KeyValueRows(const Arguments &arguments, const Extent &extent, int batch, int head)
        : begin(0), count(extent.count) {
        const aiter_attention_problem &p = arguments.problem;
        const auto row_0 = [&](const void *tensor, const int64_t(&strides)[3]) {
            return static_cast<const char *>(tensor) +
                   (head * strides[2] + first_row(p.packed_k, extent, batch, strides)) * CACHED_BYTES;
        };
        key = row_0(arguments.tensors.key, p.key_strides);
        value = row_0(arguments.tensors.value, p.value_strides);
        key_stride = static_cast<uint32_t>(p.key_strides[1] * CACHED_BYTES);
        value_stride = static_cast<uint32_t>(p.value_strides[1] * CACHED_BYTES);
    }

    const char *key, *value;           /* token 0 */
    uint32_t key_stride, value_stride; /* bytes */
    int begin, count;
    __device__ __forceinline__ bool exists(int token) const { return token < count && (!WINDOW || token >= begin); }

    struct Tile {
        const char *key_base, *value_base;
        uint32_t key_stride, value_stride, key_last, value_last; /* last: offset of the last token */
        struct Place {
            uint32_t key_step, key_row, value_step, value_row;
        };
        __device__ __forceinline__ Place place(int row, int step) const {
            /* opaque: or the compiler makes 64-bit comparisons of these 32-bit ones */
            const uint32_t k = opaque_scalar(lesser(step * key_stride, key_last));
            const uint32_t v = opaque_scalar(lesser(step * value_stride, value_last));
            return {k, opaque(lesser(row * key_stride, key_last - k)), v,
                    opaque(lesser(row * value_stride, value_last - v))};
        }
        /* The same where lane l has looked up token l; only pages are worth an exchange. */
        __device__ __forceinline__ Place place_of_lane(Place, int row, int step) const { return place(row, step); }
        __device__ __forceinline__ const char *key(Place p, int byte) const {
            return key_base + p.key_step + (p.key_row + byte);
        }
        __device__ __forceinline__ const char *value(Place p, int byte) const {
            return value_base + p.value_step + (p.value_row + byte);
        }
    };
    __device__ __forceinline__ Tile tile(int first) const {
        const uint32_t last = static_cast<uint32_t>(lesser(count - 1 - first, 127));
        return {key + static_cast<int64_t>(first) * key_stride,
                value + static_cast<int64_t>(first) * value_stride,
                key_stride,
                value_stride,
                last * key_stride,
                last * value_stride};
    }
};

template <> struct KeyValueRows<true> {
    KeyValueRows() = default;
    __device__ __forceinline__ KeyValueRows(const Arguments &arguments, const Extent &extent, int batch, int head)
        : begin(0), count(arguments.problem.num_pages == 0 ? 0 : extent.count) {
        const aiter_attention_problem &p = arguments.problem;
        const aiter_attention_tensors &t = arguments.tensors;
        key = static_cast<const char *>(t.key) + head * p.key_strides[2] * CACHED_BYTES;
        value = static_cast<const char *>(t.value) + head * p.value_strides[2] * CACHED_BYTES;
        key_page_stride = p.key_strides[0] * CACHED_BYTES, value_page_stride = p.value_strides[0] * CACHED_BYTES;
        key_stride = static_cast<uint32_t>(p.key_strides[1] * CACHED_BYTES);
        value_stride = static_cast<uint32_t>(p.value_strides[1] * CACHED_BYTES);
        pages = t.page_table + (t.page_indptr == nullptr ? batch * p.page_table_stride : extent.begin);
        page_size = p.page_size;
        last_page = static_cast<int>(p.num_pages - 1);
    }

    const char *key, *value;                    /* page 0 */
    int64_t key_page_stride, value_page_stride; /* bytes */
    uint32_t key_stride, value_stride;
    int begin, count;
    __device__ __forceinline__ bool exists(int token) const { return token < count && (!WINDOW || token >= begin); }
    const int32_t *pages;     /* of this sequence */
    int page_size, last_page; /* last_page: of the cache */

    struct Tile {
        const KeyValueRows &rows;
        int first;
        struct Place {
            int page, position;
        };
        __device__ __forceinline__ Place place(int row, int step) const {
            const int token = lesser(first + row + step, rows.count - 1);
            const unsigned t = static_cast<unsigned>(WINDOW ? greater(token, rows.begin) : token);
            const unsigned index = t / static_cast<unsigned>(rows.page_size);
            return {clamp(rows.pages[index], 0, rows.last_page), static_cast<int>(t - index * rows.page_size)};
        }
        __device__ __forceinline__ Place place_of_lane(Place mine, int row, int step) const {
            return {from_lane(mine.page, row + step), from_lane(mine.position, row + step)};
        }
        __device__ __forceinline__ const char *key(Place p, int byte) const {
            return rows.key + p.page * rows.key_page_stride + static_cast<int64_t>(p.position) * rows.key_stride + byte;
        }
        __device__ __forceinline__ const char *value(Place p, int byte) const {
            return rows.value + p.page * rows.value_page_stride + static_cast<int64_t>(p.position) * rows.value_stride +
                   byte;
        }
    };
    __device__ __forceinline__ Tile tile(int first) const { return {*this, first}; }
};

/* What 8-bit keys and values are to be multiplied by: those of one sequence that a query head reads. */
template <bool FP8> struct Descales {
    Descales() = default;
    __device__ __forceinline__ Descales(const Arguments &, int, int) {}
    __device__ __forceinline__ const Score &scaled(const Score &score) const { return score; }
    __device__ __forceinline__ float value_descale() const { return 1.0f; }
};
template <> struct Descales<true> {
    float of_keys, of_values;
    Descales() = default;
    __device__ __forceinline__ Descales(const Arguments &arguments, int batch, int kv_head) {
        const aiter_attention_problem &p = arguments.problem;
        const auto read = [&](const float *descale, const int64_t(&strides)[2]) {
            return descale == nullptr ? 1.0f : usual_nan(descale[batch * strides[0] + kv_head * strides[1]]);
        };
        of_keys = read(arguments.tensors.key_descale, p.key_descale_strides);
        of_values = read(arguments.tensors.value_descale, p.value_descale_strides);
    }
    __device__ __forceinline__ Score scaled(const Score &score) const { return score.times(of_keys); }
    __device__ __forceinline__ float value_descale() const { return of_values; }
};

/* A tile of query rows: `head` is the first of those that share it. */
struct Place {
    int batch, head, kv_head, row_tile;
};

/* One query head of one sequence. */
struct Sequence : Descales<FP8> {
    const Element *query;
    Element *output;
    float *lse;                          /* null when not wanted */
    int64_t query_stride, output_stride; /* elements from row to row */
    int rows;                            /* query rows that exist */
    int padded_rows;                     /* rows to be written; past `rows` they are zeros */
    KeyValueRows<PAGED> keys;
    /* Where row 0 stands in the tensor of queries and, not paged, token 0 of `keys` in those of keys and values. */
    int query_batch, query_head, first_query, kv_batch, kv_head, first_key;
    Mask mask;
    float slope; /* of the head, in base 2 */
#if AITER_DROPOUT
    int drawn_head; /* as dropout counts them */
#endif

    __device__ __forceinline__ Sequence(const Arguments &arguments, const Place &place)
        : Sequence(arguments, place.batch, place.head, place.kv_head) {}
    __device__ __forceinline__ Sequence(const Arguments &arguments, int batch, int head, int of_keys)
        : Descales(arguments, batch, of_keys) {
        const aiter_attention_problem &p = arguments.problem;
        const aiter_attention_tensors &t = arguments.tensors;
        const Extent q = extent(query_side(p, t), batch), k = extent(key_side(p, t), batch);
        query_stride = p.query_strides[1];
        output_stride = p.output_strides[1];
        query = static_cast<const Element *>(t.query) + head * p.query_strides[2] +
                first_row(p.packed_q, q, batch, p.query_strides);
        output = static_cast<Element *>(t.output) + head * p.output_strides[2] +
                 first_row(p.packed_q, q, batch, p.output_strides);
        lse = t.lse == nullptr ? nullptr
                               : t.lse + head * p.lse_strides[1] + (p.packed_q ? q.begin : batch * p.lse_strides[0]);
        rows = q.count;
        padded_rows = p.packed_q || !p.clear_rest ? q.count : p.seqlen_q;
        slope = alibi_slope(p, t, batch, head);
#if AITER_DROPOUT
        drawn_head = batch * p.heads_q + head;
#endif

        query_batch = p.packed_q ? 0 : batch;
        query_head = head;
        first_query = static_cast<int>(q.begin);
        kv_batch = p.packed_k ? 0 : batch;
        kv_head = of_keys;
        first_key = static_cast<int>(k.begin);
        keys = KeyValueRows<PAGED>(arguments, k, batch, kv_head);
        mask = Mask(p, q.count, keys.count, t.query_offsets, batch);
        mask.diagonal = uniform(mask.diagonal);
    }
};

/* Zeros, and no log-sum-exp, in the packed rows that belong to no sequence, where they are asked for. `blocks` blocks
 * of `threads` take the heads of the sequences in turn. */
__device__ __forceinline__ void clear_rest(const Arguments &arguments, int blocks, int threads) {
    const aiter_attention_problem &p = arguments.problem;
    if (!p.clear_rest || !p.packed_q) return;
#pragma unroll 1
    for (int i = block(); i < p.batch * p.heads_q; i += blocks) {
        const int batch = i / p.heads_q, head = i % p.heads_q;
        const Side side = query_side(p, arguments.tensors);
        const Extent own = extent(side, batch);
        Element *output = static_cast<Element *>(arguments.tensors.output) + head * p.output_strides[2];
        clear_rest<VALUE_DIM>(side, own, batch, p.batch, thread_in_block(), threads, [&](int64_t row, int column) {
            row += own.begin;
            global_store(output + row * p.output_strides[1] + column, Chunk{});
            if (column == 0 && arguments.tensors.lse != nullptr)
                global_store(arguments.tensors.lse + head * p.lse_strides[1] + row, -INFINITE);
        });
    }
}

/* Which work a block has. Work comes in units: all that reads one KV head of one sequence. A unit's blocks are numbered
 * together, so that they run at one time and find their keys in the L2 cache. With several chiplets (XCDs), to which
 * the hardware deals consecutive blocks in turn, a unit's blocks all go to one of them; units that are left over when
 * each chiplet has got equally many are spread over all. */
struct Work {
    int unit, part;
};

__device__ __forceinline__ Work work_of_block(int block, int units, int parts) {
    const int spread = units / XCDS * XCDS * parts;
    if (XCDS == 1 || block >= spread) return {block / parts, block % parts};
    const int index = block / XCDS;
    return {index / parts * XCDS + block % XCDS, index % parts};
}

/* Whose rows a tile has. A loop may take several query heads that read one KV head together, in a number that is a power
 * of two: few tokens then fill a tile all the same, and keys are read once for all of them. Row r is that of token
 * token(r) in the head that is member(r) heads after the tile's. */
template <bool SEVERAL_HEADS> struct Packing {
    static constexpr int bits = 0;
    Packing() = default;
    __host__ __device__ explicit Packing(const aiter_attention_problem &, int = 0) {}
    __device__ __forceinline__ int token(int row) const { return row; }
    __device__ __forceinline__ int member(int) const { return 0; }
};
template <> struct Packing<true> {
    static constexpr int MOST_BITS = 6, MOST_ROWS = 1 << 30;
    int bits;
    Packing() = default;
    /* So many heads that they have no more than most_rows. */
    __host__ __device__ explicit Packing(const aiter_attention_problem &p, int most_rows = MOST_ROWS) : bits(0) {
        const int group = p.heads_q / p.heads_kv;
        while (bits < MOST_BITS && (group >> bits & 1) == 0 && p.seqlen_q <= most_rows >> (bits + 1)) ++bits;
    }
    __device__ __forceinline__ int token(int row) const { return row >> bits; }
    __device__ __forceinline__ int member(int row) const { return row & ((1 << bits) - 1); }
};

/* What every kernel asks of a problem before it launches. */
inline int check_problem(const aiter_attention_problem &p) {
    const int64_t limit = int64_t(1) << 24;
    if (p.key_strides[1] >= limit || p.value_strides[1] >= limit) return LAUNCH_STRIDE_TOO_LARGE;
    if (PAGED ? p.page_size <= 0 : p.page_size != 0) return LAUNCH_BAD_PROBLEM;
    if (p.heads_kv <= 0 || p.heads_q % p.heads_kv != 0) return LAUNCH_BAD_PROBLEM;
    if (int64_t(p.batch) * p.heads_q > 0x7fffffff) return LAUNCH_GRID_TOO_LARGE; /* they are counted in 32 bits */
    if (SOFTCAP && !(p.softcap > 0)) return LAUNCH_BAD_PROBLEM;
    if (CHUNK && p.attention_chunk <= 0) return LAUNCH_BAD_PROBLEM;
    if (DROPOUT && (p.dropout_threshold < 0 || p.dropout_threshold > 65535)) return LAUNCH_BAD_PROBLEM;
    return 0;
}

} // namespace aiter

#endif
