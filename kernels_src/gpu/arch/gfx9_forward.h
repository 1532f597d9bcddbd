/* The loop over the tiles of keys on gfx942 and gfx950, up to 128 dimensions: eight waves in two groups of four, one of
 * each on every SIMD, that alternate. While one multiplies (M), the other does its softmax (V).
 *
 *               between two barriers: tile n                  n + 1
 *   group 0     M: Q K(n)^T, P(n-1) V   V: softmax(n)   |     M                  V             |  ...
 *   group 1     V: softmax(n-1)         M: as above     |     V                  M             |  ...
 *   matrix unit [      group 0        ][     group 1   ]|[    group 0       ][   group 1      ]|
 *   vector unit [      group 1        ][     group 0   ]|[    group 1       ][   group 0      ]|
 *
 *   barriers    One for each tile. Group 0 goes first, so it meets the barrier after its softmax; group 1 meets it after
 *               its products, before the last few of them, so that group 0 can follow without a gap.
 *   priorities  Products before group 1's softmax before group 0's: what comes first to an end is wanted first.
 *   copies      In M, group 0 stores K(n+1) and group 1 V(n), which they have in registers, and load the next: beside
 *               matrix instructions other instructions cost nothing. There are two buffers: what is stored between two
 *               barriers is read between the next two.
 *   registers   Q, O, S of one tile, P of the one before in 16 bit
 *
 * Tiles that a wave does not see it skips, but for its part of the copies and the barriers. */
#ifndef AITER_GPU_ARCH_GFX9_FORWARD_H
#define AITER_GPU_ARCH_GFX9_FORWARD_H

#include "gpu/tile_loop.h"

namespace aiter {

/* One block for a CU: its buffers take the LDS, and its waves the registers, that two blocks of TileLoop share. */
template <int HEAD_DIM, int VALUE_DIM> struct AlternatingShape : Shape<HEAD_DIM, VALUE_DIM> {
    static constexpr int WAVES = 8, BLOCKS = 1;
};

#if defined(AITER_GFX950)
/* A tile whose rows, of keys and of values, stand as in memory, some bytes apart: all places are constants from one
 * address on. LDS transposes values when it reads them: of 16 lanes, each four point at 32 bytes of a row, and each gets
 * a column of the four rows. */
template <int HEAD_DIM, int VALUE_DIM, int KEYS> struct PaddedTile {
    static constexpr int KEY_CHUNKS = round_up(HEAD_DIM, 16) / 8, VALUE_CHUNKS = round_up(VALUE_DIM, 32) / 8;
    /* So that neither 16 rows of keys, 16 bytes of each, nor four of values, 64 of each, meet in a bank. */
    static constexpr int KEY_PITCH = (KEY_CHUNKS | 1) * 16, VALUE_PITCH = round_up(VALUE_CHUNKS * 16 - 64, 128) + 64;
    static constexpr int KEY_BYTES = KEYS * KEY_PITCH, VALUE_BYTES = KEYS * VALUE_PITCH;

    static __device__ __forceinline__ SharedAddress keys(SharedAddress tile) {
        return opaque(tile + lane() % 32 * KEY_PITCH + lane() / 32 * 16);
    }
    static __device__ __forceinline__ u32x4 key(SharedAddress from, int n, int j) {
        return shared_load<u32x4>(from + n * 32 * KEY_PITCH + j * 32);
    }
    static __device__ __forceinline__ SharedAddress values(SharedAddress tile, int first_column) {
        const int row = lane() / 32 * 4 + lane() % 16 / 4, column = lane() / 16 % 2 * 16 + lane() % 4 * 4;
        return opaque(tile + row * VALUE_PITCH + (first_column + column) * 2);
    }
    static __device__ __forceinline__ u32x4 value(SharedAddress from, int n, int j) {
        const u32x2 a = transposed(from + j * 16 * VALUE_PITCH + n * 64);
        const u32x2 b = transposed(from + (j * 16 + 8) * VALUE_PITCH + n * 64);
        return {a.x, a.y, b.x, b.y};
    }
    static __device__ __forceinline__ u32x2 transposed(SharedAddress address) {
#if defined(__gfx950__)
        return __builtin_bit_cast(u32x2, __builtin_amdgcn_ds_read_tr16_b64_v4i16(
                                             reinterpret_cast<LdsPointer<i16x4>>(static_cast<uintptr_t>(address))));
#else
        return {}; /* the host's half of the compilation does not know the instruction */
#endif
    }

    /* What a thread copies: a chunk of every so many rows. */
    template <bool VALUES, int THREADS> struct Part {
        static constexpr int CHUNKS = VALUES ? VALUE_CHUNKS : KEY_CHUNKS;
        static constexpr int LANES = CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
        static constexpr int APART = THREADS / LANES, ROWS = KEYS / APART;
        static constexpr int PITCH = VALUES ? VALUE_PITCH : KEY_PITCH;
        static_assert(THREADS % LANES == 0 && KEYS % APART == 0, "as many rows for every thread");
        const int chunk, row;
        __device__ __forceinline__ explicit Part(int thread) : chunk(thread % LANES), row(thread / LANES) {}
        __device__ __forceinline__ bool exists() const { return LANES == CHUNKS || chunk < CHUNKS; }
        __device__ __forceinline__ SharedAddress place(SharedAddress tile) const {
            return opaque(tile + (VALUES ? KEY_BYTES : 0) + row * PITCH + chunk * 16);
        }
        /* The k-th row; `to` is its place. */
        __device__ __forceinline__ void store(SharedAddress to, const Eight (&piece)[ROWS], int k) const {
            shared_store(to + k * APART * PITCH, elements_of(piece[k]));
        }
    };
};
template <int HEAD_DIM, int VALUE_DIM, int KEYS> using AlternatingLayout = PaddedTile<HEAD_DIM, VALUE_DIM, KEYS>;
#else
template <int HEAD_DIM, int VALUE_DIM, int KEYS> using AlternatingLayout = PermutedTile<HEAD_DIM, VALUE_DIM, KEYS>;
#endif

/* Where a thread finds its rows of a tile of keys or, where VALUES, of values: row + k * APART, or the last token of the
 * sequence where that is past it. Tiles come in the order of the sequence. */
template <bool VALUES, bool PAGED, int KEYS, int APART, int ROWS> struct Source {
    const KeyValueRows<true> &rows;
    const int row, byte;
    int first;
    __device__ __forceinline__ Source(const KeyValueRows<true> &rows, int row, int byte)
        : rows(rows), row(row), byte(byte) {}
    __device__ __forceinline__ void go_to(int tile) { first = tile; }
    __device__ __forceinline__ const char *operator()(int k) const {
        const auto tile = rows.tile(first);
        const auto place = tile.place(row, k * APART);
        return VALUES ? tile.value(place, byte) : tile.key(place, byte);
    }
};
template <bool VALUES, int KEYS, int APART, int ROWS> struct Source<VALUES, false, KEYS, APART, ROWS> {
    const char *const token_0;
    const uint32_t stride, in_tile; /* in_tile: of this thread's first row */
    const int count, byte;
    const char *step[ROWS]; /* the same for all threads; opaque, or the compiler adds it up for each */
    uint32_t offset[ROWS];

    __device__ __forceinline__ Source(const KeyValueRows<false> &rows, int row, int byte)
        : token_0(VALUES ? rows.value : rows.key), stride(VALUES ? rows.value_stride : rows.key_stride),
          in_tile(row * stride), count(rows.count), byte(byte) {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) offset[k] = in_tile + byte;
    }
    __device__ __forceinline__ void go_to(int tile) {
        const char *const base = token_0 + static_cast<int64_t>(tile) * stride;
        const int last = lesser(count - 1 - tile, KEYS - 1);
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
            step[k] = opaque_scalar(base + static_cast<uint32_t>(lesser(k * APART, last)) * stride);
        if (__builtin_expect(last < KEYS - 1, false))
#pragma unroll
            for (int k = 0; k < ROWS; ++k)
                offset[k] = lesser(in_tile, (last - lesser(k * APART, last)) * stride) + byte;
    }
    __device__ __forceinline__ const char *operator()(int k) const { return step[k] + offset[k]; }
};

/* Scores whose exponentials are made beside another wave's matrix instructions, which leave 24 cycles of their 32: one
 * exponential and two other instructions. Two exponentials would hold up the next matrix instruction. */
template <int KEYS> struct AlternatingScores : Accumulator<1, KEYS> {
    __device__ __forceinline__ float exponentiate(int slot, float scale, float reference) {
        constexpr int VALUES = AlternatingScores::VALUES;
        float sum[2] = {0.0f, 0.0f};
        float exponent = __builtin_fmaf(this->get(slot, 0), scale, -reference);
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            this->set(slot, i, exp2(exponent));
            if (i + 1 < VALUES) exponent = __builtin_fmaf(this->get(slot, i + 1), scale, -reference);
            if (i > 0) sum[i % 2] += this->get(slot, i - 1);
            __builtin_amdgcn_sched_barrier(0);
        }
        return sum[0] + (sum[1] + this->get(slot, VALUES - 1));
    }
};

/* Keys or, where VALUES, values on their way from global into shared memory: a thread's part of a tile. */
template <bool VALUES, class Layout, int DIM, int KEYS, int THREADS> struct TileCopy {
    using Part = typename Layout::template Part<VALUES, THREADS>;
    static constexpr int ROWS = Part::ROWS;
    const Part part;
    Source<VALUES, PAGED, KEYS, Part::APART, ROWS> source;
    int begin, end;    /* tokens of the tile on its way that exist, in the tile */
    Eight piece[ROWS]; /* on its way */

    __device__ __forceinline__ TileCopy(const KeyValueRows<PAGED> &rows, int thread)
        : part(thread), source(rows, part.row, part.chunk * sizeof(Eight)) {}

    __device__ __forceinline__ void go_to(const KeyValueRows<PAGED> &rows, int first) {
        begin = WINDOW ? rows.begin - first : 0;
        end = rows.count - first;
        source.go_to(first);
    }
    __device__ __forceinline__ void load(int k) {
        if (part.exists() && (Part::LANES == DIM / 8 || part.chunk < DIM / 8)) piece[k] = global_load<Eight>(source(k));
        else piece[k] = Eight{};
    }
    /* Other tokens were read instead of those past the end. */
    __device__ __forceinline__ void clear_rest() {
        if (VALUES && __builtin_expect(end < KEYS || WINDOW && begin > 0, false))
#pragma unroll
            for (int k = 0; k < ROWS; ++k) {
                const int token = part.row + k * Part::APART;
                if (token >= end || WINDOW && token < begin) piece[k] = Eight{};
            }
    }
    __device__ __forceinline__ void load() {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) load(k);
    }
    /* `to` is its part's place in a tile. */
    __device__ __forceinline__ void store(SharedAddress to) {
        clear_rest();
#pragma unroll
        for (int k = 0; k < ROWS; ++k) store(to, k);
    }
    __device__ __forceinline__ void store(SharedAddress to, int k) const {
        if (part.exists()) part.store(to, piece, k);
    }
};

template <int HEAD_DIM, int VALUE_DIM>
struct AlternatingLoop
    : LoopOfWaves<AlternatingLoop<HEAD_DIM, VALUE_DIM>, HEAD_DIM, VALUE_DIM, AlternatingShape<HEAD_DIM, VALUE_DIM>> {
    using Base = LoopOfWaves<AlternatingLoop, HEAD_DIM, VALUE_DIM, AlternatingShape<HEAD_DIM, VALUE_DIM>>;
    using Base::KEYS, Base::WAVE_ROWS, Base::WAVES;
    using typename Base::Launch, typename Base::Output, typename Base::Queries, typename Base::Softmax;
    using Layout = AlternatingLayout<HEAD_DIM, VALUE_DIM, KEYS>;
    using Products = TileProducts<HEAD_DIM, VALUE_DIM, KEYS, Layout>;
    using Scores = AlternatingScores<KEYS>;
    static constexpr int GROUP = Base::THREADS / 2; /* threads of one */
    static constexpr int BUFFER_BYTES = Layout::KEY_BYTES + Layout::VALUE_BYTES;
    static constexpr int TILE_BYTES = 2 * BUFFER_BYTES;
    static constexpr int OUTPUT_BYTES = WAVE_ROWS * RowLayout<VALUE_DIM>::BYTES; /* of a wave, after the last tile */
    static constexpr int OUTPUTS_BYTES = WAVES * OUTPUT_BYTES, SHARED_BYTES = greater(TILE_BYTES, OUTPUTS_BYTES);
    static_assert(SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

    /* Where rows are too few for both groups, so that the second would only copy, there may be four waves as in TileLoop,
     * of which two blocks fit into a CU. Predicted: where there are more blocks than CUs and few keys that is up to 1.6 times
     * as fast; else eight waves are, up to 1.4 times. Not where the same bits are asked for whatever else is in the call. */
    using Four = TileLoop<HEAD_DIM, VALUE_DIM, WAVES>;
    static constexpr int FOUR_BYTES = greater(Four::SHARED_BYTES, OUTPUTS_BYTES / 2), FOUR_MOST_KEYS = 1024;
    static bool is_for_four(const Launch &launch, int64_t row_tiles) {
        const aiter_attention_problem &p = launch.problem;
        const int64_t rows = int64_t(p.seqlen_q) << launch.packing.bits;
        if (rows > Four::BLOCK_ROWS || p.seqlen_k > FOUR_MOST_KEYS || p.batch_invariant) return false;
        int device = 0;
        return hipGetDevice(&device) == hipSuccess && row_tiles > compute_units(device);
    }
    static int start_blocks(void (*kernel)(Launch), Launch launch, int64_t count, void *stream) {
        launch.four_waves = is_for_four(launch, count);
        return launch.four_waves ? launch_with_shared(kernel, count, Four::THREADS, FOUR_BYTES, stream, launch)
                                 : launch_with_shared(kernel, count, Base::THREADS, SHARED_BYTES, stream, launch);
    }
    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, const Score &score,
                                               Finish finish) {
        if (launch.four_waves)
            Four::template run<RowTile>(launch, shared, score, [&](const RowTile &tile, auto &softmax, auto &o) {
                barrier(); /* for store_output */
                finish(tile, softmax, o);
            });
        else Base::template run<RowTile>(launch, shared, score, finish);
    }

    /* When in the scores' products a thread's first row is stored, two products before the next, and when it is found
     * out where the next ones are. Where there are fewer products, all of that comes before them. */
    static constexpr int STORE = 5, GO_ON = 12;
    static constexpr bool BESIDE = Products::SCORE_PRODUCTS >= 16;
    /* Of the output's products, those that group 1 makes after the barrier; their operands have been read. gfx950's
     * group 0 comes to the barrier later than group 1 as it is. */
#if defined(AITER_GFX950)
    static constexpr int LATER = 0;
#else
    static constexpr int LATER = 2;
#endif
    static_assert(LATER <= READS_AHEAD, "operands are read before the barrier");

    template <int PRIORITY> static __device__ __forceinline__ void set_priority() {
        __builtin_amdgcn_sched_barrier(0);
        __builtin_amdgcn_s_setprio(PRIORITY);
        __builtin_amdgcn_sched_barrier(0);
    }

    template <class RowTile>
    static __device__ __forceinline__ void attend(const Launch &launch, const RowTile &tile, SharedAddress shared,
                                                  const Score &score, const Dropout &dropout, Softmax &softmax,
                                                  Output &o) {
        o.clear();
        if (tile.keys.empty()) return;
        if (wave() < WAVES / 2) attend<0>(launch, tile, shared, score, dropout, softmax, o);
        else attend<1>(launch, tile, shared, score, dropout, softmax, o);
    }

    template <int NUMBER, class RowTile>
    static __device__ __forceinline__ void attend(const Launch &launch, const RowTile &tile, SharedAddress shared,
                                                  const Score &score, const Dropout &dropout, Softmax &softmax,
                                                  Output &o) {
        constexpr bool FIRST = NUMBER == 0; /* group 0: copies keys, and is ahead */
        const int wave_row = tile.first_row + Base::wave_row();
        const Range wave_keys = tile.keys_of_any(wave_row, WAVE_ROWS);
        const Range keys_of_all = tile.keys_of_all(wave_row, WAVE_ROWS);
        const Range &block_keys = tile.keys;
        const KeyValueRows<PAGED> &keys = tile.sequence.keys;

        Queries queries;
        Base::load_queries(queries, launch, tile, shared, wave_row, score.query_bits);

        using Copy = TileCopy<!FIRST, Layout, FIRST ? HEAD_DIM : VALUE_DIM, KEYS, GROUP>;
        Copy copy(keys, thread_in_block() % GROUP);
        /* To the tile from `first` on. Past the last one something is copied for nothing. */
        const auto go_to = [&](int first) { copy.go_to(keys, lesser(first, block_keys.high - 1)); };
        go_to(block_keys.low);
        copy.load();
        if (FIRST) {
            copy.store(copy.part.place(shared));
            go_to(block_keys.low + KEYS);
            copy.load();
        }
        meet();

        const SharedAddress both = 2 * shared + BUFFER_BYTES;
        SharedAddress next_buffer = shared; /* of the tile after the one from `first` on */
        Scores s;
        s.clear();
        u32x4 p[KEYS / 16];
        bool seen = false; /* is the tile from `first` on */
        typename Base::Work::InTurn pieces(launch.work, block_keys.low);
        if (!FIRST) meet();
        for (int first = block_keys.low - KEYS; first < block_keys.high; first += KEYS) {
            auto scores = Products::scores(next_buffer);
            if constexpr (CUT && FIRST) pieces.pass(launch.work, first, seen, softmax, o);
            if (__builtin_expect(seen, true)) {
                Base::finish_scores(s, first, wave_row, keys_of_all, tile, score);
                softmax.update(s, o);
                Base::drop(s, first, wave_row, tile.sequence, dropout);
#pragma unroll
                for (int j = 0; j < KEYS / 16; ++j) {
                    if (!FIRST && j < scores.AHEAD) scores.begin(j);
                    __builtin_amdgcn_sched_barrier(0);
                    p[j] = round_operand(s, 0, j);
                    __builtin_amdgcn_sched_barrier(0);
                }
            } else if (!FIRST) {
                scores.begin();
            }

            __builtin_amdgcn_s_setprio(2);
            const int next = first + KEYS, after = next + KEYS;
            const SharedAddress buffer = both - next_buffer;
            const bool sees_next = wave_keys.overlaps<WINDOW>(next, lesser(after, block_keys.high));
            /* Whether group 1 has done with a piece after these products: then it adds it up before the barrier, while
             * group 0 does. */
            bool cut = false;
            if constexpr (CUT && !FIRST) cut = next < block_keys.high && pieces.is_cut(next);
            copy.clear_rest();
            const SharedAddress to = copy.part.place(FIRST ? buffer : next_buffer);
            auto outputs = Products::template outputs<Output>(buffer + Layout::KEY_BYTES);
            if (FIRST) {
                meet();
                scores.begin();
            }
            const auto go_on = [&] { go_to(FIRST ? after + KEYS : after); };
            const auto copy_at_once = [&] {
                copy.store(to);
                go_on();
                outputs.begin();
            };
            if (__builtin_expect(sees_next, true)) {
                if (!BESIDE) copy_at_once();
                Products::multiply(scores, queries, s, [&](int i) {
                    if (!BESIDE) return;
                    constexpr int READ = Products::SCORE_PRODUCTS - outputs.AHEAD;
                    if (i >= STORE && (i - STORE) % 2 == 0 && (i - STORE) / 2 < Copy::ROWS)
                        copy.store(to, (i - STORE) / 2);
                    if (i == GO_ON) go_on();
                    if (i >= READ) outputs.begin(i - READ);
                });
            } else {
                copy_at_once();
            }
            if (__builtin_expect(seen, true)) {
                Products::multiply(
                    outputs, [&](int, int j) { return p[j]; }, o,
                    [&](int i) {
                        constexpr int STRIDE = lesser(outputs.PRODUCTS / Copy::ROWS, 2);
                        static_assert(STRIDE > 0, "a product before each load");
                        if (i % STRIDE == 0 && i / STRIDE < Copy::ROWS) copy.load(i / STRIDE);
                        if (!FIRST && i == outputs.PRODUCTS - LATER && !cut) meet();
                    });
                if (!FIRST && LATER == 0 && !cut) meet();
            } else {
                copy.load();
                if (!FIRST && !cut) meet();
            }
            if constexpr (CUT && !FIRST)
                if (__builtin_expect(cut, false)) {
                    pieces.pass(launch.work, next, sees_next, softmax, o);
                    meet();
                }
            __builtin_amdgcn_s_setprio(NUMBER);
            seen = sees_next;
            next_buffer = buffer;
        }
        if (FIRST) meet();
        meet(); /* the buffers are free */
        if constexpr (CUT) pieces.collect(launch.work, shared, softmax, o);
    }

    /* Through shared memory, so that the wave stores whole rows: a lane has 8 bytes here and there of its own. */
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, SharedAddress shared, RowPointer row) {
        using Rows = RowLayout<VALUE_DIM>;
        const SharedAddress own = shared + wave() * OUTPUT_BYTES;
        const SharedAddress to = opaque(own + Rows::chunk(Output::row(0), 0) + Output::lane_column() * 2);
#pragma unroll
        for (int i = 0; i < Output::VALUES; i += 4)
            shared_store(further(to, Output::column(i) / 8 << 4), u32x2{to_elements(o.get(0, i), o.get(0, i + 1)),
                                                                        to_elements(o.get(0, i + 2), o.get(0, i + 3))});
        wave_sync();
        constexpr int CHUNKS = VALUE_DIM / 8, LANES = CHUNKS <= 8 ? 8 : 16; /* LANES store one row */
        static_assert(CHUNKS <= LANES, "a row is stored at one time");
        const int chunk = lane() % LANES;
#pragma unroll
        for (int first = 0; first < WAVE_ROWS; first += WAVE / LANES) {
            const int r = first + lane() / LANES;
            Element *pointer = row(r);
            const Chunk elements = shared_load<Chunk>(own + Rows::chunk(r, chunk));
            if (pointer != nullptr && chunk < CHUNKS) global_store(pointer + chunk * 8, elements);
        }
    }
};

} // namespace aiter

#endif
