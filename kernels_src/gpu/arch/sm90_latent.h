/* Latent attention (MLA) for few query tokens on sm_90a: one KV head of 576 columns, the first 512 of which are the
 * values too, for 64 rows at a time with wgmma. It takes the place of the loop of decode_loop.h, whose mma.sync
 * reads each tile from shared memory once for 16 rows.
 *
 *   a piece       64 rows (token, head), and keys in tiles of 64. One block to an SM, three warpgroups:
 *   warpgroup 2   copies (sm90_latent_copies.h): tile after tile, as far ahead as there is room, boxes of a tensor map;
 *                 16 bytes a lane (cp.async) where there is none: pages of no multiple of 8 tokens, windows, values
 *                 that are apart
 *   0 and 1       multiply (sm90_latent_products.h). 64 rows of output are 64 x 512 floats, most registers of two
 *                 warpgroups: each has half of the columns, 0 the left ones. Warpgroup 0 makes the scores S of even
 *                 tiles and warpgroup 1 of odd ones; the probabilities P go to the other through shared memory, and
 *                 both multiply them by their half of the values
 *
 * In one of two orders, each a form of the kernel, which a call takes by its rows (IN_TURN_ROWS in aiter/kernels.py):
 *
 *   in turn       up to 64 rows, which memory bounds: a tile is used as it comes (sm90_latent_in_turn.h). Each
 *                 warpgroup goes through all tiles in their order, half a round after the other:
 *
 *     warpgroup 0   S(0)  softmax  P(0) V(0) | P(1) V(1)  S(2)  softmax  P(2) V(2) | ...
 *                              \ P(0)            / P(1)              \ P(2)
 *     warpgroup 1               P(0) V(0)  S(1)  softmax  P(1) V(1) | P(2) V(2)  S(3)  softmax ...
 *
 *                 A tile's halves are given back one after the other, each when it has been multiplied
 *
 *   rounds        more rows, which the matrix unit bounds: two tiles at a time, A and B (sm90_latent_rounds.h). Each
 *                 warpgroup multiplies its own first, so that a half of each tile is free early:
 *
 *     matrix unit          warpgroup 0                        warpgroup 1                    given back
 *     S(A)                 S(A)                               waits for B                    B left, behind S(A)
 *     S(B)                 softmax of A, P(A) to the other    S(B)
 *     P(A) V(A), left      P(A) V(A)                          maxima of A, softmax of B      A left
 *     P(B) V(B), right     waits for P(B)                     P(B) to the other, P(B) V(B)   B right
 *     both second ones     P(B) V(B), S(A) of the next round  P(A) V(A)                      A right
 *
 *                 The last tile of an odd number is an A alone
 *
 *   maxima        go along with P, and only ever grow; whoever gets them moves on to them. That the output must be
 *                 rescaled for it is rare. In rounds warpgroup 1 takes those of A before the softmax of B, and scales
 *                 P(A), which it multiplies last, if B's have grown: a row has other bits than in turn
 *
 *   shared        Q   9 x 8 KB      blocks of 64 rows x 64 columns, as wgmma wants them (arch/sm90.h)
 *   memory        K   2 x 9 x 8 KB  two tiles. A tile's blocks arrive in five groups, each with a barrier: first the
 *                                   one that is no value, then two at a time. They are given back in three: that one
 *                                   as soon as its scores are made, then each warpgroup's half of the values
 *                 P   8 KB          one is enough: a warpgroup writes P when it has used the other's. In turn wgmma
 *                                   reads it there; in rounds each lane reads what the same lane of the other wrote
 *                                   229,376 bytes of 232,448; the rest are barriers, maxima and sums
 *   registers     O 128, S 32, P 16, or twice 16 in rounds when S is gone, of 216; a maximum and a sum for each of two
 *                 rows
 *
 *   cycles        of a tile: scores 36 x 32, products 4 x 2 x 128; 2176 with the matrix unit always busy. It cannot be:
 *                 a tile sets off into the room of the tile before last when that has been used, and takes 900 to 1200
 *                 cycles and what the memory's pace adds to arrive. In turn the first EARLY groups of scores are
 *                 therefore made before P of the tile before comes, the others after. Shared memory is busy for 2300 of
 *                 them: scores read 4 KB in 32 cycles, products 8 to 10 KB in 128, and 72 KB are written.
 *                 64 sequences of 4096 keys, 128 heads, are 128 pieces of 64 tiles on 132 SMs. The two pieces of a
 *                 sequence run side by side: memory is read once (302 MB), the L2 cache twice.
 *
 * Values in a memory of their own: they replace the tile's first eight blocks as soon as its scores are made.
 *
 * After the design of FlashMLA (github.com/deepseek-ai/FlashMLA): halves of the output, P exchanged, a tile given back
 * block by block, rounds of two tiles. What each gave, and what tensor maps and clusters did:
 * docs/hopper_decoding.md. */
#ifndef AITER_GPU_ARCH_SM90_LATENT_H
#define AITER_GPU_ARCH_SM90_LATENT_H

#include "gpu/arch/sm90_latent_copies.h"
#if AITER_ROUNDS
#include "gpu/arch/sm90_latent_rounds.h"
#else
#include "gpu/arch/sm90_latent_in_turn.h"
#endif

namespace aiter {

struct LatentLoop : LatentTiles {
    using Softmax = LatentWarpgroup::Softmax;
    static constexpr int OWN_REGISTERS = 216, COPY_REGISTERS = 504 - 2 * OWN_REGISTERS; /* of a thread */
    static_assert(2 * OWN_REGISTERS + COPY_REGISTERS <= 3 * 168, "3 x 128 begin with 168: or it hangs");

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

    /* A piece, by the warpgroups that multiply. */
    template <class Unit>
    static __device__ __forceinline__ void attend(LatentWarpgroup &warpgroup, const Unit &unit, const LatentKeys &keys,
                                                  const Score &score, Softmax &softmax, Output &o) {
        const typename Unit::template Wave<Output, LatentWarpgroup::WAVE_ROWS> rows(unit, warpgroup.wave_row,
                                                                                    keys.first + keys.count);
        warpgroup.load_queries(unit, score.query_bits);
        o.clear();
        const LatentOrder order{warpgroup};
        if (warpgroup.number == 0)
            warpgroup.attend_first_tile(rows, keys, score, softmax, o,
                                        [&](const LatentWarpgroup::Operand &p) { order.send(0, p, softmax); });
        order.attend(rows, keys, score, softmax, o);
        warpgroup.count += keys.tiles;
        warpgroup.add_up_sums(softmax);
    }

    static __device__ __forceinline__ int first_column() { return thread_in_block() / WARPGROUP * COLUMNS; }

    /* See Loop in decode_loop.h. */
    static constexpr int WRITERS = 2 * WARPGROUP, OWN_COLUMNS = COLUMNS;
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
            LatentCopier by_lanes(shared);
            LatentMappedCopier<Launch> by_map(launch, shared);
            if (launch.box == 0 || wave() % 4 < 3)
                for_each_piece([&](const auto &unit, const auto &piece) {
                    if (piece.first_key >= piece.end_key) return;
                    KeyValueRows<PAGED> rows = unit.sequence.keys;
                    rows.begin = unit.sees(0).low;
                    rows.count = piece.end_key;
                    if (launch.box == 0) by_lanes.copy_piece(rows, piece.first_key, piece.end_key, values);
                    else by_map.copy_piece(unit.sequence, rows, piece.first_key, piece.end_key);
                });
            wait_for_copies();
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS));
            LatentWarpgroup warpgroup(shared, launch.box > 0, values);
            for_each_piece([&](const auto &unit, const auto &piece) __attribute__((always_inline)) {
                Softmax softmax(score.unit);
                Output o;
                if (piece.first_key < piece.end_key)
                    attend(warpgroup, unit, LatentKeys(piece.first_key, piece.end_key), score, softmax, o);
                else o.clear();
                write(piece, true, warpgroup.wave_row, ROWS, softmax, o);
            });
        }
    }
};

} // namespace aiter

#endif
