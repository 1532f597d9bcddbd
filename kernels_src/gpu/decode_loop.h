/* Decoding: a block's way through the pieces of units that it has. Loop is that of an arch (arch/sm90_decode.h,
 * arch/sm90_latent.h) or, below, what any other does: teams of waves with tiles of their own, which they fetch through
 * KeyValueStream. See attention_decode.hip. */
#ifndef AITER_GPU_DECODE_LOOP_H
#define AITER_GPU_DECODE_LOOP_H

#include "gpu/decode_schedule.h"

namespace aiter {

using Output = Tile::Output;
using Softmax = OnlineSoftmax<Output::SLOTS, Tile::LANES>;
constexpr int SLOTS = Output::SLOTS, RUN = Tile::RUN;
static_assert(!DROPOUT, "dropout is for training: the forward kernel knows it");

/* What a block has of a unit: those of the keys first_key ... end_key - 1 that any row sees. */
struct Piece {
    Schedule::Place place;
    int range; /* its number */
    int rows;  /* of the unit */
    int first_key, end_key;
    bool begins, whole; /* is it the unit's beginning; all of it */
    bool again;         /* not the block's first */
};

#if defined(AITER_LATENT)
using Loop = LatentLoop;
#elif defined(AITER_RING)
using Loop = RingLoop<HEAD_DIM, VALUE_DIM>;
#else
using Memory = DecodeMemory<HEAD_DIM, VALUE_DIM>;
using Rows = KeyValueRows<PAGED>;
using Stream = Memory::Stream;
using Scores = Tile::Scores;

constexpr int TEAMS = Tile::TEAMS;

/* more: this wave has another tile after it. */
__device__ __forceinline__ void attend_tile(const Unit::Wave<Output, Tile::ROWS> &rows, Stream &stream,
                                            const Tile::Queries &queries, int first, bool more, const Score &score,
                                            Softmax &softmax, Output &o) {
    Scores s;
    stream.scores(queries, s, more);
    rows.finish(score, s, first);
    softmax.update(s, o);
    stream.accumulate(s, o, more);
}

/* The team's tiles among keys first_key ... end-1, for the rows from `wave_row` on. */
__device__ __forceinline__ void attend(const Unit &unit, SharedAddress shared, int first_key, int end, int wave_row,
                                       int group, int groups, const Score &score, Softmax &softmax, Output &o) {
    if (!Stream::COOPERATIVE && wave_row >= unit.rows) return;
    Rows rows = unit.sequence.keys;
    rows.begin = unit.sees(0).low;
    rows.count = end;
    const Unit::Wave<Output, Tile::ROWS> scored_rows(unit, wave_row, end);

    Stream stream(shared, rows, first_key, group, groups);
    Tile::Queries queries;
    queries.load(
        stream.query_memory(),
        [&](int row) { return wave_row + row < unit.rows ? unit.query(wave_row + row) : nullptr; }, score.query_bits);
    const int stride = groups * KEYS;
    int first = first_key + group * KEYS;
    if constexpr (Stream::COOPERATIVE) { /* all waves make the same number of rounds, as they meet in each */
        const int last_step = (end - first_key - 1) / STEP_KEYS;
        for (int tile = group; tile < (last_step + 1) * TEAMS; tile += groups, first += stride) {
            stream.advance();
            if (first < end && wave_row < unit.rows)
                attend_tile(scored_rows, stream, queries, first, true, score, softmax, o);
        }
    } else { /* the last tile has code of its own: a branch around loads would make others wait for them */
        for (; first + stride < end; first += stride)
            attend_tile(scored_rows, stream, queries, first, true, score, softmax, o);
        if (first < end) attend_tile(scored_rows, stream, queries, first, false, score, softmax, o);
    }
}

struct Loop {
    static constexpr int SHARED_BYTES = Memory::SHARED_BYTES, WRITERS = THREADS;
    static constexpr int OWN_COLUMNS = Tile::TEAM == 1 ? VALUE_DIM : Tile::COLUMNS; /* of a wave */

    /* The kernel's parameter: the call, and what a loop adds to it. */
    using Launch = Arguments;
    static Launch launch_of(const aiter_attention_call &call, int, uint32_t *) { return call; }

    /* Of the columns that a team's wave has. Not by wave(), which all lanes must ask together. */
    static __device__ __forceinline__ int first_column() {
        return Tile::TEAM == 1 ? 0 : thread_in_block() / WAVE % Tile::TEAM * Tile::COLUMNS;
    }

    /* Goes through the block's pieces: for_each_piece(visit) calls visit(unit, piece) for one after the other. Whoever
     * has rows of a result then calls write(piece, first row, softmax, o), in whole waves. */
    template <class Pieces, class Write>
    static __device__ __forceinline__ void run(const Launch &, char *shared, const Score &score, Pieces for_each_piece,
                                               Write write) {
        for_each_piece([&](const Unit &unit, const Piece &piece) {
            int row_tiles = 1; /* a power of two, as TEAMS is */
            while (row_tiles * Tile::ROWS < unit.rows) row_tiles *= 2;
            const int team = wave() / Tile::TEAM, groups = TEAMS / row_tiles, group = team / row_tiles;
            const int wave_row = team % row_tiles * Tile::ROWS;
            if (piece.again) barrier(); /* the last unit's use of shared memory is over */
            const auto &scored = unit.sequence.scaled(score);
            Softmax softmax(scored.unit);
            Output o;
            o.clear();
            if (piece.first_key < piece.end_key)
                attend(unit, shared_address(shared), piece.first_key, piece.end_key, wave_row, group, groups, scored,
                       softmax, o);
            add_up(shared, group, groups, row_tiles * Tile::TEAM, softmax, o, [] { barrier(); });
            write(piece, group == 0, wave_row, row_tiles * Tile::ROWS, softmax, o);
        });
    }
};
#endif
static_assert(Loop::SHARED_BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");

} // namespace aiter

#endif
