/* Few query rows on sm_90a, up to 256 dimensions: keys and values stream through a ring in shared memory that the bulk
 * copy engine keeps full, from one unit of the schedule into the next. It takes the place of the loop of
 * decode_loop.h, whose waves copy for themselves and begin each unit with nothing on its way.
 *
 *   block           one for each SM
 *   copiers         wave 0 of four sets off stage after stage, as soon as the readers have given one back: a box of
 *                   the tensor map for each 128 bytes of columns. Of pages there is one for each of them and of the
 *                   stage's pages: all four share these. Copiers know the block's pieces as the readers do, and are
 *                   ahead of them by the whole ring. Tensors of which there is no map, and pages whose size is no
 *                   multiple of 8, are copied by all four, 16 bytes a lane (8 of 8-bit elements).
 *   readers         the waves that multiply, with mma.sync. With one row tile each takes every eighth (or fourth) tile
 *                   of KEYS tokens, and at the end of a piece all leave their rows in shared memory, where each adds up
 *                   some (Results::row_tile in attention_decode.hip); with more, waves are dealt to row tiles, and
 *                   halve their number by adding up.
 *
 *     ring          | stage 0 | stage 1 | stage 2 | stage 3 | stage 4 |     a stage: K and V of a few tiles, in blocks
 *                     in use    in use    on its way ...                    of 128 bytes of columns, rows permuted as
 *                                                                           RowLayout<64> has them
 *     readers       wave 0 ... 3: tiles of even stages; 4 ... 7: of odd ones (four tiles a stage, one row tile)
 *
 *   a cluster       where units are few: blocks side by side have equal parts of one. Each sends the rows of its part
 *                   to the blocks that write them, into their shared memory
 *   barriers        of a stage: `full`, it has arrived; `empty`, all readers are done with it, which all of them say of
 *                   each stage, whosever its tiles are
 *
 * 8-bit keys and values stay as they are until they are in registers. There each becomes the fp16 that it is, exactly,
 * and products are made in fp16 whatever the query's type:
 *
 *   K     ldmatrix gives a lane four neighbouring columns 4 t ... 4 t + 3 of a key: places 2 t, 2 t + 1, 2 t + 8 and
 *         2 t + 9 of a product's 16, so the columns of Q are stored in that order
 *   V     ldmatrix.trans moves pairs of columns: of two keys a lane has columns 2 g and 2 g + 1. One byte permutation
 *         makes of them a pair of keys for each column. The output's even columns so are in one tile of eight, the odd
 *         ones in the next, and a lane has four neighbouring ones
 *   Q     rows of bf16 are multiplied by a power of two that takes their greatest number to 2^14 ... 2^15: what is less
 *         than 2^-29 of that loses bits. Scores are divided by it again, in fp32
 *   P     times 2^7: numbers down to 2^-21 of the greatest keep all bits of fp16, and none above 2^-31 is lost
 *
 * Bound, D = 128: at 3.05 TB/s an SM receives 13 bytes a cycle. A tile of 16 tokens, 8 KB, takes 620 cycles to arrive;
 * its 32 products keep a quarter of the SM busy for 256, and from its first ldmatrix to its last product it is about
 * 800: eight waves could use up 80 bytes a cycle. 160 KB are on their way, of which 25 to 40 would do to cover the
 * memory's latency: the rest lets readers finish a unit (some 3000 cycles, 40 KB) without the memory noticing. 8 bits:
 * a tile of 32 tokens has the same bytes, twice the products, and 128 conversions with 32 byte permutations: 1300
 * cycles, 50 bytes a cycle. With 64 rows each tile is used four times: 20 and 12 bytes a cycle. What was measured:
 * docs/hopper_decoding.md. */
#ifndef AITER_GPU_ARCH_SM90_DECODE_H
#define AITER_GPU_ARCH_SM90_DECODE_H

#include "gpu/arch/sm80_decode.h"
#include "gpu/arch/sm90_tensor_map.h"
#include "gpu/decode_add_up.h"
#include "gpu/score.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

namespace aiter {

#if AITER_FP8_CACHE
/* Pairs of tiles have the even and the odd of 16 columns. */
template <int COLUMNS> struct RingOutput : Accumulator<1, COLUMNS> {
    __device__ __forceinline__ float get(int slot, int i) const {
        return this->tile[0][i / 4 * 2 + i % 2][slot * 2 + i % 4 / 2];
    }
    __device__ __forceinline__ void set(int slot, int i, float x) {
        this->tile[0][i / 4 * 2 + i % 2][slot * 2 + i % 4 / 2] = x;
    }
    static __device__ __forceinline__ int column_of_lane(int i) { return i / 4 * 16 + lane() % 4 * 4 + i % 4; }
};
#else
template <int COLUMNS> using RingOutput = DecodeOutput<COLUMNS>;
#endif

template <int HEAD_DIM, int VALUE_DIM> struct RingDecode {
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM);
    static constexpr int ROWS = ROW_TILE, PART_ROWS = 4 * ROWS, KEYS = WIDER <= 64 || FP8 ? 32 : 16;
    static constexpr int READERS = WIDER <= 128 ? 8 : 4, COPIERS = 4, WAVES = READERS + COPIERS, BLOCKS = 1;
    static constexpr int STAGE_TILES = WIDER <= 128 ? 4 : 2, STAGE_KEYS = STAGE_TILES * KEYS, STEP_KEYS = STAGE_KEYS;
    static constexpr int ALIGNMENT = 16;   /* of a window's first key: no box of a page is longer there */
    static constexpr int MOST_CLUSTER = 8; /* blocks; of 16, not all that a GPU has SMs for find a place */
    static constexpr int MERGE_STEPS = 0, PIECE_STEPS = 0; /* what cutting costs: little, as memory is never idle */
    static constexpr int LANES = LANES_PER_ROW, RUN = FP8 ? 4 : 2, TEAM = 1;
    using Scores = Accumulator<1, KEYS>;
    using Output = RingOutput<VALUE_DIM>;
    using Queries = Query<HEAD_DIM, 1>;
    static __device__ __forceinline__ bool leads_row() { return lane_leads_row(); }
};

template <int HEAD_DIM, int VALUE_DIM> struct RingLoop : RingDecode<HEAD_DIM, VALUE_DIM> {
    using Shape = RingDecode<HEAD_DIM, VALUE_DIM>;
    using Shape::READERS, Shape::COPIERS, Shape::ROWS, Shape::PART_ROWS, Shape::KEYS;
    using Shape::STAGE_TILES, Shape::STAGE_KEYS;
    using typename Shape::Output, typename Shape::Queries, typename Shape::Scores;
    using Softmax = OnlineSoftmax<2>;
    using Rows = KeyValueRows<PAGED>;
    static constexpr int READER_THREADS = READERS * WAVE, COPIER_THREADS = COPIERS * WAVE;

    static constexpr int LINE_COLUMNS = 128 / CACHED_BYTES, LINE_BYTES = STAGE_KEYS * 128;
    static constexpr int KEY_LINES = round_up(HEAD_DIM, LINE_COLUMNS) / LINE_COLUMNS;
    static constexpr int VALUE_LINES = round_up(VALUE_DIM, LINE_COLUMNS) / LINE_COLUMNS;
    static constexpr int LINES = KEY_LINES + VALUE_LINES, STAGE_BYTES = LINES * LINE_BYTES;
    /* Q, and when it is no longer needed, what readers hand to each other. */
    static constexpr int EXCHANGE_BYTES =
        greater(READERS / 2 * EXCHANGED_FLOATS<Output> * WAVE * 4, PART_ROWS / ROWS * Queries::SHARED_BYTES);
    /* What blocks of a cluster hand to each other: rows of one row tile, as many of each block. */
    static constexpr int HANDED_ROWS = ROWS + Shape::MOST_CLUSTER - 1, PART_FLOATS = VALUE_DIM + 8;
    static constexpr int HANDED_BYTES = HANDED_ROWS * PART_FLOATS * 4;
    /* No more stages than leave room for the blocks of the kernel that adds up, who wait for this one's end. */
    static constexpr int REST_BYTES = EXCHANGE_BYTES + HANDED_BYTES + PART_ROWS * 4 + 1024, MERGE_BYTES = 8 * 1024;
    static constexpr int STAGES = lesser((SHARED_LIMIT - REST_BYTES - MERGE_BYTES) / STAGE_BYTES, 8);
    static constexpr int EXCHANGE_AT = STAGES * STAGE_BYTES, HANDED_AT = EXCHANGE_AT + EXCHANGE_BYTES;
    static constexpr int FACTORS_AT = HANDED_AT + HANDED_BYTES;
    static constexpr int BARRIERS_AT = FACTORS_AT + PART_ROWS * 4;
    static constexpr int SHARED_BYTES = BARRIERS_AT + STAGES * 2 * mbarrier::BYTES;
    static constexpr int WRITERS = READER_THREADS, OWN_COLUMNS = VALUE_DIM;
    static_assert(STAGES >= 3, "");

    /* ---- host ---- */

    /* The kernel's parameter. */
    struct Launch : Arguments {
        CUtensorMap key, value;
        int box;           /* keys that a map's copy brings; 0: there are no maps */
        int cluster;       /* blocks that have equal parts of a unit, or 1 */
        uint32_t *arrived; /* for each range: how many blocks have written their part of the unit that is cut at its
                              end. The last of them adds them up. Null: another kernel does */
    };
    static Launch launch_of(const aiter_attention_call &call, int cluster, uint32_t *arrived) {
        Launch launch;
        static_cast<Arguments &>(launch) = call;
        launch.cluster = cluster;
        launch.arrived = arrived;
        launch.box = PAGED ? tensor_map::box_of(call.problem.page_size, STAGE_KEYS) : STAGE_KEYS;
        if (!tensor_map::make_keys_and_values(launch.key, launch.value, tensor_map::Reuse::ONCE, call, launch.box))
            launch.box = 0;
        return launch;
    }

    /* ---- ring ---- */

    struct Ring {
        SharedAddress shared;
        int stage = 0;
        uint32_t turn = 0; /* how often, modulo 2, the stages have been gone through */

        __device__ __forceinline__ SharedAddress tile() const { return shared + stage * STAGE_BYTES; }
        __device__ __forceinline__ SharedAddress full() const {
            return shared + BARRIERS_AT + stage * 2 * mbarrier::BYTES;
        }
        __device__ __forceinline__ SharedAddress empty() const { return full() + mbarrier::BYTES; }
        __device__ __forceinline__ void advance() {
            if (++stage == STAGES) stage = 0, turn ^= 1;
        }
        __device__ __forceinline__ void release() const {
            wave_sync();
            if (lane() == 0) mbarrier::arrive(empty());
        }
        __device__ __forceinline__ void vacate() const { mbarrier::wait(empty(), turn ^ 1); /* at once in turn 0 */ }
    };

    /* ---- copies ---- */

    /* One lane of one wave sets off a stage's boxes. Those of pages, which are small, are dealt to the lanes of all copiers,
     * of which each copies the same of every stage: a wave sets off one after the other, for 120 cycles each. */
    static constexpr int MAP_COPIERS = PAGED ? COPIERS : 1;
    static_assert(!PAGED || STAGE_BYTES / (8 * 128) <= MAP_COPIERS * WAVE, "boxes of eight rows, the smallest");

    struct Copier {
        const Launch &launch;
        Ring ring;
        int boxes, line, index; /* of a line; of pages, this lane's: of LINES, and which part of the line's rows */

        __device__ __forceinline__ Copier(const Launch &launch, SharedAddress shared) : launch(launch), ring{shared} {
            const int number = lane() * COPIERS + wave() - READERS;
            boxes = PAGED && launch.box != 0 ? STAGE_KEYS / launch.box : 1;
            line = number / boxes;
            index = number - line * boxes;
        }
        __device__ __forceinline__ void copy_stage(int token, int head, int batch) {
            ring.vacate();
            if (PAGED) {
                if (thread_in_block() == READER_THREADS) mbarrier::arrive_and_expect(ring.full(), STAGE_BYTES);
                wave_sync();
                if (line < LINES) copy_box(line, index, token, head, batch);
            } else if (elected()) {
                mbarrier::arrive_and_expect(ring.full(), STAGE_BYTES);
#pragma unroll
                for (int of_stage = 0; of_stage < LINES; ++of_stage) copy_box(of_stage, 0, token, head, batch);
            }
            wave_sync();
            ring.advance();
        }
        __device__ __forceinline__ void copy_box(int line, int index, int token, int head, int batch) const {
            const bool of_values = line >= KEY_LINES;
            const int column = (of_values ? line - KEY_LINES : line) * LINE_COLUMNS;
            tensor_map::copy<tensor_map::Reuse::ONCE>(ring.tile() + line * LINE_BYTES + index * (LINE_BYTES / boxes),
                                                      of_values ? launch.value : launch.key, column, token, head, batch,
                                                      ring.full());
        }

        /* begin: what token 0 is in the tensor. */
        __device__ __forceinline__ void copy_tokens(int begin, int first, int end, int head, int batch) {
#pragma unroll 1
            for (; first < end; first += STAGE_KEYS) copy_stage(begin + first, head, batch);
        }
        __device__ __forceinline__ void copy_by_map(const Sequence &sequence, const KeyValueRows<false> &, int first,
                                                    int end) {
            copy_tokens(sequence.first_key, first, end, sequence.kv_head, sequence.kv_batch);
        }

        /* Each lane looks up the page of one box, WAVE boxes at a time and as many ahead. */
        __device__ __forceinline__ void copy_by_map(const Sequence &sequence, const KeyValueRows<true> &rows, int first,
                                                    int end) {
            const int box = launch.box, head = sequence.kv_head;
            using tensor_map::PageBox;
            const auto look_up = [&](int begin) { return PageBox::look_up(rows, begin + lane() * box, box); };
            PageBox here = look_up(first), next = look_up(first + WAVE * box);
            int at = 0;
#pragma unroll 1
            for (; first < end; first += STAGE_KEYS) {
                if (at == WAVE) {
                    here = next;
                    next = look_up(first + WAVE * box);
                    at = 0;
                }
                const PageBox mine = {from_lane(here.entry, at + index), from_lane(here.position, at + index)};
                copy_stage(mine.token(), head, mine.page(rows));
                at += boxes;
            }
        }

        /* Without maps: each thread of all copiers has one chunk of each block's rows row, row + PASS_ROWS, ... */
        __device__ __forceinline__ void copy_rows(const Rows &rows, int first, int end) {
            constexpr int CHUNK_BYTES = FP8 ? 8 : 16, CHUNKS = 128 / CHUNK_BYTES, PASS_ROWS = COPIER_THREADS / CHUNKS;
            constexpr int PASSES = STAGE_KEYS / PASS_ROWS;
            const int thread = thread_in_block() - READER_THREADS, row = thread / CHUNKS,
                      byte = thread % CHUNKS * CHUNK_BYTES;
#pragma unroll 1
            for (; first < end; first += STAGE_KEYS) {
                const auto tile = rows.tile(first);
                ring.vacate();
                const SharedAddress to = ring.tile() + RowLayout<64>::chunk(row, byte / 16) + byte % 16;
#pragma unroll 4
                for (int pass = 0; pass < PASSES; ++pass) {
                    const auto place = tile.place(row, pass * PASS_ROWS);
                    const bool exists = rows.exists(first + row + pass * PASS_ROWS);
#pragma unroll
                    for (int line = 0; line < LINES; ++line) {
                        const bool of_values = line >= KEY_LINES;
                        const int column_byte = (of_values ? line - KEY_LINES : line) * 128 + byte;
                        const bool valid = exists && column_byte < (of_values ? VALUE_DIM : HEAD_DIM) * CACHED_BYTES;
                        const char *from = of_values ? tile.value(place, column_byte) : tile.key(place, column_byte);
                        const SharedAddress at =
                            (to ^ (pass * PASS_ROWS % 8 << 4)) + line * LINE_BYTES + pass * PASS_ROWS * 128;
#if AITER_FP8_CACHE
                        copy_eight_async(at, from, valid);
#else
                        copy_async(at, from, valid);
#endif
                    }
                }
                mbarrier::arrive_after_copies(ring.full());
                ring.advance();
            }
        }

        template <class Unit, class Piece>
        __device__ __forceinline__ void copy_piece(const Unit &unit, const Piece &piece) {
            if (piece.first_key >= piece.end_key) return;
            Rows rows = unit.sequence.keys;
            rows.begin = unit.sees(0).low;
            rows.count = piece.end_key;
            if (launch.box == 0) copy_rows(rows, piece.first_key, piece.end_key);
            else copy_by_map(unit.sequence, rows, piece.first_key, piece.end_key);
        }
    };

    /* ---- products ---- */

    /* From the address that a lane names in the first 16 x 16 elements (or 16 x 32 of 8 bits) of a tile to that in
     * those at row `row`, number j along the columns. */
    static __device__ __forceinline__ SharedAddress at(SharedAddress lane_row, int row, int j) {
        return (lane_row ^ ((2 * j & 7) << 4)) + 2 * j / 8 * LINE_BYTES + row * 128;
    }

#if AITER_FP8_CACHE
    static constexpr float P_FACTOR = 128.0f;

    static __device__ __forceinline__ uint32_t halves_of(float x, float y) {
        uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
        return pair;
    }
    /* c (16 x 8) += A (16 x 16) * B (16 x 8) of fp16 */
    static __device__ __forceinline__ void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                           uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif

    static __device__ __forceinline__ void scores(const Queries &queries, SharedAddress keys, Scores &s) {
        const SharedAddress lane_row = keys + columns_first<64>();
        s.clear();
#if AITER_FP8_CACHE
#pragma unroll
        for (int j = 0; j < Queries::STEPS; j += 2) {
            uint32_t a[2][4];
            queries.read(a[0], 0, j);
            if (j + 1 < Queries::STEPS) queries.read(a[1], 0, j + 1);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t k[4];
                load_matrices(k, at(lane_row, n * 16, j / 2));
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (j + i % 2 < Queries::STEPS)
                        multiply_halves(s.tile[0][2 * n + i / 2], a[i % 2], to_halves(k[i], false),
                                        to_halves(k[i], true));
            }
        }
#else
#pragma unroll
        for (int j = 0; j < Queries::STEPS; ++j) {
            uint32_t a[4];
            queries.read(a, 0, j);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t k[4];
                load_matrices(k, at(lane_row, n * 16, j));
                multiply_add(s.tile[0][2 * n], a, k[0], k[1]);
                multiply_add(s.tile[0][2 * n + 1], a, k[2], k[3]);
            }
        }
#endif
    }

    static __device__ __forceinline__ void accumulate(const Scores &s, SharedAddress values, Output &o) {
        constexpr int COLUMN_STEPS = round_up(VALUE_DIM, 16) / 16;
        const SharedAddress lane_row = values + rows_first<64>();
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t p[4];
#if AITER_FP8_CACHE
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&c)[4] = s.tile[0][2 * j + i / 2];
                p[i] = halves_of(c[i % 2 * 2] * P_FACTOR, c[i % 2 * 2 + 1] * P_FACTOR);
            }
#pragma unroll
            for (int n = 0; n < COLUMN_STEPS; n += 2) {
                uint32_t v[4];
                load_matrices_transposed(v, at(lane_row, j * 16, n / 2));
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] = __byte_perm(v[i], 0, 0x3120); /* columns apart, keys in pairs */
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (n + i / 2 < COLUMN_STEPS)
                        multiply_halves(o.tile[0][2 * n + i], p, to_halves(v[i / 2 * 2], i % 2),
                                        to_halves(v[i / 2 * 2 + 1], i % 2));
            }
#else
            round_operand(s, 0, j, p);
#pragma unroll
            for (int n = 0; n < COLUMN_STEPS; ++n) {
                uint32_t v[4];
                load_matrices_transposed(v, at(lane_row, j * 16, n));
                multiply_add(o.tile[0][2 * n], p, v[0], v[1]);
                multiply_add(o.tile[0][2 * n + 1], p, v[2], v[3]);
            }
#endif
        }
    }

    /* ---- readers ---- */

    struct Reader {
        SharedAddress shared;
        Ring ring = {shared};

        static __device__ __forceinline__ void meet_all() { meet(1, READER_THREADS); }

        /* Rows of Q, four lanes for each, 16 columns of a row at a time. */
        template <class Unit>
        __device__ __forceinline__ void store_queries(const Unit &unit, int rows, const QueryBits &bits) const {
            constexpr int STEPS = Queries::STEPS, OWN_STEPS = (STEPS + 3) / 4;
#pragma unroll 1
            for (int row = thread_in_block() / 4; row < rows; row += READER_THREADS / 4) {
                const uint4 *from = row < unit.rows ? reinterpret_cast<const uint4 *>(unit.query(row)) : nullptr;
                uint4 x[OWN_STEPS][2];
#pragma unroll
                for (int i = 0; i < OWN_STEPS; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int chunk = (i * 4 + lane() % 4) * 2 + half;
                        x[i][half] = uint4{0, 0, 0, 0};
                        if (from != nullptr && chunk < HEAD_DIM / 8) x[i][half] = from[chunk];
                        uint4 &own = x[i][half];
                        own = uint4{bits(own.x), bits(own.y), bits(own.z), bits(own.w)};
                    }
                const SharedAddress tile = shared + EXCHANGE_AT + row / ROWS * Queries::SHARED_BYTES;
#if AITER_FP8_CACHE
                make_halves(x, row);
#endif
#pragma unroll
                for (int i = 0; i < OWN_STEPS; ++i) {
                    const int step = i * 4 + lane() % 4;
                    if (step >= STEPS) continue;
                    const uint4 low = x[i][0], high = x[i][1];
                    const auto to = [&](int half) {
                        return tile + RowLayout<HEAD_DIM>::chunk(row % ROWS, step * 2 + half);
                    };
                    shared_store(to(0), FP8 ? uint4{low.x, low.z, high.x, high.z} : low);
                    shared_store(to(1), FP8 ? uint4{low.y, low.w, high.y, high.w} : high);
                }
            }
        }

#if AITER_FP8_CACHE
        /* What the four lanes of a row have, as fp16, and what scores with it are to be multiplied by. */
        template <int OWN_STEPS> __device__ __forceinline__ void make_halves(uint4 (&x)[OWN_STEPS][2], int row) const {
#if defined(AITER_DTYPE_BF16)
            uint32_t *words = reinterpret_cast<uint32_t *>(x);
            uint32_t most = 0; /* exponent of the greatest finite number */
#pragma unroll
            for (int i = 0; i < OWN_STEPS * 8; ++i) {
                const uint32_t first = words[i] >> 7 & 0xff, second = words[i] >> 23 & 0xff;
                most = greater(most, first == 0xff ? 0 : first);
                most = greater(most, second == 0xff ? 0 : second);
            }
            most = greater(most, __shfl_xor_sync(~0u, most, 1));
            most = greater(most, __shfl_xor_sync(~0u, most, 2));
            const uint32_t exponent = lesser(268 - most, 253u); /* of 2^(14 - ...), as floats have it */
            const float scale = __uint_as_float(exponent << 23);
#pragma unroll
            for (int i = 0; i < OWN_STEPS * 8; ++i)
                words[i] =
                    halves_of(__uint_as_float(words[i] << 16) * scale, __uint_as_float(words[i] & 0xffff0000u) * scale);
            if (lane() % 4 == 0) shared_store(shared + FACTORS_AT + row * 4, __uint_as_float((254 - exponent) << 23));
#endif
        }
#endif

        /* Zeros in the rows of a tile of values from `row` on: what stands there meets probabilities of 0. */
        static __device__ __forceinline__ void clear_rows(SharedAddress values, int row) {
#pragma unroll 1
            for (int i = row * 8 + lane(); i < KEYS * 8; i += WAVE)
#pragma unroll
                for (int line = 0; line < VALUE_LINES; ++line)
                    shared_store(values + line * LINE_BYTES + i * 16, uint4{0, 0, 0, 0});
            wgmma::shared_is_written(); /* before the copy that comes next */
            wave_sync();
        }

        /* All readers: the rows of row tile `wave_row`, with the tiles group, group + groups, ... of the piece. */
        template <class Unit>
        __device__ __forceinline__ void attend(const Unit &unit, int first, int end, int wave_row, int group,
                                               int groups, const Score &score, Softmax &softmax, Output &o) {
            const typename Unit::template Wave<Output, ROWS> rows(unit, wave_row, end);
            Queries queries;
            queries.rows = shared + EXCHANGE_AT + wave_row / ROWS * Queries::SHARED_BYTES;
#if AITER_FP8_CACHE && defined(AITER_DTYPE_BF16)
            float factor[2];
#pragma unroll
            for (int slot = 0; slot < 2; ++slot)
                factor[slot] = shared_load<float>(shared + FACTORS_AT + (wave_row + Output::row(slot)) * 4);
#endif
            int tile =
                group < groups && wave_row < unit.rows ? group : INT32_MAX; /* the next, from this stage's first */
#pragma unroll 1
            for (; first < end; first += STAGE_KEYS) {
                mbarrier::wait(ring.full(), ring.turn);
#pragma unroll 1
                for (; tile < STAGE_TILES; tile += groups) {
                    const int key = first + tile * KEYS;
                    if (key >= end) break;
                    const SharedAddress keys = ring.tile() + tile * KEYS * 128, values = keys + KEY_LINES * LINE_BYTES;
                    if (key + KEYS > end) clear_rows(values, end - key);
                    Scores s;
                    scores(queries, keys, s);
#if AITER_FP8_CACHE && defined(AITER_DTYPE_BF16)
#pragma unroll
                    for (int slot = 0; slot < 2; ++slot) s.multiply(slot, factor[slot]);
#endif
                    rows.finish(score, s, key);
                    softmax.update(s, o);
                    accumulate(s, values, o);
                }
                tile -= STAGE_TILES;
                ring.release();
                ring.advance();
            }
#if AITER_FP8_CACHE
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) o.multiply(slot, 1 / P_FACTOR);
#endif
        }
    };

    /* ---- the block ---- */

    static __device__ __forceinline__ int first_column() { return 0; }

    static __device__ __forceinline__ void meet_readers() { Reader::meet_all(); }

    /* By all readers, who have written a part of a unit: how many others have? */
    static __device__ __forceinline__ int count_arrival(uint32_t *arrived, char *memory) {
        const SharedAddress count = shared_address(memory) + FACTORS_AT;
        __threadfence();
        meet_readers();
        if (thread_in_block() == 0) shared_store(count, static_cast<int>(atomicAdd(arrived, 1u)));
        meet_readers();
        __threadfence();
        return shared_load<int>(count);
    }

    /* What needs no memory but the block's own. */
    static __device__ __forceinline__ void prepare(const Launch &launch, char *memory) {
        const SharedAddress shared = shared_address(memory);
        const bool mapped = launch.box != 0;
        if (launch.cluster > 1) cluster::appear();
        if (mapped && thread_in_block() == READER_THREADS)
            tensor_map::prefetch(launch.key), tensor_map::prefetch(launch.value);
        if (thread_in_block() == 0) {
            for (Ring r = {shared}; r.turn == 0; r.advance()) {
                mbarrier::make(r.full(), mapped ? 1 : COPIER_THREADS);
                mbarrier::make(r.empty(), READERS);
            }
            mbarrier::made();
        }
        barrier();
    }

    /* Whether copies are to set off before the rows of Q have been asked for. Not in a cluster whose blocks have more than
     * fills the ring, where it cost 2 to 4 %: it seems, as Q comes after all of that, and readers wait for it. */
    template <class Schedule> static __device__ __forceinline__ bool copies_precede_queries(const Schedule &schedule) {
        const bool fits = schedule.cluster == 1 || schedule.unit_steps <= schedule.cluster * STAGES;
        return schedule.plain && fits;
    }

    /* See Loop in decode_loop.h. */
    template <class Pieces, class Write>
    static __device__ __forceinline__ void run(const Launch &launch, char *memory, const Score &score,
                                               Pieces for_each_piece, const Write &write) {
        const SharedAddress shared = shared_address(memory);
        if (wave() >= READERS) {
            if (launch.box == 0 || wave() < READERS + MAP_COPIERS) {
                Copier copier(launch, shared);
                if (!PAGED && launch.box > 0 && copies_precede_queries(for_each_piece.schedule))
                    for_each_piece.keys_alone([&](int batch, int head, int first, int end) {
                        copier.copy_tokens(0, first, end, head, batch);
                    });
                else for_each_piece([&](const auto &unit, const auto &piece) { copier.copy_piece(unit, piece); });
                wait_for_copies();
            }
            if (launch.cluster > 1) cluster::wait();
        } else {
            Reader reader = {shared};
            for_each_piece([&](const auto &unit, const auto &piece) {
                int row_tiles = 1;
                while (row_tiles * ROWS < unit.rows) row_tiles *= 2;
                const int group = wave() / row_tiles, wave_row = wave() % row_tiles * ROWS;
                int groups = READERS / row_tiles; /* those that have tiles */
                while (groups > 1 && groups / 2 * KEYS >= piece.end_key - piece.first_key) groups /= 2;
                const auto &scored = unit.sequence.scaled(score);
                Softmax softmax(scored.unit);
                Output o;
                o.clear();
                if (piece.first_key < piece.end_key) {
                    if (piece.again) Reader::meet_all(); /* the last piece's use of shared memory is over */
                    reader.store_queries(unit, row_tiles * ROWS, scored.query_bits);
                    Reader::meet_all();
                    reader.attend(unit, piece.first_key, piece.end_key, wave_row, group, groups, scored, softmax, o);
                }
                if (row_tiles == 1) return write.row_tile(piece, group, groups, softmax, o);
                if (piece.first_key < piece.end_key)
                    add_up(memory + EXCHANGE_AT, group, groups, row_tiles, softmax, o, [] { Reader::meet_all(); });
                write(piece, group == 0, wave_row, row_tiles * ROWS, softmax, o);
            });
        }
    }
};

/* Before a launch that counts. */
__global__ void clear_arrived(uint32_t *arrived, int count) {
    let_next_start();
    wait_for_previous();
    for (int i = thread_in_block(); i < count; i += blockDim.x) arrived[i] = 0;
}

} // namespace aiter

#endif
