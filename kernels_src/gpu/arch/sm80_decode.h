/* Few query rows on NVIDIA: keys and values stream through a ring of stages in shared memory, filled by cp.async.
 * Implements the interface described in attention_decode.hip; matrices and tiles are those of arch/sm80.h.
 *
 *   a stage     a tile of KEYS tokens for each team, which is a wave, or two that fetch it together (see below)
 *   the ring    stage i is in use, stages i + 1 ... i + STAGES - 1 are on their way: about 64 KB of a block, 128 KB of
 *               an SM. 132 SMs with 1 us of latency at 3 TB/s ask for 23 KB each. Where a block cannot have that much
 *               shared memory (sm_86, sm_89 and sm_120 have 99 KB) there are fewer stages.
 *
 * Keys and values of 8 bits fill the ring as they are. When a stage has arrived, each lane takes what it has copied to its
 * team's tile of 16 bits, of which there is one:
 *
 *   the ring    8 bits: stage i + 1 ... on their way   -- stage i -->   a tile for each team, 16 bits: in use
 *
 * With up to 16 query rows (one row tile) a wave uses the tile that it has fetched, and no wave ever waits for another.
 * With more, waves of different row tiles use the same tiles, and the block meets once a stage; so it does where V has
 * more than 256 columns, whose output would not fit into a lane's registers: two waves compute the same scores, and
 * each half of the output. */
#ifndef AITER_GPU_ARCH_SM80_DECODE_H
#define AITER_GPU_ARCH_SM80_DECODE_H

#include "gpu/arch.h"
#include "gpu/sequence.h"

namespace aiter {

template <int COLUMNS> struct DecodeOutput : Accumulator<1, COLUMNS> {
    static __device__ __forceinline__ int column_of_lane(int i) {
        return DecodeOutput::column(i) + DecodeOutput::lane_column();
    }
};

/* A block's tiles: how many waves, tokens and stages. */
struct DecodeShape {
    int waves, keys, stages;
};
/* Do queries keep a place of their own in shared memory? Else they are in registers, and pass through a tile's. */
constexpr bool queries_stay(int head_dim, int value_dim) { return head_dim > 128 || team_of(value_dim) > 1; }
/* Chunks of 8 elements that each of `lanes` lanes copies of a tile's rows. */
constexpr int chunks_of_lane(int columns, int keys, int lanes) {
    return round_up(keys * (round_up(columns, 16) / 8), lanes) / lanes;
}
constexpr int raw_tile_bytes(int head_dim, int value_dim, int keys) {
    const int lanes = team_of(value_dim) * WAVE;
    return (chunks_of_lane(head_dim, keys, lanes) + chunks_of_lane(value_dim, keys, lanes)) * lanes * 8;
}
constexpr DecodeShape decode_shape(int head_dim, int value_dim) {
    const int wider = greater(head_dim, value_dim), team = team_of(value_dim);
    const int keys = wider <= 64 ? 32 : 16;
    const int token = round_up(head_dim, 64) * 2 + round_up(value_dim, 64) * 2;
    for (int waves = wider <= 128 ? 4 : 2;; waves /= 2) {
        const int queries = queries_stay(head_dim, value_dim) ? waves / team * 16 * round_up(head_dim, 64) * 2 : 0;
        const int stage = waves / team * keys * token, most = SHARED_LIMIT - queries;
        /* Two blocks of 96 KB and their queries fit into the 228 KB of an H100's SM. */
        const int room = lesser(most, 96 * 1024);
        const int stages =
            FP8 ? lesser((room - stage) / (waves / team * raw_tile_bytes(head_dim, value_dim, keys)), 4) : room / stage;
        if (stages >= 2 || waves == team) return {waves, keys, stages};
    }
}

template <int HEAD_DIM, int VALUE_DIM> struct Decode {
    static constexpr DecodeShape CHOSEN = decode_shape(HEAD_DIM, VALUE_DIM);
    static constexpr int ROWS = ROW_TILE;
    static constexpr int LANES = LANES_PER_ROW, RUN = 2;
    static constexpr int KEYS = CHOSEN.keys, WAVES = CHOSEN.waves, STAGES = CHOSEN.stages;
    static constexpr int BLOCKS = greater(HEAD_DIM, VALUE_DIM) <= 256 ? 2 : 1;
    static constexpr int TEAM = team_of(VALUE_DIM), COLUMNS = columns_of_wave(VALUE_DIM, TEAM);
    using Scores = Accumulator<1, KEYS>;
    using Output = DecodeOutput<COLUMNS>;
    using Queries = Query<HEAD_DIM, 1, TEAM>;
    static __device__ __forceinline__ bool leads_row() { return lane_leads_row(); }
};

template <int HEAD_DIM, int VALUE_DIM, class Rows> struct KeyValueStream {
    using Shape = Decode<HEAD_DIM, VALUE_DIM>;
    using Tile = KeyValueTile<HEAD_DIM, VALUE_DIM, Shape::KEYS, WAVE>;
    using Queries = typename Shape::Queries;
    static constexpr bool COOPERATIVE = true;
    static constexpr int TEAM = Shape::TEAM, TEAMS = Shape::WAVES / TEAM, KEYS = Shape::KEYS, STAGES = Shape::STAGES;
    static constexpr int LANES = TEAM * WAVE;
    static constexpr int TILE_BYTES = Tile::STAGE_BYTES; /* K, then V */
    /* Of 8 bits: of a team's tile as it arrives, and where the ring begins, behind the tiles that are in use. */
    static constexpr int RAW_BYTES = raw_tile_bytes(HEAD_DIM, VALUE_DIM, KEYS);
    static constexpr int RING_AT = FP8 ? TEAMS * TILE_BYTES : 0;
    static constexpr int STAGE_BYTES = TEAMS * (FP8 ? RAW_BYTES : TILE_BYTES);
    static constexpr bool QUERIES_STAY = queries_stay(HEAD_DIM, VALUE_DIM);
    static constexpr int QUERY_BYTES = QUERIES_STAY ? TEAMS * Queries::SHARED_BYTES : 0;
    static constexpr int SHARED_BYTES = RING_AT + STAGES * STAGE_BYTES + QUERY_BYTES;
    static_assert(STAGES >= 2 && KEYS <= WAVE, "a stage in use and one on its way; a lane looks up each token");
    static_assert(QUERIES_STAY || Queries::IN_REGISTERS && Queries::SHARED_BYTES <= TILE_BYTES, "pass through a tile");

    const Rows &rows;
    SharedAddress shared;
    int group, groups;
    int coming;                       /* first token of the tile that this team fetches next */
    typename Rows::Tile::Place place; /* of token `coming + lane`, looked up a stage ahead */
    int stage = STAGES - 1;           /* the one in use: none yet */
    int sub = 0;                      /* tile of the stage that comes next for this wave's rows */
    Tile tile;

    static __device__ __forceinline__ int team() { return wave() / TEAM; }

    __device__ __forceinline__ KeyValueStream(SharedAddress shared, const Rows &rows, int first, int group, int groups)
        : rows(rows), shared(shared), group(group), groups(groups), coming(first + team() * KEYS), tile(shared, 0) {
        look_up();
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) issue(i);
    }

    /* Where a team may put its queries: in the stage that is fetched last, in the place of its own tile. */
    __device__ __forceinline__ SharedAddress query_memory() const {
        return QUERIES_STAY ? shared + RING_AT + STAGES * STAGE_BYTES + team() * Queries::SHARED_BYTES
                            : shared + (FP8 ? 0 : (STAGES - 1) * STAGE_BYTES) + wave() * TILE_BYTES;
    }

    __device__ __forceinline__ void look_up() {
        if (coming < rows.count) place = rows.tile(coming).place(lane() % KEYS, 0);
    }

    static __device__ __forceinline__ int lane_of_team() { return TEAM == 1 ? lane() : thread_in_block() % LANES; }

    /* Chunks of 8 elements of the coming tile's rows, of as many columns. Of a row, the last may lie past its end, and is
     * zeros. Number i of this lane, which lies at `offset` in a tile. */
    template <int COLUMNS, class Copy> __device__ __forceinline__ void for_chunks(Copy copy) {
        constexpr int CHUNKS = round_up(COLUMNS, 16) / 8, UNITS = KEYS * CHUNKS;
        const auto source = rows.tile(coming);
#pragma unroll
        for (int i = 0; i < round_up(UNITS, LANES) / LANES; ++i) {
            const int unit = lane_of_team() + i * LANES;
            const int token = unit / CHUNKS, chunk = unit % CHUNKS;
            const auto at = source.place_of_lane(place, token, 0);
            if (UNITS % LANES != 0 && unit >= UNITS) break;
            const bool valid = rows.exists(coming + token) && chunk < COLUMNS / 8;
            copy(source, at, i, RowLayout<COLUMNS>::chunk(token, chunk), chunk * 8 * CACHED_BYTES, valid);
        }
    }

#if AITER_FP8_CACHE
    /* Where this lane keeps chunk i of a stage until it is converted: of K, or, behind them, of V. */
    __device__ __forceinline__ SharedAddress raw(int at_stage, int i) const {
        return shared + RING_AT + at_stage * STAGE_BYTES + team() * RAW_BYTES + (i * LANES + lane_of_team()) * 8;
    }
    static constexpr int FIRST_VALUE = chunks_of_lane(HEAD_DIM, KEYS, LANES);

    template <int COLUMNS> __device__ __forceinline__ void convert(SharedAddress to, int from_stage, int first) {
        constexpr int CHUNKS = round_up(COLUMNS, 16) / 8, UNITS = KEYS * CHUNKS;
#pragma unroll
        for (int i = 0; i < round_up(UNITS, LANES) / LANES; ++i) {
            const int unit = lane_of_team() + i * LANES;
            if (UNITS % LANES != 0 && unit >= UNITS) break;
            convert_eight(to + RowLayout<COLUMNS>::chunk(unit / CHUNKS, unit % CHUNKS), raw(from_stage, first + i));
        }
    }
    /* What this lane has of a stage goes to its team's tile. */
    __device__ __forceinline__ void convert_stage(int from_stage) {
        const SharedAddress keys = shared + team() * TILE_BYTES;
        convert<HEAD_DIM>(keys, from_stage, 0);
        convert<VALUE_DIM>(keys + Tile::KEY_BYTES, from_stage, FIRST_VALUE);
    }
#endif

    /* This team's tile of the coming stage sets off to place `to` of the ring. */
    __device__ __forceinline__ void issue(int to) {
        if (coming < rows.count) {
#if AITER_FP8_CACHE
            const auto copy_key = [&](const auto &source, const auto &at, int i, uint32_t, int byte, bool valid) {
                copy_eight_async(raw(to, i), source.key(at, byte), valid);
            };
            const auto copy_value = [&](const auto &source, const auto &at, int i, uint32_t, int byte, bool valid) {
                copy_eight_async(raw(to, FIRST_VALUE + i), source.value(at, byte), valid);
            };
#else
            const SharedAddress keys = shared + to * STAGE_BYTES + team() * TILE_BYTES, values = keys + Tile::KEY_BYTES;
            const auto copy_key = [&](const auto &source, const auto &at, int, uint32_t offset, int byte, bool valid) {
                copy_async(keys + offset, source.key(at, byte), valid);
            };
            const auto copy_value = [&](const auto &source, const auto &at, int, uint32_t offset, int byte,
                                        bool valid) { copy_async(values + offset, source.value(at, byte), valid); };
#endif
            if constexpr (VALUE_DIM == HEAD_DIM) {
                for_chunks<HEAD_DIM>([&](const auto &...chunk) { copy_key(chunk...), copy_value(chunk...); });
            } else {
                for_chunks<HEAD_DIM>(copy_key);
                for_chunks<VALUE_DIM>(copy_value);
            }
            coming += TEAMS * KEYS;
            look_up();
        }
        end_of_copies();
    }

    /* Those who use a tile together. */
    __device__ __forceinline__ void meet() const { TEAM == 1 && groups == TEAMS ? wave_sync() : barrier(); }

    __device__ __forceinline__ void advance() {
        if (sub == 0) {
            wait_for_copies_but<STAGES - 2>();
            meet(); /* tiles are here, and the stage before is free */
            issue(stage);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
#if AITER_FP8_CACHE
            convert_stage(stage);
            meet();
#endif
        }
        tile.current = shared + (FP8 ? 0 : stage * STAGE_BYTES) + (group + sub) * TILE_BYTES;
        sub = sub + groups == TEAMS ? 0 : sub + groups;
    }
    __device__ __forceinline__ void scores(const Queries &queries, typename Shape::Scores &s, bool) {
        tile.scores(queries, s);
    }
    __device__ __forceinline__ void accumulate(const typename Shape::Scores &s, typename Shape::Output &o, bool) {
        tile.accumulate(s, o, TEAM == 1 ? 0 : wave() % TEAM * Shape::COLUMNS);
    }
};

} // namespace aiter

#endif
