/* Latent attention (MLA) for few query tokens on sm_90a: one KV head of 576 columns, the first 512 of which are the
 * values too, for 64 rows at a time with wgmma. It takes the place of the loop of attention_decode.hip, whose mma.sync
 * reads each tile from shared memory once for 16 rows.
 *
 *   a piece       64 rows (token, head), and keys in tiles of 64. One block to an SM, three warpgroups:
 *   warpgroup 2   copies: tile after tile, as far ahead as there is room, boxes of a tensor map; 16 bytes a lane
 *                 (cp.async) where there is none: pages of no multiple of 8 tokens, windows, values that are apart
 *   0 and 1       multiply. 64 rows of output are 64 x 512 floats, most registers of two warpgroups: each has half of
 *                 the columns. Warpgroup 0 makes the scores of even tiles and warpgroup 1 of odd ones; the probabilities
 *                 P go to the other through shared memory, and both multiply them by their half of the values:
 *
 *     warpgroup 0   Q K(0)^T  softmax  P(0) V(0)  | P(1) V(1)  Q K(2)^T  softmax  P(2) V(2)  | ...
 *                                  \ P(0)              / P(1)                  \ P(2)
 *     warpgroup 1                   P(0) V(0)  Q K(1)^T  softmax  P(1) V(1)  | P(2) V(2)  Q K(3)^T  ...
 *
 *                 Each goes through all tiles in their order. So the maxima, which go along with P, only ever grow, and
 *                 whoever gets them moves on to them; that the output must be rescaled for it is rare.
 *
 *   shared        Q   9 x 8 KB      blocks of 64 rows x 64 columns, as wgmma wants them (arch/sm90.h)
 *   memory        K   2 x 9 x 8 KB  two tiles. A tile's blocks arrive in five groups, each with a barrier: first the
 *                                   one that is no value, then two at a time. They are given back in three: that one
 *                                   as soon as its scores are made, then each warpgroup's half of the values
 *                 P   8 KB          one is enough: a warpgroup writes P when it has used the other's
 *                                   229,376 bytes of 232,448; the rest are barriers, maxima and sums
 *   registers     O 128, S 32, P 16, of 216; a maximum and a sum for each of two rows
 *
 *   cycles        of a tile: scores 36 x 32, products 4 x 2 x 128; 2176 with the matrix unit always busy. It cannot be:
 *                 a tile sets off into the room of the tile before last when that has been used, and takes 900 to 1200
 *                 cycles and what the memory's pace adds to arrive. So the first EARLY groups of scores are made before
 *                 P of the tile before comes, the others after. Shared memory is busy for 2300 of them: scores read
 *                 4 KB in 32 cycles, products 8 to 10 KB in 128, and 72 KB are written.
 *                 64 sequences of 4096 keys, 128 heads, are 128 pieces of 64 tiles on 132 SMs. The two pieces of a
 *                 sequence run side by side: memory is read once (302 MB), the L2 cache twice.
 *
 * Values in a memory of their own: they replace the tile's first eight blocks as soon as its scores are made.
 *
 * After the design of FlashMLA (github.com/deepseek-ai/FlashMLA): halves of the output, P exchanged, a tile given back
 * block by block. There both warpgroups begin with the scores of two tiles; here they are half a round apart. What that
 * order gave, tensor maps, and clusters that share their copies: docs/hopper.md. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_H
#define AITER_GPU_ARCH_SM90_LATENT_H

#include "gpu/arch/sm80_decode.h"
#include "gpu/arch/sm90_tensor_map.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

namespace aiter {

/* What the schedule is made for: all waves of a block work on the same rows. */
struct LatentDecode {
    static constexpr int ROWS = 64, PART_ROWS = ROWS, KEYS = 64, STEP_KEYS = KEYS, WAVES = 12, BLOCKS = 1;
    static constexpr int ALIGNMENT = 1, MOST_CLUSTER = 1;
    /* What cutting costs in the time of a step, 2.2 us: a kernel that adds up; for a block, one more piece. */
    static constexpr int MERGE_STEPS = 4, PIECE_STEPS = 6;
    static constexpr int LANES = LANES_PER_ROW, RUN = 2;
    static constexpr int COLUMNS = VALUE_DIM / 2; /* of a warpgroup */
    using Scores = Accumulator<1, KEYS>;
    using Output = DecodeOutput<COLUMNS>;
    static __device__ __forceinline__ bool leads_row() { return lane_leads_row(); }
};

struct LatentLoop : LatentDecode {
    using Softmax = OnlineSoftmax<2>;
    static constexpr int WARPGROUP = 128, WAVE_ROWS = 16;
    static constexpr int OWN_REGISTERS = 216, COPY_REGISTERS = 72; /* of a thread; 3 x 128 begin with 168 */
    static_assert(2 * OWN_REGISTERS + COPY_REGISTERS <= 3 * 168, "or it hangs");

    static constexpr int LINES = HEAD_DIM / 64, VALUE_LINES = VALUE_DIM / 64; /* blocks of a tile */
    static constexpr int LINE_BYTES = KEYS * 128, TILE_BYTES = LINES * LINE_BYTES, STAGES = 2;
    static_assert(HEAD_DIM == 576 && VALUE_DIM == 512 && ROWS == KEYS, "");

    /* Group 0 is the last block, group g > 0 blocks 2 g - 2 and 2 g - 1. */
    static constexpr int GROUPS = 5, EARLY = 2;
    static __device__ constexpr int first_line(int group) { return group == 0 ? VALUE_LINES : 2 * group - 2; }
    static __device__ constexpr int end_line(int group) { return group == 0 ? LINES : 2 * group; }

    static constexpr int TILES_AT = TILE_BYTES, P_AT = TILES_AT + STAGES * TILE_BYTES;
    static constexpr int BARRIERS_AT = P_AT + LINE_BYTES, STAGE_BARRIERS = GROUPS + 4;
    static constexpr int MAXIMA_AT = BARRIERS_AT + round_up(STAGES * STAGE_BARRIERS * mbarrier::BYTES, 16);
    static constexpr int SUMS_AT = MAXIMA_AT + ROWS * 4, SHARED_BYTES = SUMS_AT + 2 * ROWS * 4;

    /* Room for a tile: that of the block's tile number `count`. */
    struct Stage {
        SharedAddress shared;
        uint32_t index, turn; /* turn: how often it has been used before, modulo 2 */
        __device__ __forceinline__ Stage(SharedAddress shared, uint32_t count)
            : shared(shared), index(count % STAGES), turn(count / STAGES % 2) {}
        __device__ __forceinline__ SharedAddress tile() const { return shared + TILES_AT + index * TILE_BYTES; }
        __device__ __forceinline__ SharedAddress barrier(int i) const {
            return shared + BARRIERS_AT + (index * STAGE_BARRIERS + i) * mbarrier::BYTES;
        }
        /* A group has arrived; the values have, where they come later; scores are made; a half's products are. */
        __device__ __forceinline__ SharedAddress full(int group) const { return barrier(group); }
        __device__ __forceinline__ SharedAddress values() const { return barrier(GROUPS); }
        __device__ __forceinline__ SharedAddress scored() const { return barrier(GROUPS + 1); }
        __device__ __forceinline__ SharedAddress used(int half) const { return barrier(GROUPS + 2 + half); }
        __device__ __forceinline__ void make_barriers(bool mapped) const {
            for (int group = 0; group < GROUPS; ++group) mbarrier::make(full(group), mapped ? 1 : WARPGROUP);
            mbarrier::make(values(), WARPGROUP);
            for (int i = GROUPS + 1; i < STAGE_BARRIERS; ++i) mbarrier::make(barrier(i), 4); /* by waves */
        }
    };

    /* Are values not the first columns of the keys? Of the whole call: the barrier of values counts all tiles of a block,
     * or none. */
    static __host__ __device__ __forceinline__ bool apart(const Arguments &arguments) {
        const aiter_attention_problem &p = arguments.problem;
        const bool one_batch = !PAGED && p.batch == 1, one_head = p.heads_kv == 1;
        return arguments.tensors.key != arguments.tensors.value || p.key_strides[1] != p.value_strides[1] ||
               !one_batch && p.key_strides[0] != p.value_strides[0] ||
               !one_head && p.key_strides[2] != p.value_strides[2];
    }

    /* The kernel's parameter. */
    struct Launch : Arguments {
        CUtensorMap cache;
        int box; /* keys that a copy by the map brings; 0: there is none */
    };
    /* No map where values are apart, and where tiles begin with a window, which may be anywhere in a page. */
    static Launch launch_of(const aiter_attention_call &call, int, uint32_t *) {
        Launch launch;
        static_cast<Arguments &>(launch) = call;
        const aiter_attention_problem &p = call.problem;
        launch.box = WINDOW || apart(launch) ? 0 : PAGED ? tensor_map::box_of(p.page_size, KEYS) : KEYS;
        if (!tensor_map::make_of_cache(launch.cache, tensor_map::Reuse::ONCE, call, call.tensors.key, p.key_strides,
                                       HEAD_DIM, launch.box))
            launch.box = 0;
        return launch;
    }

    /* ---- copies ---- */

    /* By maps: waves 0 and 1 copy a half of the values each, wave 2 the block that is none, as room for each comes free
     * at another time; a lane for each box. */
    struct MappedCopier {
        const Launch &launch;
        SharedAddress shared;
        uint32_t count = 0; /* tiles that have set off */
        int half = wave() % 4;
        int line, index; /* of this lane's box: its block, and which part of the block's rows */

        __device__ __forceinline__ MappedCopier(const Launch &launch, SharedAddress shared)
            : launch(launch), shared(shared) {
            const int boxes = KEYS / launch.box, own = lane() / boxes, lines = half < 2 ? VALUE_LINES / 2 : 1;
            index = lane() - own * boxes;
            line = own < lines ? lesser(half, 2) * (VALUE_LINES / 2) + own : LINES;
        }
        __device__ __forceinline__ void copy_tile(int token, int head, int batch) {
            const Stage stage(shared, count++);
            mbarrier::wait(half < 2 ? stage.used(half) : stage.scored(), stage.turn ^ 1); /* at once in turn 0 */
            if (lane() < (half < 2 ? 2 : 1))
                mbarrier::arrive_and_expect(stage.full(half < 2 ? 1 + half * 2 + lane() : 0),
                                            (half < 2 ? 2 : 1) * LINE_BYTES);
            wave_sync();
            if (line < LINES)
                tensor_map::copy<tensor_map::Reuse::ONCE>(stage.tile() + line * LINE_BYTES + index * (launch.box * 128),
                                                          launch.cache, line * 64, token, head, batch,
                                                          stage.full(line == VALUE_LINES ? 0 : 1 + line / 2));
            wave_sync();
        }
        __device__ __forceinline__ void copy_piece(const Sequence &sequence, const KeyValueRows<false> &, int first,
                                                   int end) {
#pragma unroll 1
            for (; first < end; first += KEYS)
                copy_tile(sequence.first_key + first, sequence.kv_head, sequence.kv_batch);
        }
        __device__ __forceinline__ void copy_piece(const Sequence &sequence, const KeyValueRows<true> &rows, int first,
                                                   int end) {
            using tensor_map::PageBox;
            const auto look_up = [&](int key) { return PageBox::look_up(rows, key + index * launch.box, launch.box); };
            PageBox here = look_up(first);
#pragma unroll 1
            for (; first < end; first += KEYS) {
                const PageBox next = look_up(first + KEYS);
                copy_tile(here.token(), sequence.kv_head, here.page(rows));
                here = next;
            }
        }
    };

    /* Of a tile each thread has one chunk of 16 bytes in each block, of rows row, row + 16, ... Rows that the piece
     * does not have are zeros. Where a tile's rows are is looked up while the copies of the one before wait for room. */
    struct Copier {
        using Rows = KeyValueRows<PAGED>;
        static constexpr int PASS_ROWS = WARPGROUP / 8, PASSES = KEYS / PASS_ROWS;
        SharedAddress shared;
        uint32_t count = 0; /* tiles of which the keys have set off */
        int row = thread_in_block() % WARPGROUP / 8, chunk = thread_in_block() % 8;
        const char *from[PASSES]; /* this thread's chunks of the first block */

        __device__ __forceinline__ explicit Copier(SharedAddress shared) : shared(shared) {}

        /* Of the tile of keys or values that begins at `first`. */
        template <bool VALUES>
        __device__ __forceinline__ void look_up(const Rows &rows, int first, const char *(&chunks)[PASSES]) const {
            const auto tile = rows.tile(first);
            typename Rows::Tile::Place places[PASSES];
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) places[pass] = tile.place(row, pass * PASS_ROWS);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass)
                chunks[pass] = VALUES ? tile.value(places[pass], chunk * 16) : tile.key(places[pass], chunk * 16);
        }

        __device__ __forceinline__ void copy(const Rows &rows, int first, const Stage &stage, int line, int end) const {
            const SharedAddress to = stage.tile() + RowLayout<64>::chunk(row, chunk);
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) {
                const bool exists = rows.exists(first + row + pass * PASS_ROWS);
#pragma unroll
                for (int l = line; l < end; ++l)
                    copy_async(to + l * LINE_BYTES + pass * PASS_ROWS * 128, from[pass] + l * 128, exists);
            }
        }

        /* Those from `first` on, which `from` is for; then it is for `next`. */
        __device__ __forceinline__ void copy_keys(const Rows &rows, int first, int next) {
            const Stage stage(shared, count++);
            const char *coming[PASSES];
#pragma unroll
            for (int group = 0; group < GROUPS; ++group) {
                /* At once in turn 0. */
                if (group == 0) mbarrier::wait(stage.scored(), stage.turn ^ 1);
                if (group == 1) mbarrier::wait(stage.used(0), stage.turn ^ 1);
                if (group == 3) mbarrier::wait(stage.used(1), stage.turn ^ 1);
                copy(rows, first, stage, first_line(group), end_line(group));
                mbarrier::arrive_after_copies(stage.full(group));
                if (group == 0) look_up<false>(rows, next, coming);
            }
#pragma unroll
            for (int pass = 0; pass < PASSES; ++pass) from[pass] = coming[pass];
        }
        __device__ __forceinline__ void copy_values(const Rows &rows, int first, uint32_t number) {
            const Stage stage(shared, number);
            look_up<true>(rows, first, from);
            mbarrier::wait(stage.scored(), stage.turn);
            copy(rows, first, stage, 0, VALUE_LINES);
            mbarrier::arrive_after_copies(stage.values());
        }

        __device__ __forceinline__ void copy_piece(const Rows &rows, int first, int end, bool values) {
            look_up<false>(rows, first, from);
#pragma unroll 1
            for (int key = first; key < end; key += KEYS) {
                const int next = key + KEYS < end ? key + KEYS : key;
                copy_keys(rows, key, next);
                if (!values) continue;
                if (key > first) copy_values(rows, key - KEYS, count - 2);
                if (next == key) copy_values(rows, key, count - 1);
                look_up<false>(rows, next, from);
            }
        }
    };

    /* ---- products ---- */

    struct Warpgroup {
        SharedAddress shared;
        bool mapped;
        int number = wave() / 4;
        int wave_row = wave() % 4 * WAVE_ROWS;
        uint32_t count = 0; /* tiles of earlier pieces */

        __device__ __forceinline__ Warpgroup(SharedAddress shared, bool mapped) : shared(shared), mapped(mapped) {}
        /* Not by maps: what other threads have copied becomes visible to wgmma. */
        __device__ __forceinline__ void see_copies() const {
            if (!mapped) wgmma::shared_is_written();
        }
        /* By maps: rows past the end of a piece's last tile become zeros: what the tensor holds there meets
         * probabilities of 0. */
        __device__ __forceinline__ void clear_past_end(const Stage &stage, int rows) const {
            if (!mapped || rows >= KEYS) return;
            clear_rows_from<KEYS, VALUE_LINES>(stage.tile(), rows);
            wgmma::shared_is_written();
            meet(CLEARED + number, WARPGROUP);
        }

        /* Named barriers: both warpgroups meet; P of one of them is there. */
        static constexpr int BOTH = 1, P_OF = 2, CLEARED = 4;
        static __device__ __forceinline__ void meet_both() { meet(BOTH, 2 * WARPGROUP); }

        template <class Unit> __device__ __forceinline__ void load_queries(const Unit &unit, const QueryBits &bits) {
            constexpr int LANES_OF_ROW = 2 * WARPGROUP / ROWS, CHUNKS = HEAD_DIM / 8 / LANES_OF_ROW;
            const int row = thread_in_block() / LANES_OF_ROW, lane_chunk = thread_in_block() % LANES_OF_ROW;
            const uint4 *from = row < unit.rows ? reinterpret_cast<const uint4 *>(unit.query(row)) : nullptr;
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) {
                const int chunk = i * LANES_OF_ROW + lane_chunk;
                uint4 x = {0, 0, 0, 0};
                if (from != nullptr) x = from[chunk];
                shared_store(shared + chunk / 8 * LINE_BYTES + RowLayout<64>::chunk(row, chunk % 8),
                             uint4{bits(x.x), bits(x.y), bits(x.z), bits(x.w)});
            }
            wgmma::shared_is_written();
            meet_both();
        }

        /* A group of a tile's blocks, as soon as it has arrived. */
        __device__ __forceinline__ void begin_scores(const Stage &stage, int group, Scores &s) const {
            mbarrier::wait(stage.full(group), stage.turn);
            see_copies();
            const wgmma::Matrix q = wgmma::matrix(opaque(shared)), k = wgmma::matrix(opaque(stage.tile()));
            wgmma::begin();
#pragma unroll
            for (int line = first_line(group); line < end_line(group); ++line)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    wgmma::Product<KEYS>::multiply(s.tile[0], q + (line * LINE_BYTES + j * 32) / 16,
                                                   k + (line * LINE_BYTES + j * 32) / 16, group > 0 || j > 0);
            wgmma::end();
        }

        /* This warpgroup's half of the values. */
        __device__ __forceinline__ wgmma::Matrix values(const Stage &stage, bool apart) const {
            if (apart) {
                mbarrier::wait(stage.values(), stage.turn);
                wgmma::shared_is_written();
            }
            return wgmma::matrix(stage.tile() + number * (VALUE_LINES / 2) * LINE_BYTES, LINE_BYTES);
        }

        /* P and the maxima that it was made with go to the other warpgroup. */
        __device__ __forceinline__ void send(const uint32_t (&p)[KEYS / 16][4], const Softmax &softmax) const {
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                const int row = wave_row + Scores::row(slot);
#pragma unroll
                for (int chunk = 0; chunk < KEYS / 8; ++chunk)
                    shared_store(shared + P_AT + RowLayout<64>::chunk(row, chunk) + lane() % 4 * 4,
                                 p[chunk / 2][chunk % 2 * 2 + slot]);
                if (lane_leads_row()) shared_store(shared + MAXIMA_AT + row * 4, softmax.maximum[slot]);
            }
            wgmma::shared_is_written();
            pass(P_OF + number, 2 * WARPGROUP);
        }
        /* The output's product with what the other has sent. */
        __device__ __forceinline__ void begin_received(const Stage &stage, bool apart, Softmax &softmax,
                                                       Output &o) const {
            meet(P_OF + (number ^ 1), 2 * WARPGROUP);
            float maxima[2], shrink[2];
#pragma unroll
            for (int slot = 0; slot < 2; ++slot)
                maxima[slot] = shared_load<float>(shared + MAXIMA_AT + (wave_row + Scores::row(slot)) * 4);
            if (softmax.move_to(maxima, shrink)) softmax.rescale(o, shrink);
            see_copies(); /* the tile: the other has waited for it */
            const wgmma::Matrix p = wgmma::matrix(opaque(shared) + P_AT), v = values(stage, apart);
            wgmma::begin();
#pragma unroll
            for (int j = 0; j < KEYS / 16; ++j)
                wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p + j * 32 / 16, v + j * 16 * 128 / 16);
            wgmma::end();
        }

        static __device__ __forceinline__ void arrive(SharedAddress barrier) {
            if (lane() == 0) mbarrier::arrive(barrier);
        }

        template <class Unit>
        __device__ __forceinline__ void attend(const Unit &unit, int first_key, int end, bool apart, const Score &score,
                                               Softmax &softmax, Output &o) {
            const typename Unit::template Wave<Output, WAVE_ROWS> rows(unit, wave_row, end);
            /* From one lane: or the assembler takes branches on it for divergent, and waits for products in them. */
            const int tiles = from_lane((end - first_key + KEYS - 1) / KEYS, 0);
            load_queries(unit, score.query_bits);
            o.clear();

            Scores s;
            uint32_t p[KEYS / 16][4];
            float shrink[2];
            const auto step = [&](int tile, auto first) __attribute__((always_inline)) {
                constexpr bool FIRST = decltype(first)::value;
                const Stage own(shared, count + tile), before(shared, count + tile - 1);
#pragma unroll
                for (int group = 0; group < EARLY; ++group) begin_scores(own, group, s);
                if constexpr (!FIRST) begin_received(before, apart, softmax, o);
                begin_scores(own, EARLY, s);
                if constexpr (!FIRST) {
                    wgmma::wait<1>();
                    arrive(before.used(number));
                }
#pragma unroll
                for (int group = EARLY + 1; group < GROUPS; ++group) begin_scores(own, group, s);
                wgmma::wait<0>();
                arrive(own.scored());
                changed(s);
                if constexpr (!FIRST) changed(o);
                clear_past_end(own, from_lane(end, 0) - first_key - tile * KEYS);

                rows.finish(score, s, first_key + tile * KEYS);
                const bool grown = softmax.advance(s, shrink);
#pragma unroll
                for (int j = 0; j < KEYS / 16; ++j) round_operand(s, 0, j, p[j]);
                send(p, softmax);
                if (grown) softmax.rescale(o, shrink);
                const wgmma::Matrix v = values(own, apart);
                wgmma::begin();
#pragma unroll
                for (int j = 0; j < KEYS / 16; ++j)
                    wgmma::Product<COLUMNS>::multiply_transposed(o.tile[0], p[j], v + j * 16 * 128 / 16);
                wgmma::end();
                wgmma::wait<0>();
                arrive(own.used(number));
                changed(o);
            };
            int tile = number;
            if (tile == 0) {
                step(0, True<true>());
                tile = 2;
            }
#pragma unroll 1
            for (; tile < tiles; tile += 2) step(tile, True<false>());
            if (tile == tiles) { /* the last one is the other's */
                const Stage last(shared, count + tiles - 1);
                begin_received(last, apart, softmax, o);
                wgmma::wait<0>();
                arrive(last.used(number));
                changed(o);
            }
            count += tiles;

            /* Each has summed up its own tiles. Nobody needs Q and P any more. */
            const SharedAddress sums = shared + SUMS_AT;
            float sum[2];
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                sum[slot] = row_sum(softmax.sum[slot]);
                if (lane_leads_row())
                    shared_store(sums + (number * ROWS + wave_row + Scores::row(slot)) * 4, sum[slot]);
            }
            meet_both();
#pragma unroll
            for (int slot = 0; slot < 2; ++slot) {
                const float other = shared_load<float>(sums + ((number ^ 1) * ROWS + wave_row + Scores::row(slot)) * 4);
                softmax.sum[slot] = lane_leads_row() ? sum[slot] + other : 0.0f; /* of this lane */
            }
        }
        template <bool VALUE> struct True {
            static constexpr bool value = VALUE;
        };
    };

    /* ---- the block ---- */

    static __device__ __forceinline__ int first_column() { return thread_in_block() / WARPGROUP * COLUMNS; }

    /* See Loop in attention_decode.hip. */
    static constexpr int WRITERS = 2 * WARPGROUP;
    template <class Pieces, class Write>
    static __device__ __forceinline__ void run(const Launch &launch, char *memory, const Score &score,
                                               Pieces for_each_piece, Write write) {
        const SharedAddress shared = shared_address(memory);
        const bool values = apart(launch); /* have copies of their own */
        if (thread_in_block() == 0) {
            for (uint32_t stage = 0; stage < STAGES; ++stage) Stage(shared, stage).make_barriers(launch.box > 0);
            mbarrier::made();
        }
        barrier();
        if (wave() / 4 == 2) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
            const auto for_each = [&](const auto &copy_piece) {
                for_each_piece([&](const auto &unit, const auto &piece) {
                    KeyValueRows<PAGED> rows = unit.sequence.keys;
                    rows.begin = unit.sees(0).low;
                    rows.count = piece.end_key;
                    if (piece.first_key < piece.end_key)
                        copy_piece(unit.sequence, rows, piece.first_key, piece.end_key);
                });
            };
            if (launch.box == 0) {
                Copier copier(shared);
                for_each([&](const Sequence &, const auto &rows, int first, int end) {
                    copier.copy_piece(rows, first, end, values);
                });
            } else if (wave() % 4 < 3) {
                MappedCopier copier(launch, shared);
                for_each([&](const Sequence &sequence, const auto &rows, int first, int end) {
                    copier.copy_piece(sequence, rows, first, end);
                });
            }
            wait_for_copies();
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS));
            Warpgroup warpgroup(shared, launch.box > 0);
            for_each_piece([&](const auto &unit, const auto &piece) {
                Softmax softmax(score.unit);
                Output o;
                if (piece.first_key < piece.end_key)
                    warpgroup.attend(unit, piece.first_key, piece.end_key, values, score, softmax, o);
                else o.clear();
                write(piece, true, warpgroup.wave_row, ROWS, softmax, o);
            });
        }
    }
};

} // namespace aiter

#endif
