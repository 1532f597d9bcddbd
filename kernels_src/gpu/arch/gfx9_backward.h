/* The backward pass on AMD CDNA. Implements the interface that attention_backward.hip describes; everything is computed
 * transposed, in tiles of 32x32, and operands have the layouts that arch/gfx9.h explains, where the own rows stand for
 * its queries and the passing rows for its keys:
 *
 *   scores, grad_probabilities   S^T = x_passing x_own^T: own rows in registers, passing rows in shared memory by rows
 *   add_to_x, add_to_y           dx^T += x_passing^T dS^T: dS as the matrix unit left it, passing rows transposed
 *
 * so passing rows are stored in both ways, where a pass needs both. A thread carries 16 bytes of four neighbouring
 * tokens of one of the two tensors: global loads to registers while the tile before is in use, then to shared
 * memory. */
#ifndef AITER_GPU_ARCH_GFX9_BACKWARD_H
#define AITER_GPU_ARCH_GFX9_BACKWARD_H

#include "gpu/arch.h"

namespace aiter {

typedef float f32x4_run __attribute__((ext_vector_type(4)));

template <int HEAD_DIM, int PASS> struct Backward {
    static constexpr int WAVES = 4, THREADS = WAVES * WAVE, ROWS = WAVES * ROW_TILE, TEAM = 1;
    static constexpr int TOKENS = 32;
    static constexpr int STAGES = 2;
    static constexpr int BLOCKS = HEAD_DIM <= 64 || (HEAD_DIM <= 128 && PASS == GRAD_QUERY) ? 2 : 1;
    static constexpr int COLUMN_RUN = 4;
    static constexpr int RUN_ON = 0;
    static constexpr bool CARRIERS = false;
    static constexpr bool BOTH_IN_ONE_PASS = HEAD_DIM <= 128; /* the gradients of keys and values */
    using Scores = Accumulator<1, TOKENS>;
    using Output = Accumulator<1, HEAD_DIM>;
    static __device__ __forceinline__ int forget(int x) { return opaque_scalar(x); }

    using Own = Query<HEAD_DIM, 1>;
    using Layout = KeyValueTile<HEAD_DIM, TOKENS, THREADS>;        /* by rows as its keys, transposed as its values */
    static constexpr bool BY_ROWS[2] = {true, PASS != GRAD_VALUE}; /* of x, of y */
    static constexpr bool TRANSPOSED[2] = {gives_x(PASS), gives_y(PASS)};
    static constexpr int COPIES = round_up(2 * Layout::UNITS, THREADS) / THREADS;
    static constexpr int ROW_BYTES = Layout::KEY_BYTES, TRANSPOSED_BYTES = Layout::VALUE_BYTES;
    static constexpr int TRANSPOSED_AT = (BY_ROWS[0] + BY_ROWS[1]) * ROW_BYTES;
    static constexpr int TERMS_AT = TRANSPOSED_AT + (TRANSPOSED[0] + TRANSPOSED[1]) * TRANSPOSED_BYTES;
    static constexpr int SHARED_BYTES = TERMS_AT + 2 * TOKENS * 4;
    static constexpr bool EVEN = 2 * Layout::UNITS % THREADS == 0; /* else some waves carry nothing */
    static_assert(Layout::UNITS % WAVE == 0, "a wave carries units of one tensor");

    SharedAddress shared;
    Own own_x, own_y;
    u32x4 carried[COPIES][4];
    f32x2 carried_terms;
    int carried_rows; /* that exist */

    /* In shared memory: where this thread puts what it carries, and where this lane's operands begin. The rest of an
     * address is a constant at every use; opaque there, for else the compiler keeps every sum. */
    SharedAddress to_rows[COPIES], to_columns[COPIES], from_rows, from_columns;

    __device__ __forceinline__ explicit Backward(SharedAddress shared) : shared(shared) {
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const int u = unit(copy), chunk = Layout::unit_chunk(u), place = Layout::unit_place(u), is_y = tensor(copy);
            to_rows[copy] =
                opaque(shared + is_y * BY_ROWS[0] * ROW_BYTES + RowLayout<HEAD_DIM>::chunk(Layout::unit_key(u), chunk));
            to_columns[copy] = opaque(shared + TRANSPOSED_AT + is_y * TRANSPOSED[0] * TRANSPOSED_BYTES +
                                      Layout::value_offset(chunk * 8, place / 2) + place % 2 * 8);
        }
        from_rows = opaque(shared + RowLayout<HEAD_DIM>::chunk(lane() & 31, lane() / 32));
        from_columns = opaque(shared + Layout::value_offset(lane() & 31, lane() / 32));
    }

    __device__ __forceinline__ void load_own(const RowPair &rows, int first) {
        first += wave() * ROW_TILE;
        const auto row = [&](const Rows &tensor) {
            return [&tensor, &rows, first](int r) {
                return first + r < rows.count ? reinterpret_cast<const Element *>(tensor.row(first + r)) : nullptr;
            };
        };
        own_x.load(shared, row(rows.x), false);
        if (PASS != GRAD_VALUE) own_y.load(shared, row(rows.y), false);
    }

    /* Which tensor, wave by wave, and which unit of it. */
    static __device__ __forceinline__ int tensor(int copy) { return (wave() * WAVE + copy * THREADS) / Layout::UNITS; }
    static __device__ __forceinline__ bool carries(int copy) { return EVEN || tensor(copy) < 2; }
    static __device__ __forceinline__ int unit(int copy) {
        return thread_in_block() + copy * THREADS - tensor(copy) * Layout::UNITS;
    }

    __device__ __forceinline__ void issue(const RowPair &rows, int first) {
        carried_rows = rows.count - first;
        const int last = carried_rows - 1;
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            const Rows &from = tensor(copy) == 0 ? rows.x : rows.y;
            const char *base = from.row(first);
            const int chunk = Layout::unit_chunk(unit(copy)), token = Layout::unit_key(unit(copy));
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int place = lesser(token + k, last);
                carried[copy][k] = u32x4{0, 0, 0, 0};
                if (carries(copy) && (HEAD_DIM % 64 == 0 || chunk < HEAD_DIM / 8))
                    carried[copy][k] = *reinterpret_cast<const u32x4 *>(
                        base + (static_cast<uint32_t>(place) * static_cast<uint32_t>(from.stride) + chunk * 16));
            }
        }
        if (!owns_queries(PASS) && thread_in_block() < TOKENS)
            carried_terms = reinterpret_cast<const f32x2 *>(rows.terms)[first + lesser(thread_in_block(), last)];
    }
    __device__ __forceinline__ void skip() {}

    __device__ __forceinline__ void publish() {
        barrier();
        if (carried_rows < TOKENS) {
#pragma unroll
            for (int copy = 0; copy < COPIES; ++copy)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    if (Layout::unit_key(unit(copy)) + k >= carried_rows) carried[copy][k] = u32x4{0, 0, 0, 0};
        }
#pragma unroll
        for (int copy = 0; copy < COPIES; ++copy) {
            if (!carries(copy)) continue;
            const int chunk = Layout::unit_chunk(unit(copy)), is_y = tensor(copy);
            if ((is_y ? BY_ROWS[1] : BY_ROWS[0]) && chunk < Own::STEPS * 2) {
                const SharedAddress to = opaque(to_rows[copy]);
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    shared_store(further(to, RowLayout<HEAD_DIM>::chunk(k, 0)), carried[copy][k]);
            }
            if ((is_y ? TRANSPOSED[1] : TRANSPOSED[0]) && chunk < Layout::CHUNKS) {
                const SharedAddress to = opaque(to_columns[copy]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const uint32_t half = i % 2 ? 0x07060302u : 0x05040100u;
                    const u32x2 four = {__builtin_amdgcn_perm(carried[copy][1][i / 2], carried[copy][0][i / 2], half),
                                        __builtin_amdgcn_perm(carried[copy][3][i / 2], carried[copy][2][i / 2], half)};
                    shared_store(further(to, Layout::value_offset(i, 0)), four);
                }
            }
        }
        if (!owns_queries(PASS) && thread_in_block() < TOKENS) {
            const SharedAddress to = shared + TERMS_AT + thread_in_block() * 4;
            shared_store(to, carried_terms.x);
            shared_store(to + TOKENS * 4, carried_terms.y);
        }
        barrier();
    }

    __device__ __forceinline__ void scores(Scores &s) const { multiply_rows(0, own_x, s); }
    __device__ __forceinline__ void grad_probabilities(Scores &dp) const {
        multiply_rows(BY_ROWS[0] * ROW_BYTES, own_y, dp);
    }
    __device__ __forceinline__ void add_to_x(const Scores &ds, Output &dx) const {
        multiply_columns(ds, TRANSPOSED_AT, dx);
    }
    __device__ __forceinline__ void add_to_y(const Scores &p, Output &dy) const {
        multiply_columns(p, TRANSPOSED_AT + TRANSPOSED[0] * TRANSPOSED_BYTES, dy);
    }

    __device__ __forceinline__ void multiply_rows(int tile, const Own &own, Scores &s) const {
        const SharedAddress from = opaque(from_rows);
        s.clear();
#pragma unroll
        for (int n = 0; n < TOKENS / 32; ++n)
#pragma unroll
            for (int j = 0; j < Own::STEPS; ++j) {
                const SharedAddress at = further(from, RowLayout<HEAD_DIM>::chunk(n * 32, 2 * j)) + tile;
                s.tile[0][n] = multiply_add(shared_load<u32x4>(at), own.operand[0][j], s.tile[0][n]);
            }
    }

    __device__ __forceinline__ void multiply_columns(const Scores &s, int tile, Output &o) const {
        const SharedAddress from = opaque(from_columns);
#pragma unroll
        for (int j = 0; j < TOKENS / 16; ++j) {
            u32x4 p;
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = to_elements(s.get(0, 8 * j + 2 * i), s.get(0, 8 * j + 2 * i + 1));
#pragma unroll
            for (int n = 0; n < Output::TILES; ++n) {
                o.tile[0][n] = multiply_add(
                    shared_load<u32x4>(further(from, Layout::value_offset(n * 32, 2 * j)) + tile), p, o.tile[0][n]);
            }
        }
    }

    __device__ __forceinline__ void term(int which, int column, float (&run)[COLUMN_RUN]) const {
        const auto four = shared_load<f32x4_run>(shared + TERMS_AT + which * TOKENS * 4 + column * 4);
#pragma unroll
        for (int i = 0; i < COLUMN_RUN; ++i) run[i] = four[i];
    }

    /* In pairs: multiplication, addition and both together take two values an instruction. */
    static __device__ __forceinline__ void exponentiate(float &x, float &y, float scale, float log_x, float log_y) {
        const f32x2 s = __builtin_elementwise_fma(f32x2{x, y}, f32x2(scale), f32x2{-log_x, -log_y});
        x = exp2(s.x), y = exp2(s.y);
    }
    static __device__ __forceinline__ void weigh(float &x, float &y, float p_x, float p_y, float d_x, float d_y) {
        const f32x2 s = f32x2{p_x, p_y} * (f32x2{x, y} - f32x2{d_x, d_y});
        x = s.x, y = s.y;
    }

    template <int> __device__ __forceinline__ void release() {}
    template <int> static __device__ __forceinline__ void wait() {}
    template <int, class Matrix> static __device__ __forceinline__ void finish(Matrix &) {}
    static __device__ __forceinline__ void end() {}

    template <class RowPointer> __device__ __forceinline__ void store(const Output &gradient, RowPointer row) const {
        store_output<HEAD_DIM>(gradient, shared, row);
    }
};

} // namespace aiter

#endif
