/* The loop over the tiles of keys, for every arch whose waves work alone.
 *
 *   publish     the tile that was on its way is the current one (block barrier)
 *   issue       the tile after it sets off: its copy runs during what follows
 *   scores      S = Q K^T          matrix unit
 *   mask        only where the diagonal or the end of the sequence cuts the tile
 *   update      P = exp2(S - max)  vector unit, while other waves use the matrix unit
 *   accumulate  O += P V           matrix unit
 *
 * A loop is a struct with the members of this one; an arch with a better way to go through the tiles brings its own,
 * and attention_forward.hip picks it. */
#ifndef AITER_GPU_TILE_LOOP_H
#define AITER_GPU_TILE_LOOP_H

#include "gpu/softmax.h"

namespace aiter {

template <int HEAD_DIM, class Sequence> struct TileLoop : Shape<HEAD_DIM> {
    using Tile = Shape<HEAD_DIM>;
    using Queries = Query<HEAD_DIM, Tile::ROW_TILES>;
    using KeysAndValues = KeyValueTile<HEAD_DIM, Tile::KEYS, Tile::WAVES * WAVE>;
    using Scores = Accumulator<Tile::ROW_TILES, Tile::KEYS>;
    using Output = Accumulator<Tile::ROW_TILES, HEAD_DIM>;
    using Softmax = OnlineSoftmax<Output::SLOTS>;
    static constexpr int THREADS = Tile::WAVES * WAVE;
    static constexpr int WAVE_ROWS = Tile::ROW_TILES * ROW_TILE;
    static constexpr int SHARED_BYTES = KeysAndValues::SHARED_BYTES + Tile::WAVES * Queries::SHARED_BYTES;

    using Launch = Arguments; /* the kernel's parameter: the call, and what a loop adds to it */

    static int64_t workspace_bytes(const aiter_attention_problem &) { return 0; }
    static int start(void (*kernel)(Launch), const aiter_attention_call &call, int64_t row_tiles, void *stream) {
        return launch(kernel, row_tiles, THREADS, SHARED_BYTES, stream, call);
    }

    /* Units one after the other; of one unit's tiles those that see most keys come first, so that short ones fill the
     * gaps at the end. */
    static __device__ __forceinline__ Place place(const Launch &launch, int index, int row_tiles) {
        const aiter_attention_problem &p = launch.problem;
        const int group = p.heads_q / p.heads_kv;
        const Work work = work_of_block(index, p.batch * p.heads_kv, group * row_tiles);
        return {work.unit, work.part % group, row_tiles - 1 - work.part / group};
    }

    /* This wave's, for its query rows and later for store_output. */
    static __device__ __forceinline__ SharedAddress query_memory(SharedAddress shared) {
        return shared + KeysAndValues::SHARED_BYTES + wave() * Queries::SHARED_BYTES;
    }
    template <class RowPointer>
    static __device__ __forceinline__ void store_output(const Output &o, SharedAddress shared, RowPointer row) {
        aiter::store_output<HEAD_DIM>(o, query_memory(shared), row);
    }

    /* Goes through the block's row tiles, here one. Leaves in `o` the sums of P V, and in `softmax` what they must be
     * divided by, and calls finish(tile, softmax, o) in every wave that has rows: a loop may use more threads than its
     * WAVES have. */
    template <class RowTile, class Finish>
    static __device__ __forceinline__ void run(const Launch &launch, SharedAddress shared, Finish finish) {
        const RowTile tile(launch, block());
        if (!tile.exists()) return;
        const Scale scale(launch.problem.softmax_scale);
        Softmax softmax(scale.positive);
        Output o;
        attend(tile.sequence, shared, tile.first_row, tile.keys_end, scale.negate, softmax, o);
        finish(tile, softmax, o);
    }

    static __device__ __forceinline__ void attend(const Sequence &sequence, SharedAddress shared, int first_row,
                                                  int keys_end, bool negate, Softmax &softmax, Output &o) {
        const int wave_row = first_row + wave() * WAVE_ROWS;
        const int wave_keys = sequence.visible(lesser(wave_row + WAVE_ROWS, sequence.rows) - 1);
        const int unmasked_keys = sequence.visible(wave_row);

        o.clear();
        if (keys_end == 0) return;
        KeysAndValues tile(shared, thread_in_block());
        tile.issue(sequence.keys, 0);
        Queries queries;
        queries.load(
            query_memory(shared),
            [&](int row) {
                row += wave_row;
                return row < sequence.rows ? sequence.query + row * sequence.query_stride : nullptr;
            },
            negate);

        for (int first = 0; first < keys_end; first += Tile::KEYS) {
            tile.publish(barrier);
            if (first + Tile::KEYS < keys_end) tile.issue(sequence.keys, first + Tile::KEYS);
            if (first >= wave_keys) continue; /* causal: the tile is the other waves' */
            Scores s;
            tile.scores(queries, s);
            if (first + Tile::KEYS > unmasked_keys) mask(s, sequence, wave_row, first);
            softmax.update(s, o);
            tile.accumulate(s, o);
        }
    }
};

} // namespace aiter

#endif
