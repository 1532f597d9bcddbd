/* What a block of a forward loop (arch/sm90_forward.h; AMD's: arch/gfx9_pieces.h) takes at one time: a row tile with all of
 * its keys (WholeRowTiles) or, in kernels built with AITER_CUT, a piece of them (Pieces). Each piece is attended to on its
 * own, from a softmax that has seen nothing; what comes out, its part, is added up in the order of the pieces.
 *
 *     keys of a row tile   |  piece 0   |  piece 1   |  piece 2   |  3  |      Pieces are whole tiles of keys.
 *
 *     dealt    each piece is work of its own, for any block:      a short chunk of a prompt, or single tokens, over many
 *              its part goes to memory, and a second kernel       keys: few row tiles, which would leave most of the
 *              adds up those of each row                          multiprocessors idle
 *     in turn  a warpgroup goes through all of its rows' keys     batch_invariant, many row tiles: bits are those of
 *              and, where a piece ends, adds what it has to       pieces that are dealt, at the price of the additions
 *              the sum so far, while the other one multiplies
 *              (on AMD all waves of a block at one time)
 *
 * Dealt are first all row tiles' first pieces, then their second ones: so blocks read the heads of the same tokens at one
 * time, which lie side by side in memory.
 *
 * With batch_invariant the cuts are at multiples of INVARIANT_KEYS, wherever rows begin and whatever else there is: so a
 * row's bits depend neither on the manner nor on the rows beside it, of which some see pieces that it does not. Those
 * leave it as it was (Weights). Else pieces are as many as give each block one.
 *
 * A part is as threads hold it, 16 bytes for each lane, lanes side by side, after each row's reference point and sum. Of
 * parts that are dealt only rows that exist are written and read. The sum so far has the same form, in shared memory where
 * that leaves the ring three stages. There, pieces are short: what an addition costs is little. Elsewhere it is in memory.
 *
 * Dealt pieces that few rows see are shared by blocks, with the same bits: of a cluster, which may add up the parts too
 * (arch/sm90_shared_piece.h), or of two kernels on AMD (arch/gfx9_scored_pieces.h).
 *
 * The second kernel adds up many pieces with many threads, which the loop's registers leave no room for, and comes up while
 * the last blocks of the first are at work. A row tile has the same number of pieces in both, from the same lengths; no
 * block waits for another of its kernel, so it does not matter how many are resident. The space for parts follows from
 * sizes in the call, which a captured launch repeats, and is the most that any of the machine's GPUs needs, as how many
 * pieces are dealt depends on its multiprocessors. In turn, each block has a part's place: there are no more blocks than
 * are at work at one time. */
#ifndef AITER_GPU_PIECES_H
#define AITER_GPU_PIECES_H

#include "gpu/arch.h"
#include "gpu/divisor.h"
#include "gpu/runtime.h"
#include "gpu/sequence.h"
#include "gpu/softmax.h"

namespace aiter {

/* Row tiles as they are: says what Pieces says, and leaves no code behind. */
struct WholeRowTiles {
    static constexpr int SUM_BYTES = 0;

    WholeRowTiles() = default;
    WholeRowTiles(const aiter_attention_problem &, int64_t, int64_t, int) {}
    static int64_t count(int64_t row_tiles) { return row_tiles; }
    static int64_t additions(int64_t) { return 0; }
    static int adding_threads() { return 0; }
    static int64_t workspace_bytes(int64_t, int, bool counted) { return counted ? sizeof(uint32_t) : 0; }
    static bool place_in(void *) { return true; }

    __device__ __forceinline__ int row_tile(int task) const { return task; }
    template <class RowTile> struct Task : RowTile {
        template <class Launch>
        __device__ __forceinline__ Task(const Launch &launch, const Place &place, int) : RowTile(launch, place) {}
        __device__ __forceinline__ const Range &own(const Range &keys) const { return keys; }
    };
    struct InTurn {
        __device__ __forceinline__ InTurn(const WholeRowTiles &, int) {}
        __device__ __forceinline__ bool pass(const WholeRowTiles &, int) { return false; }
        template <class Softmax> __device__ __forceinline__ void set_aside(Softmax &) {}
        template <class Output> __device__ __forceinline__ void leave(const WholeRowTiles &, SharedAddress, Output &) {}
        template <class Softmax, class Output>
        __device__ __forceinline__ void collect(const WholeRowTiles &, SharedAddress, Softmax &, Output &) {}
    };
    template <class Task, class Softmax, class Output>
    __device__ __forceinline__ bool is_whole(const Task &, const Softmax &, const Output &) const {
        return true;
    }
};

/* Which of a row tile's pieces this is, where they are dealt; else all of them are one. */
struct Piece {
    int number = 0, count = 1;
    int row_tile = 0; /* of all */
    Range keys;

    /* Of these keys, those that are in the piece. */
    __device__ __forceinline__ Range own(const Range &all) const {
        return {greater(all.low, keys.low), lesser(all.high, keys.high)};
    }
};

/* What a row's earlier and later keys count for, when the two are added up. `point`: x the reference point of the softmax,
 * y the sum of its exponentials. A row that has seen no keys on one side is what it is on the other, bit for bit. */
struct Weights {
    bool only_earlier, only_later;
    float earlier, later;
    float2 point;

    Weights() = default;
    /* seen: whether the earlier side has seen keys. */
    __device__ __forceinline__ Weights(float2 a, float2 b, bool seen)
        : only_earlier(b.y == 0), only_later(!seen && b.y != 0) {
        const float maximum = __builtin_fmaxf(a.x, b.x);
        earlier = exp2(a.x - maximum), later = exp2(b.x - maximum);
        point.x = only_earlier ? a.x : only_later ? b.x : maximum;
        point.y = add(a.y, b.y);
    }
    __device__ __forceinline__ bool both() const { return !only_earlier && !only_later; }
    __device__ __forceinline__ float add_both(float a, float b) const {
#if defined(__CUDACC__)
        return __fmaf_rn(b, later, __fmul_rn(a, earlier));
#else
        return __builtin_fmaf(b, later, a * earlier);
#endif
    }
    __device__ __forceinline__ float add(float a, float b) const {
        return only_earlier ? a : only_later ? b : add_both(a, b);
    }
    __device__ __forceinline__ float4 add(const float4 &a, const float4 &b) const {
        return make_float4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
    }
};

/* How row tiles are cut; a part of the kernel's parameter. WAVES: of a row tile, of WAVE_ROWS each. SHARED_ROOM: bytes that
 * shared memory has for the sum so far. */
template <int KEYS, int WAVES, class Output, int SHARED_ROOM> struct Pieces {
    static constexpr int CHUNKS = Output::SLOTS * Output::VALUES / 4; /* of 16 bytes, of a lane's values */
    static constexpr int SLOTS = Output::SLOTS, WAVE_ROWS = WAVE / LANES_PER_ROW * SLOTS, SLOT_CHUNKS = CHUNKS / SLOTS;
    static constexpr int POINT_BYTES = WAVES * WAVE_ROWS * sizeof(float2); /* where a part's values begin */
    static constexpr int VALUE_BYTES = CHUNKS * WAVE * sizeof(float4);     /* of a wave */
    static constexpr bool IN_SHARED = POINT_BYTES + WAVES * VALUE_BYTES <= SHARED_ROOM;
    static constexpr int SUM_BYTES = IN_SHARED ? POINT_BYTES + WAVES * VALUE_BYTES : 0;
    /* As short as prefill bears: its additions are to take a tenth of its time, as measured or predicted. (Shorter ones
     * help single sequences, and cost batches their beginnings and ends.) */
#if defined(AITER_GFX942) || defined(AITER_GFX950)
    static constexpr int PIECE_KEYS = Output::VALUES > 64 ? 4096 : 2048;
#else
    static constexpr int PIECE_KEYS = IN_SHARED ? 1024 : 2048;
#endif
    static constexpr int INVARIANT_KEYS = round_up(PIECE_KEYS, KEYS);
    static constexpr int LEAST_KEYS = 1024 / KEYS * KEYS; /* to be dealt: with fewer, beginning and end take longer */
    static constexpr int64_t MOST_BYTES = int64_t(512) << 20;
    static constexpr int PARTS_AT = 256; /* in the workspace, after the counter of tasks */
    static constexpr int NEVER = 0x7fffffff;
    static_assert(Output::VALUES % 4 == 0, "");

    int keys = 0;  /* of a piece; 0: nothing is cut */
    int dealt = 0; /* pieces of a row tile that are work of their own, at most; 0: a block takes all of them in turn */
    int rows = 0;  /* of a row tile's that there can be */
    Divisor by_keys, by_row_tiles; /* of all */
    bool at_multiples = false; /* are the cuts at multiples of `keys`? Else counted from a row tile's first key on */
    char *parts = nullptr;

    /* ---- host ---- */

    Pieces() = default;
    Pieces(const aiter_attention_problem &p, int64_t row_tiles, int64_t rows, int blocks)
        : rows(static_cast<int>(rows)), at_multiples(p.batch_invariant) {
        const bool few = row_tiles * 2 <= blocks;
        /* Keys that a row tile sees, at most: a window's, from the beginning of a tile of keys on. */
        int64_t seen = greater(p.seqlen_k, 1);
        if (WINDOW && p.window_left >= 0 && p.window_right >= 0)
            seen = lesser<int64_t>(seen, int64_t(p.window_left) + p.window_right + rows + KEYS);
        if (p.batch_invariant) {
            keys = p.seqlen_k > INVARIANT_KEYS ? INVARIANT_KEYS : 0;
        } else if (few && row_tiles > 0) {
            const int64_t count = lesser<int64_t>(blocks / row_tiles, seen / LEAST_KEYS);
            if (count > 1) keys = round_up(static_cast<int>((seen + count - 1) / count), KEYS);
        }
        by_keys = Divisor(keys);
        if (keys == 0 || !few) return;
        const int64_t most = (seen + keys - 1) / keys + (WINDOW && at_multiples); /* it may begin within a piece */
        if (row_tiles * most * bytes_of(waves()) <= MOST_BYTES) dealt = static_cast<int>(most);
        else if (!at_multiples) keys = 0;
        by_row_tiles = Divisor(row_tiles);
    }
    /* Of tasks. */
    int64_t count(int64_t row_tiles) const { return dealt > 0 ? row_tiles * dealt : row_tiles; }
    /* Blocks of the second kernel. */
    int64_t additions(int64_t row_tiles) const { return dealt > 0 ? row_tiles * waves() : 0; }

    int64_t workspace_bytes(int64_t row_tiles, int blocks, bool counted) const {
        if (!needs_parts()) return counted * int64_t(sizeof(uint32_t));
        return PARTS_AT + (dealt > 0 ? row_tiles * dealt : lesser<int64_t>(row_tiles, blocks)) * part_bytes();
    }
    /* False where there is none for the parts: nobody told how many multiprocessors there are. */
    bool place_in(void *workspace) {
        parts = static_cast<char *>(workspace) + PARTS_AT;
        return workspace != nullptr || !needs_parts();
    }

    /* ---- device ---- */

    /* Of a piece's keys, `key` at most. */
    __device__ __forceinline__ int multiple_before(int key) const { return by_keys.quotient(key) * keys; }
    /* Of all, which a task belongs to. */
    __device__ __forceinline__ int row_tile(int task) const {
        return dealt > 0 ? task - by_row_tiles.quotient(task) * by_row_tiles.by : task;
    }
    template <class RowTile> struct Task : RowTile {
        Piece piece;

        template <class Launch>
        __device__ __forceinline__ Task(const Launch &launch, const Place &place, int index)
            : RowTile(launch, place), piece(launch.work.piece(RowTile::keys, index)) {}
        __device__ __forceinline__ bool exists() const { return piece.number < piece.count && RowTile::exists(); }
        __device__ __forceinline__ Range own(const Range &keys) const { return piece.own(keys); }
    };
    /* The piece of a row tile with these keys that is number `index` of all tasks. */
    __device__ __forceinline__ Piece piece(const Range &all, int index) const {
        Piece result;
        result.keys = all;
        if (dealt == 0) return result;
        const int origin = at_multiples ? multiple_before(all.low) : all.low;
        result.count = all.empty() ? 1 : lesser(by_keys.quotient(all.high - origin - 1) + 1, dealt);
        result.row_tile = row_tile(index);
        result.number = by_row_tiles.quotient(index);
        result.keys.low = greater(all.low, origin + result.number * keys);
        if (result.number + 1 < result.count) result.keys.high = origin + (result.number + 1) * keys;
        return result;
    }

    /* What a part has of one wave's rows, as a lane sees it. */
    struct Part {
        float4 *values;
        float2 *points;

        /* wave: of those that the row tile's rows belong to; not wave(), which all lanes must ask together. */
        __device__ __forceinline__ Part(char *part, int wave)
            : values(reinterpret_cast<float4 *>(part + POINT_BYTES) + wave * CHUNKS * WAVE + lane()),
              points(reinterpret_cast<float2 *>(part) + wave * WAVE_ROWS) {}
        __device__ __forceinline__ float4 &chunk(int i) const { return values[i * WAVE]; }
        __device__ __forceinline__ float2 &point(int slot) const { return points[Output::row(slot)]; }
        /* visit(chunk, slot, i): of the values i ... i + 3 of a slot. */
        template <class Visit> static __device__ __forceinline__ void each_chunk(Visit visit) {
#pragma unroll
            for (int i = 0; i < CHUNKS; ++i) visit(i, slot_of(i), i % SLOT_CHUNKS * 4);
        }
        static __device__ __forceinline__ constexpr int slot_of(int chunk) { return chunk / SLOT_CHUNKS; }
    };

    /* By who goes through the pieces of a row tile itself: the sum of those that it has left behind. of_tile: the wave's
     * number among those of the row tile. */
    struct InTurn {
#if defined(AITER_GFX9)
        static constexpr int TOGETHER = 4; /* chunks that are on their way at one time */
#else
        static constexpr int TOGETHER = 1; /* from shared memory */
#endif
        int end; /* of this piece: the first key that is not in it */
        bool begun = false;
        float2 point[SLOTS]; /* of the piece that is set aside */

        /* low: the first key of the row tile. */
        __device__ __forceinline__ InTurn(const Pieces &work, int low)
            : end(work.keys > 0 && work.dealt == 0 ? work.multiple_before(low) + work.keys : NEVER) {}

        /* Whether the tile from `first` on begins another piece. */
        __device__ __forceinline__ bool is_cut(int first) const { return first >= end; }
        __device__ __forceinline__ bool pass(const Pieces &work, int first) {
            const bool cut = is_cut(first);
            if (cut) end += work.keys;
            return cut;
        }
        /* Both at once, where the tile from `first` on begins a piece. Not where the wave does not see it: then it has no
         * piece behind it, or this is its last one. */
        template <class Softmax>
        __device__ __forceinline__ void pass(const Pieces &work, int first, bool seen, Softmax &softmax, Output &o,
                                             int of_tile = wave()) {
            if (__builtin_expect(!is_cut(first), true)) return;
            if (seen) {
                set_aside(softmax);
                leave(work, 0, o, of_tile);
            } else {
                end += work.keys;
            }
        }
        /* The softmax begins anew, while the output is still being added to. */
        template <class Softmax> __device__ __forceinline__ void set_aside(Softmax &softmax) {
            give_points(softmax, point);
            softmax = Softmax(softmax.scale);
        }
        /* The output of what was set aside joins the sum. */
        __device__ __forceinline__ void leave(const Pieces &work, SharedAddress shared, Output &o,
                                              int of_tile = wave()) {
            const Part so_far = work.sum(shared, of_tile);
            if (begun) {
                add(so_far, o, [&](int chunk, int, int, const float4 &x) { so_far.chunk(chunk) = x; });
            } else {
                Part::each_chunk([&](int chunk, int slot, int i) { so_far.chunk(chunk) = chunk_of(o, slot, i); });
            }
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                so_far.point(slot) = point[slot]; /* the same by all lanes of a row */
            wave_sync();
            begun = true, end += work.keys;
            o.clear();
        }
        /* At the end: softmax and output of all pieces. */
        template <class Softmax>
        __device__ __forceinline__ void collect(const Pieces &work, SharedAddress shared, Softmax &softmax, Output &o,
                                                int of_tile = wave()) {
            if (!begun) return;
            set_aside(softmax);
            add(work.sum(shared, of_tile), o, [&](int, int slot, int i, const float4 &x) { set_chunk(o, slot, i, x); });
            take_points(softmax, point);
        }

      private:
        /* take(chunk, slot, i, x): of the sum so far and what is set aside. */
        template <class Take> __device__ __forceinline__ void add(const Part &so_far, const Output &o, Take take) {
            Weights weights[SLOTS];
            bool both = true;
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) {
                const float2 earlier = so_far.point(slot);
                weights[slot] = Weights(earlier, point[slot], earlier.y != 0);
                both &= weights[slot].both();
            }
            if (wave_any(!both)) /* rare */
                add(so_far, o, take, [&](int slot, float a, float b) { return weights[slot].add(a, b); });
            else add(so_far, o, take, [&](int slot, float a, float b) { return weights[slot].add_both(a, b); });
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot) point[slot] = weights[slot].point;
            wave_sync();
        }
        /* Left to itself the compiler waits for each chunk before the next sets off. */
        template <class Take, class Add>
        static __device__ __forceinline__ void add(const Part &so_far, const Output &o, Take take, Add add) {
#pragma unroll
            for (int begin = 0; begin < CHUNKS; begin += TOGETHER) {
                float4 earlier[TOGETHER];
#pragma unroll
                for (int n = 0; n < TOGETHER; ++n)
                    if (begin + n < CHUNKS) earlier[n] = so_far.chunk(begin + n);
                keep_order();
#pragma unroll
                for (int n = 0; n < TOGETHER; ++n) {
                    const int chunk = begin + n, slot = Part::slot_of(chunk), i = chunk % SLOT_CHUNKS * 4;
                    if (chunk >= CHUNKS) continue;
                    const float4 a = earlier[n], b = chunk_of(o, slot, i);
                    take(chunk, slot, i,
                         make_float4(add(slot, a.x, b.x), add(slot, a.y, b.y), add(slot, a.z, b.z),
                                     add(slot, a.w, b.w)));
                }
            }
        }
    };

    /* By each wave, with what it has of a task. Are these its rows' results, of all pieces? Else they are in memory now. */
    template <class Task, class Softmax>
    __device__ __forceinline__ bool is_whole(const Task &task, const Softmax &softmax, const Output &o,
                                             int of_tile = wave()) const {
        const Piece &piece = task.piece;
        if (piece.count == 1) return true;
        const DealtPart own(*this, piece, of_tile);
        own.leave(softmax);
        Part::each_chunk([&](int chunk, int slot, int i) { own.leave(chunk, chunk_of(o, slot, i)); });
        return false;
    }
    /* What of a part goes to memory: the rows that wave `of_tile` of a row tile has. */
    struct DealtPart : Part {
        int left; /* rows from the wave's first on */

        __device__ __forceinline__ DealtPart(const Pieces &work, const Piece &piece, int of_tile)
            : Part(work.part(piece.row_tile * work.dealt + piece.number, of_tile)),
              left(work.rows - of_tile * WAVE_ROWS) {}
        template <class Softmax> __device__ __forceinline__ void leave(const Softmax &softmax) const {
            float2 point[SLOTS];
            give_points(softmax, point);
#pragma unroll
            for (int slot = 0; slot < SLOTS; ++slot)
                if (lane_leads_row() && Output::row(slot) < left) l2_store(&this->point(slot), point[slot]);
        }
        __device__ __forceinline__ void leave(int chunk, const float4 &values) const {
            if (Output::row(Part::slot_of(chunk)) < left) l2_store(&this->chunk(chunk), values);
        }
    };

    /* The second kernel: a block adds up the parts of one wave's rows, each of its waves some of the columns. The first
     * wave then has the rows, as that wave had them. Many parts have more waves, few are added up by more blocks. */
    static constexpr int FEW_PARTS = 4, MOST_ADDING_THREADS = 8 * WAVE;
    int adding_threads() const { return dealt > FEW_PARTS ? MOST_ADDING_THREADS : MOST_ADDING_THREADS / 2; }

    struct Sums { /* in shared memory */
        float4 values[CHUNKS][WAVE];
        float2 points[SLOTS][WAVE];
    };
    template <class Softmax>
    __device__ __forceinline__ bool add_up(const Piece &piece, int of_tile, Sums &sums, Softmax &softmax,
                                           Output &o) const {
        const int left = rows - of_tile * WAVE_ROWS;
        if (dealt > FEW_PARTS) fold<8, 1, 16>(piece, of_tile, left, sums);
        else fold<4, 4, 4>(piece, of_tile, left, sums);
        barrier();
        if (wave() > 0) return false;
        float2 point[SLOTS];
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
            point[slot] = Output::row(slot) < left ? sums.points[slot][lane()] : make_float2(0, 0);
        Part::each_chunk([&](int chunk, int slot, int i) {
            set_chunk(o, slot, i, Output::row(slot) < left ? sums.values[chunk][lane()] : make_float4(0, 0, 0, 0));
        });
        take_points(softmax, point);
        return true;
    }
    /* Whether it has the row tile's parts to add up; if not, who had the one piece has written the rows. */
    __device__ __forceinline__ bool adds_up(const Piece &piece) const { return piece.count != 1; }
    __device__ __forceinline__ bool has_rows(int wave) const { return wave * WAVE_ROWS < rows; }
    /* Of a row tile: those that have rows. */
    __host__ __device__ __forceinline__ int waves() const { return (rows + WAVE_ROWS - 1) / WAVE_ROWS; }

    /* Of an output, of these columns or fewer: four values from the i-th of a slot on. */
    template <class Holder> static __device__ __forceinline__ float4 chunk_of(const Holder &o, int slot, int i) {
        return make_float4(o.get(slot, i), o.get(slot, i + 1), o.get(slot, i + 2), o.get(slot, i + 3));
    }
    template <class Holder>
    static __device__ __forceinline__ void set_chunk(Holder &o, int slot, int i, const float4 &x) {
        o.set(slot, i, x.x), o.set(slot, i + 1, x.y), o.set(slot, i + 2, x.z), o.set(slot, i + 3, x.w);
    }
    /* Of a softmax's rows, or to it. */
    template <class Softmax>
    static __device__ __forceinline__ void give_points(const Softmax &softmax, float2 (&point)[SLOTS]) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
            point[slot] = make_float2(softmax.maximum[slot], row_sum(softmax.sum[slot]));
    }
    template <class Softmax>
    static __device__ __forceinline__ void take_points(Softmax &softmax, const float2 (&point)[SLOTS]) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            softmax.maximum[slot] = point[slot].x;
            softmax.sum[slot] = lane_leads_row() ? point[slot].y : 0.0f;
        }
    }

    bool needs_parts() const { return keys > 0 && (dealt > 0 || !IN_SHARED); }

  private:
    static __host__ __device__ __forceinline__ int64_t bytes_of(int waves) { return POINT_BYTES + waves * VALUE_BYTES; }
    /* In turn every wave keeps a sum, whether or not it has rows. */
    __host__ __device__ __forceinline__ int64_t part_bytes() const { return bytes_of(dealt > 0 ? waves() : WAVES); }
    __device__ __forceinline__ Part part(int number, int wave) const { return {parts + number * part_bytes(), wave}; }
    /* Of a block's row tile so far. */
    __device__ __forceinline__ Part sum(SharedAddress shared, int of_tile) const {
        if (IN_SHARED) return {shared_pointer<char>(shared), of_tile};
        return part(block(), of_tile);
    }
    /* Rows of a wave that exist are `left`: of half of them or fewer a second slot has none. */
    static __device__ __forceinline__ constexpr int slots_in_use(int left) {
        return left > WAVE_ROWS / SLOTS ? SLOTS : 1;
    }
    /* Each of OWN_WAVES takes AT_ONCE chunks of a slot at a time, and of these TOGETHER parts are under way. */
    template <int OWN_WAVES, int AT_ONCE, int TOGETHER>
    __device__ __forceinline__ void fold(const Piece &piece, int of_tile, int left, Sums &sums) const {
        constexpr int BUNDLES = (SLOT_CHUNKS + AT_ONCE - 1) / AT_ONCE;
        const int first = piece.row_tile * dealt;
#pragma unroll 1
        for (int bundle = wave(); bundle < slots_in_use(left) * BUNDLES; bundle += OWN_WAVES) {
            const int slot = bundle / BUNDLES, begin = bundle % BUNDLES * AT_ONCE;
            if (Output::row(slot) >= left) continue;
            float4 sum[AT_ONCE];
            float2 point;
            bool seen = false; /* what point.y != 0 says, which would be waited for */
            /* visit(i, chunk): of chunks that exist */
            const auto each = [&](auto visit) {
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    if (begin + i < SLOT_CHUNKS) visit(i, slot * SLOT_CHUNKS + begin + i);
            };
#pragma unroll 1
            for (int number = 0; number < piece.count; number += TOGETHER) {
                float4 value[TOGETHER][AT_ONCE];
                float2 of_part[TOGETHER];
#pragma unroll
                for (int n = 0; n < TOGETHER; ++n) {
                    if (number + n >= piece.count) continue;
                    const Part other = part(first + number + n, of_tile);
                    each([&](int i, int chunk) { value[n][i] = l2_load(&other.chunk(chunk)); });
                    of_part[n] = l2_load(&other.point(slot));
                }
#pragma unroll
                for (int n = 0; n < TOGETHER; ++n) {
                    if (number + n >= piece.count) continue;
                    if (number + n == 0) {
                        point = of_part[n], seen = point.y != 0;
#pragma unroll
                        for (int i = 0; i < AT_ONCE; ++i) sum[i] = value[n][i];
                        continue;
                    }
                    const Weights w(point, of_part[n], seen);
                    point = w.point, seen |= of_part[n].y != 0;
#pragma unroll
                    for (int i = 0; i < AT_ONCE; ++i) sum[i] = w.add(sum[i], value[n][i]);
                }
            }
            each([&](int i, int chunk) { sums.values[chunk][lane()] = sum[i]; });
            if (begin == 0) sums.points[slot][lane()] = point;
        }
    }
};

} // namespace aiter

#endif
