/* The backward pass on AMD CDNA. Implements the interface that attention_backward.hip describes; everything is computed
 * transposed, in tiles of 32x32, and operands have the layouts that arch/gfx9_tiles.h explains, where the own rows
 * stand for its queries and the passing rows for its keys:
 *
 *   scores, grad_probabilities   S^T = x_passing x_own^T: own rows in registers, passing rows in shared memory by rows
 *   add_to_x, add_to_y           dx^T += x_passing^T dS^T: dS as the matrix unit left it, passing rows transposed
 *
 * so passing rows are stored in both ways, where a pass needs both. A thread copies 16 bytes of four neighbouring
 * tokens of one of the two tensors: global loads to registers while the tile before is in use, then to shared
 * memory. */
#ifndef AITER_GPU_ARCH_GFX9_BACKWARD_H
#define AITER_GPU_ARCH_GFX9_BACKWARD_H

#include "gpu/arch.h"
#include "gpu/backward.h"

namespace aiter {

typedef float f32x4_run __attribute__((ext_vector_type(4)));

/* What does not depend on how tiles are kept. */
template <int HEAD_DIM, int VALUE_DIM, int PASS> struct BackwardBase {
    static constexpr int WIDER = greater(HEAD_DIM, VALUE_DIM), TEAM = team_of(WIDER);
    static constexpr int WAVES = 4, THREADS = WAVES * WAVE, ROWS = WAVES / TEAM * ROW_TILE;
    static constexpr int TOKENS = 32;
    static constexpr int STAGES = 2;
    static constexpr int BLOCKS = WIDER <= 64 || (WIDER <= 128 && PASS == GRAD_QUERY) ? 2 : 1;
    static constexpr int COLUMN_RUN = 4;
    static constexpr bool BOTH_IN_ONE_PASS = HEAD_DIM + VALUE_DIM <= 256; /* the gradients of keys and values */
    using Scores = Accumulator<1, TOKENS>;
    using GradX = Accumulator<1, columns_of_wave(HEAD_DIM, TEAM)>;
    using GradY = Accumulator<1, columns_of_wave(VALUE_DIM, TEAM)>;
    using OwnX = Query<HEAD_DIM, 1>;
    using OwnY = Query<VALUE_DIM, 1>;
    /* By rows as keys in the forward pass, transposed as values. */
    template <int COLUMNS> using Units = CopyUnits<round_up(COLUMNS, 32) / 8, TOKENS>;
    template <int COLUMNS> using Transposed = TransposedLayout<COLUMNS, TOKENS>;

    SharedAddress shared;
    OwnX own_x;
    OwnY own_y;

    static __device__ __forceinline__ int forget(int x) { return opaque_scalar(x); }
    static __device__ __forceinline__ int wave_row() { return wave() / TEAM * ROW_TILE; }
    template <int DIM> static __device__ __forceinline__ int first_column() {
        return TEAM == 1 ? 0 : wave() % TEAM * columns_of_wave(DIM, TEAM);
    }

    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        first += wave_row();
        const auto row = [&](const Rows &tensor) {
            return [&tensor, &rows, first](int r) {
                return first + r < rows.count ? reinterpret_cast<const Element *>(tensor.row(first + r)) : nullptr;
            };
        };
        own_x.load(shared, row(rows.x), {~0u, 0u});
        if (PASS != GRAD_VALUE) own_y.load(shared, row(rows.y), {~0u, 0u});
    }

    /* s = rows of a tile times own ones; `from` is where this lane's operands of the tile begin. */
    template <int COLUMNS>
    static __device__ __forceinline__ void multiply_rows(SharedAddress from, int tile, const Query<COLUMNS, 1> &own,
                                                         Scores &s) {
        from = opaque(from);
        s.clear();
#pragma unroll
        for (int n = 0; n < TOKENS / 32; ++n)
#pragma unroll
            for (int j = 0; j < Query<COLUMNS, 1>::STEPS; ++j) {
                const SharedAddress at = further(from, RowLayout<COLUMNS>::chunk(n * 32, 2 * j)) + tile;
                s.tile[0][n] = multiply_add(shared_load<u32x4>(at), own.operand[0][j], s.tile[0][n]);
            }
    }

    /* o += round(s) times a transposed tile, of this wave's columns. */
    template <int COLUMNS>
    static __device__ __forceinline__ void multiply_columns(const Scores &s, SharedAddress from, int tile,
                                                            Accumulator<1, columns_of_wave(COLUMNS, TEAM)> &o) {
        const int first = first_column<COLUMNS>();
        from = opaque(from) + (TEAM == 1 ? 0 : first * TOKENS * 2);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) {
            const u32x4 p = round_operand(s, 0, j);
#pragma unroll
            for (int n = 0; n < Accumulator<1, columns_of_wave(COLUMNS, TEAM)>::TILES; ++n) {
                if (TEAM > 1 && first + n * 32 >= COLUMNS) break;
                const SharedAddress at = further(from, Transposed<COLUMNS>::offset(n * 32, 2 * j)) + tile;
                o.tile[0][n] = multiply_add(shared_load<u32x4>(at), p, o.tile[0][n]);
            }
        }
    }

    /* In pairs one instruction does two values, but it must wait for a product to end: that pays where products are
     * short and vector work is what bounds the pass. */
#if defined(AITER_GFX950)
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        const f32x2 s = __builtin_elementwise_fma(f32x2{x, y}, f32x2(scale), f32x2{-log_x, -log_y});
        x = exp2(s.x), y = exp2(s.y);
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        const f32x2 dp = {x, y}, delta = {d_x, d_y};
        const f32x2 less =
            ENLARGED == 1.0f ? dp - delta : __builtin_elementwise_fma(dp, f32x2(1.0f / ENLARGED), -delta);
        const f32x2 s = f32x2{p_x, p_y} * less;
        x = s.x, y = s.y;
    }
#else
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        x = exp2(__builtin_fmaf(x, scale, -log_x)), y = exp2(__builtin_fmaf(y, scale, -log_y));
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        x = p_x * less_delta(x, d_x), y = p_y * less_delta(y, d_y);
    }
#endif

    static __device__ __forceinline__ void end() {}

    template <int COLUMNS, int WIDTH, class RowPointer>
    __device__ __forceinline__ void store(const Accumulator<1, WIDTH> &gradient, RowPointer row) const {
        store_output<COLUMNS>(gradient, shared, row, first_column<COLUMNS>());
    }
};

/* All that a pass needs of a tile is in shared memory at a time. */
template <int HEAD_DIM, int VALUE_DIM, int PASS> struct NarrowBackward : BackwardBase<HEAD_DIM, VALUE_DIM, PASS> {
    using Base = BackwardBase<HEAD_DIM, VALUE_DIM, PASS>;
    using Base::TOKENS, Base::THREADS, Base::COLUMN_RUN, Base::shared, Base::own_x, Base::own_y;
    using typename Base::Scores, typename Base::GradX, typename Base::GradY;
    template <int COLUMNS> using Units = typename Base::template Units<COLUMNS>;
    template <int COLUMNS> using Transposed = typename Base::template Transposed<COLUMNS>;
    static constexpr bool ALL_TAKE_PART = false;

    static constexpr bool BY_ROWS[2] = {true, PASS != GRAD_VALUE}; /* of x, of y */
    static constexpr bool TRANSPOSED[2] = {gives_x(PASS), gives_y(PASS)};
    static constexpr int UNITS = Units<HEAD_DIM>::COUNT + Units<VALUE_DIM>::COUNT;
    static constexpr int COPIES = round_up(UNITS, THREADS) / THREADS;
    static constexpr int Y_ROWS_AT = BY_ROWS[0] * TOKENS * RowLayout<HEAD_DIM>::BYTES;
    static constexpr int X_TRANSPOSED_AT = Y_ROWS_AT + BY_ROWS[1] * TOKENS * RowLayout<VALUE_DIM>::BYTES;
    static constexpr int Y_TRANSPOSED_AT = X_TRANSPOSED_AT + TRANSPOSED[0] * Transposed<HEAD_DIM>::BYTES;
    static constexpr int TERMS_AT = Y_TRANSPOSED_AT + TRANSPOSED[1] * Transposed<VALUE_DIM>::BYTES;
    static constexpr int SHARED_BYTES = TERMS_AT + 2 * TOKENS * 4;
    static constexpr bool EVEN = UNITS % THREADS == 0; /* else some waves copy nothing */
    static_assert(Units<HEAD_DIM>::COUNT % WAVE == 0, "a wave copies units of one tensor");

    u32x4 copied[COPIES][4]; /* on their way */
    f32x2 copied_terms;
    int coming_rows, coming_begin; /* of the tile: that exist, before this and from that on */

    /* In shared memory: where this thread puts what it copies, and where this lane's operands begin. The rest of an
     * address is a constant at every use; opaque there, for else the compiler keeps every sum. */
    SharedAddress to_rows[COPIES], to_columns[COPIES], from_rows, from_columns;

    __device__ __forceinline__ explicit NarrowBackward(SharedAddress memory) {
        shared = memory;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
            of_tensor(copy, [&](auto columns, bool is_y) {
                using U = Units<columns.value>;
                const int u = unit(copy), chunk = U::chunk(u), place = U::place(u);
                to_rows[copy] = opaque(shared + is_y * Y_ROWS_AT + RowLayout<columns.value>::chunk(U::key(u), chunk));
                to_columns[copy] = opaque(shared + (is_y ? Y_TRANSPOSED_AT : X_TRANSPOSED_AT) +
                                          Transposed<columns.value>::offset(chunk * 8, place / 2) + place % 2 * 8);
            });
        /* Of x; y has its own where its rows are of another length. */
        from_rows = opaque(shared + RowLayout<HEAD_DIM>::chunk(lane() & 31, lane() / 32));
        from_columns = opaque(shared + Transposed<HEAD_DIM>::offset(lane() & 31, lane() / 32));
    }

    /* Which tensor, wave by wave, and which unit of it. */
    static __device__ __forceinline__ bool is_y(int copy) {
        return wave() * WAVE + copy * THREADS >= Units<HEAD_DIM>::COUNT;
    }
    static __device__ __forceinline__ bool copies(int copy) { return EVEN || wave() * WAVE + copy * THREADS < UNITS; }
    static __device__ __forceinline__ int unit(int copy) {
        return thread_in_block() + copy * THREADS - is_y(copy) * Units<HEAD_DIM>::COUNT;
    }
    /* Calls f(number of columns, is it y). */
    template <int N> struct Number {
        static constexpr int value = N;
    };
    template <class F> static __device__ __forceinline__ void of_tensor(int copy, F f) {
        if (HEAD_DIM == VALUE_DIM) f(Number<HEAD_DIM>(), is_y(copy));
        else if (is_y(copy)) f(Number<VALUE_DIM>(), true);
        else f(Number<HEAD_DIM>(), false);
    }

    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        coming_rows = rows.count - first, coming_begin = DROPOUT ? rows.begin - first : 0;
        const int last = coming_rows - 1;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
            of_tensor(copy, [&](auto columns, bool is_y) {
                using U = Units<columns.value>;
                const Rows &from = is_y ? rows.y : rows.x;
                const char *base = from.row(first);
                const int chunk = U::chunk(unit(copy)), token = U::key(unit(copy));
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const int place = lesser(token + k, last);
                    copied[copy][k] = u32x4{0, 0, 0, 0};
                    if (copies(copy) && (columns.value % 64 == 0 || chunk < columns.value / 8))
                        copied[copy][k] = *reinterpret_cast<const u32x4 *>(
                            base + (static_cast<uint32_t>(place) * static_cast<uint32_t>(from.stride) + chunk * 16));
                }
            });
        if (!owns_queries(PASS) && thread_in_block() < TOKENS)
            copied_terms = reinterpret_cast<const f32x2 *>(rows.terms)[first + lesser(thread_in_block(), last)];
    }
    __device__ __forceinline__ void skip() {}

    __device__ __forceinline__ void publish() {
        barrier();
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy)
            of_tensor(copy, [&](auto columns, bool is_y) {
                using U = Units<columns.value>;
                if (coming_rows < TOKENS || DROPOUT && coming_begin > 0) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int row = U::key(unit(copy)) + k;
                        if (row >= coming_rows || DROPOUT && row < coming_begin) copied[copy][k] = u32x4{0, 0, 0, 0};
                    }
                }
                if (!copies(copy)) return;
                const int chunk = U::chunk(unit(copy));
                if ((is_y ? BY_ROWS[1] : BY_ROWS[0]) && chunk < Query<columns.value, 1>::STEPS * 2)
                    store_rows<columns.value>(to_rows[copy], copied[copy]);
                if ((is_y ? TRANSPOSED[1] : TRANSPOSED[0]) && chunk < Transposed<columns.value>::CHUNKS)
                    store_transposed<columns.value, TOKENS>(to_columns[copy], copied[copy]);
            });
        if (!owns_queries(PASS) && thread_in_block() < TOKENS) {
            const SharedAddress to = shared + TERMS_AT + thread_in_block() * 4;
            shared_store(to, copied_terms.x);
            shared_store(to + TOKENS * 4, copied_terms.y);
        }
        barrier();
    }

    __device__ __forceinline__ void scores(Scores &s) const {
        Base::template multiply_rows<HEAD_DIM>(from_rows, 0, own_x, s);
    }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        using Layout = RowLayout<VALUE_DIM>;
        const bool same = Layout::BYTES == RowLayout<HEAD_DIM>::BYTES;
        Base::template multiply_rows<VALUE_DIM>(same ? from_rows : shared + Layout::chunk(lane() & 31, lane() / 32),
                                                Y_ROWS_AT, own_y, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, GradX &dx) const {
        Base::template multiply_columns<HEAD_DIM>(ds, from_columns, X_TRANSPOSED_AT, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, GradY &dy) const {
        Base::template multiply_columns<VALUE_DIM>(p, from_columns, Y_TRANSPOSED_AT, dy);
    }

    __device__ __forceinline__ void term(int which, int column, float (&run)[COLUMN_RUN]) const {
        const auto four = shared_load<f32x4_run>(shared + TERMS_AT + which * TOKENS * 4 + column * 4);
#pragma unroll
        for (int i = 0; i < COLUMN_RUN; ++i) run[i] = four[i];
    }
};

/* Beyond 256 columns: of a tile, shared memory holds the rows of one tensor, and one transposed, as much as the 64 KB
 * of gfx90a and gfx942 take at 512.
 *
 *   publish               x by rows | x or y transposed, as the pass needs     barriers around it: all waves take part
 *   grad_probabilities    y by rows in place of x's                            in every tile
 *
 * LSE and delta of passing rows are read where they are. */
template <int HEAD_DIM, int VALUE_DIM, int PASS> struct WideBackward : BackwardBase<HEAD_DIM, VALUE_DIM, PASS> {
    using Base = BackwardBase<HEAD_DIM, VALUE_DIM, PASS>;
    using Base::TOKENS, Base::THREADS, Base::COLUMN_RUN, Base::shared, Base::own_x, Base::own_y;
    using typename Base::Scores, typename Base::GradX, typename Base::GradY;
    static constexpr bool ALL_TAKE_PART = true;
    static constexpr int ROW_BYTES = greater(RowLayout<HEAD_DIM>::BYTES, RowLayout<VALUE_DIM>::BYTES);
    static constexpr int TRANSPOSED_AT = TOKENS * ROW_BYTES;
    static constexpr int SHARED_BYTES =
        TRANSPOSED_AT + TransposedLayout<(gives_x(PASS) ? HEAD_DIM : VALUE_DIM), TOKENS>::BYTES;

    /* One tensor's tile on its way from global memory. */
    template <int COLUMNS> struct Copy {
        using U = typename Base::template Units<COLUMNS>;
        static constexpr int COPIES = round_up(U::COUNT, THREADS) / THREADS;
        static constexpr bool EVEN = U::COUNT % THREADS == 0;
        u32x4 four[COPIES][4];
        int valid, begin; /* rows of the tile that exist: before `valid`, from `begin` on */

        static __device__ __forceinline__ int unit(int copy) { return thread_in_block() + copy * THREADS; }
        __device__ __forceinline__ void load(const Rows &rows, int first, const RowPair &pair) {
            valid = pair.count - first, begin = DROPOUT ? pair.begin - first : 0;
            const char *base = rows.row(first);
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy) {
                const int chunk = U::chunk(unit(copy)), token = U::key(unit(copy));
                const bool exists = (EVEN || unit(copy) < U::COUNT) && (COLUMNS % 64 == 0 || chunk < COLUMNS / 8);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const auto place = static_cast<uint32_t>(lesser(token + k, valid - 1));
                    four[copy][k] = u32x4{0, 0, 0, 0};
                    if (exists)
                        four[copy][k] = *reinterpret_cast<const u32x4 *>(
                            base + (place * static_cast<uint32_t>(rows.stride) + chunk * 16));
                }
            }
        }
        /* Rows that do not exist become zeros. */
        __device__ __forceinline__ void end() {
            if (valid < TOKENS || DROPOUT && begin > 0) {
#pragma unroll
                for (int copy = 0; copy < COPIES; ++copy)
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int row = U::key(unit(copy)) + k;
                        if (row >= valid || DROPOUT && row < begin) four[copy][k] = u32x4{0, 0, 0, 0};
                    }
            }
        }
        __device__ __forceinline__ void store_by_rows(SharedAddress tile) const {
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy) {
                const int chunk = U::chunk(unit(copy));
                if ((EVEN || unit(copy) < U::COUNT) && chunk < Query<COLUMNS, 1>::STEPS * 2)
                    store_rows<COLUMNS>(tile + RowLayout<COLUMNS>::chunk(U::key(unit(copy)), chunk), four[copy]);
            }
        }
        __device__ __forceinline__ void store_by_columns(SharedAddress tile) const {
            using Layout = TransposedLayout<COLUMNS, TOKENS>;
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy) {
                const int chunk = U::chunk(unit(copy)), place = U::place(unit(copy));
                if ((EVEN || unit(copy) < U::COUNT) && chunk < Layout::CHUNKS)
                    store_transposed<COLUMNS, TOKENS>(tile + Layout::offset(chunk * 8, place / 2) + place % 2 * 8,
                                                      four[copy]);
            }
        }
    };

    Copy<HEAD_DIM> x;
    Copy<VALUE_DIM> y;
    RowPair coming; /* the pair and the first row of the tile on its way */
    int coming_first;
    const LseAndDelta *terms; /* of the current tile's rows, of which so many exist */
    int valid_terms;

    __device__ __forceinline__ explicit WideBackward(SharedAddress memory) { shared = memory; }

    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        coming = rows, coming_first = first;
        x.load(rows.x, first, rows);
        if (!gives_x(PASS)) y.load(rows.y, first, rows);
    }
    __device__ __forceinline__ void skip() {}

    __device__ __forceinline__ void publish() {
        barrier();
        terms = coming.terms + coming_first, valid_terms = coming.count - coming_first;
        if (gives_x(PASS)) y.load(coming.y, coming_first, coming);
        x.end();
        x.store_by_rows(shared);
        if (gives_x(PASS)) {
            x.store_by_columns(shared + TRANSPOSED_AT);
        } else {
            y.end();
            y.store_by_columns(shared + TRANSPOSED_AT);
        }
        barrier();
    }

    template <int COLUMNS> __device__ __forceinline__ SharedAddress from_rows() const {
        return shared + RowLayout<COLUMNS>::chunk(lane() & 31, lane() / 32);
    }
    template <int COLUMNS> __device__ __forceinline__ SharedAddress from_columns() const {
        return shared + TransposedLayout<COLUMNS, TOKENS>::offset(lane() & 31, lane() / 32);
    }
    __device__ __forceinline__ void scores(Scores &s) const {
        Base::template multiply_rows<HEAD_DIM>(from_rows<HEAD_DIM>(), 0, own_x, s);
    }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) {
        barrier();
        y.end();
        y.store_by_rows(shared);
        barrier();
        Base::template multiply_rows<VALUE_DIM>(from_rows<VALUE_DIM>(), 0, own_y, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, GradX &dx) const {
        Base::template multiply_columns<HEAD_DIM>(ds, from_columns<HEAD_DIM>(), TRANSPOSED_AT, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, GradY &dy) const {
        Base::template multiply_columns<VALUE_DIM>(p, from_columns<VALUE_DIM>(), TRANSPOSED_AT, dy);
    }
    __device__ __forceinline__ void term(int which, int column, float (&run)[COLUMN_RUN]) const {
#pragma unroll
        for (int i = 0; i < COLUMN_RUN; ++i) {
            const LseAndDelta &own = terms[lesser(column + i, valid_terms - 1)];
            run[i] = which == 0 ? own.lse : own.delta;
        }
    }
};

template <int HEAD_DIM, int VALUE_DIM, int PASS, bool WIDE = (greater(HEAD_DIM, VALUE_DIM) > 256)>
struct Backward : NarrowBackward<HEAD_DIM, VALUE_DIM, PASS> {
    using NarrowBackward<HEAD_DIM, VALUE_DIM, PASS>::NarrowBackward;
};
template <int HEAD_DIM, int VALUE_DIM, int PASS>
struct Backward<HEAD_DIM, VALUE_DIM, PASS, true> : WideBackward<HEAD_DIM, VALUE_DIM, PASS> {
    using WideBackward<HEAD_DIM, VALUE_DIM, PASS>::WideBackward;
};

} // namespace aiter

#endif
