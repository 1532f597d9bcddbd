/* What happens to a product of query and key before the mask and the softmax, in base 2:
 *
 *     exponent = LOG2_E * (softcap * tanh(softmax_scale * q.k / softcap) - slope * |own position - key's|)
 *
 * or the parts of it that the kernel is built with. `finish` does what does not commute with the softmax; what is left
 * is a factor, `unit`, that joins the softmax's own multiplication: without cap and slope `finish` does nothing, and
 * with a cap alone it ends with the tanh.
 *
 * The sign of the scale goes into the queries, so that every factor is positive and a masked score stays -inf. So does
 * a scale of zero, and one that is too small for a product with it to be a number: the queries become zeros, as a score
 * that overflowed would be inf * 0. */
#ifndef AITER_GPU_SCORE_H
#define AITER_GPU_SCORE_H

#include "gpu/arch.h"

namespace aiter {

constexpr float INFINITE = __builtin_inff();
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float SMALLEST_SCALE = 1.5e-38f, LARGEST_SCALE = 3e38f; /* that float arithmetic does not flush to 0 or inf */

/* tanh x for |x| <= NEAR: x times a polynomial in x^2, error 2.6e-6, without a transcendental function. So are capped
 * tiles whose scores are all less than NEAR of the cap, where this error is no more than 1.3e-4 of a score. */
constexpr float NEAR = 0.45f, NEAR_TANH[] = {0.999958523f, -0.331654421f, 0.116096944f}, MOST_NEAR_CAP = 50.0f;

/* Who decides is the tile, of whose rows others share it. With batch_invariant that may make no difference: there none is
 * near zero but in kernels that cut keys, in which each score of a tile that is not takes the way that it has in one. */
constexpr bool NEAR_BY_ITSELF = CUT;

/* The greatest of a tile's, without their signs; NaN aside. */
template <class Scores> __device__ __forceinline__ float largest_magnitude(const Scores &s) {
    float greatest[2] = {}; /* two, as each step waits for the one before */
#pragma unroll
    for (int slot = 0; slot < Scores::SLOTS; ++slot)
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i)
            greatest[i % 2] = __builtin_fmaxf(greatest[i % 2], __builtin_fabsf(s.get(slot, i)));
    return __builtin_fmaxf(greatest[0], greatest[1]);
}
template <class Scores, class Function> __device__ __forceinline__ void each(Scores &s, Function f) {
#pragma unroll
    for (int slot = 0; slot < Scores::SLOTS; ++slot)
#pragma unroll
        for (int i = 0; i < Scores::VALUES; ++i) s.set(slot, i, f(s.get(slot, i)));
}

struct Score {
    QueryBits query_bits;
    float inner; /* of a raw score. Softcap: gives 2 LOG2_E times what tanh is taken of */
    float near;  /* the most of that in a tile near zero */
    float outer; /* of what tanh gives, or of a raw score: base 2 */
    float unit;  /* of a finished score */

    static __host__ __device__ __forceinline__ float magnitude(const aiter_attention_problem &p) {
        return __builtin_fabsf(p.softmax_scale) * (SOFTCAP ? 2 * LOG2_E / p.softcap : LOG2_E);
    }
    static __host__ __device__ __forceinline__ bool knows_near(const aiter_attention_problem &p) {
        return NEAR_BY_ITSELF || !p.batch_invariant;
    }
    static __host__ __device__ __forceinline__ bool is_zero(const aiter_attention_problem &p) {
        return magnitude(p) < SMALLEST_SCALE;
    }
    __device__ __forceinline__ explicit Score(const aiter_attention_problem &p)
        : Score(p, is_zero(p) ? 1.0f : lesser(magnitude(p), LARGEST_SCALE)) {
        query_bits = {is_zero(p) ? 0u : ~0u, p.softmax_scale < 0 ? 0x80008000u : 0u};
    }
    /* For queries that nobody changes on their way. */
    static __device__ __forceinline__ Score with_sign(const aiter_attention_problem &p) {
        return Score(p, __builtin_copysignf(lesser(magnitude(p), LARGEST_SCALE), p.softmax_scale));
    }
    __device__ __forceinline__ Score(const aiter_attention_problem &p, float inner)
        : query_bits{~0u, 0u}, inner(inner),
          near(knows_near(p) && p.softcap <= MOST_NEAR_CAP ? NEAR * 2 * LOG2_E : -1.0f),
          outer(SOFTCAP ? p.softcap * LOG2_E : inner), unit(ALIBI ? 1.0f : outer) {}
    /* With keys that are to be multiplied by `descale`. */
    __device__ __forceinline__ Score times(float descale) const {
        Score score = *this;
        const float scale = __builtin_fabsf(descale) * inner;
        const bool zero = scale < SMALLEST_SCALE;
        if (zero) score.query_bits.keep = 0;
        if (descale < 0) score.query_bits.flip ^= 0x80008000u;
        score.inner = zero ? 1.0f : scale > LARGEST_SCALE ? LARGEST_SCALE : scale;
        if (!SOFTCAP) score.outer = score.inner;
        score.unit = ALIBI ? 1.0f : score.outer;
        return score;
    }
    /* One score; `distance` is that of the positions. */
    __device__ __forceinline__ float finish(float raw, float slope, float distance) const {
        if (SOFTCAP) raw = capped(raw);
        if (ALIBI) raw = raw * outer - slope * distance;
        return raw;
    }
    /* The tanh of it. */
    __device__ __forceinline__ float capped(float raw) const {
        return 1.0f - 2.0f * approximate_reciprocal(1.0f + exp2(raw * inner));
    }
    __device__ __forceinline__ float near_capped(float raw) const {
        constexpr float UNIT = 1 / (2 * LOG2_E);
        constexpr float C[] = {NEAR_TANH[0] * UNIT, NEAR_TANH[1] * UNIT * UNIT * UNIT,
                               NEAR_TANH[2] * UNIT * UNIT * UNIT * UNIT * UNIT};
        const float x = raw * inner, square = x * x;
        return x * __builtin_fmaf(__builtin_fmaf(C[2], square, C[1]), square, C[0]);
    }
    /* A tile whose columns begin at `first`. slope(slot) is in base 2; position(slot): where the row stands. */
    template <class Scores, class Slope, class Position>
    __device__ __forceinline__ void finish(Scores &s, int first, Slope slope, Position position) const {
        if constexpr (SOFTCAP || ALIBI) finish<false, CAUSAL>(s, s, first, slope, position);
    }
    /* The same where rows may be keys and columns queries, and the derivative of the cap. */
    template <class Scores, class Slope, class Position>
    __device__ __forceinline__ void finish(Scores &s, Scores &derivative, int first, Slope slope,
                                           Position position) const {
        if constexpr (SOFTCAP || ALIBI) finish<SOFTCAP, false>(s, derivative, first, slope, position);
    }

  private:
    /* BEFORE: what a row sees stands before it or where it does, so that its slope makes a line: what is found for
     * others will be hidden. */
    template <bool DERIVATIVE, bool BEFORE, class Scores, class Slope, class Position>
    __device__ __forceinline__ void finish(Scores &s, Scores &derivative, int first, Slope slope,
                                           Position position) const {
        if (SOFTCAP) {
            /* Not in backward passes: on sm_90a they would spill, and on gfx942 gain 3 %, as predicted. */
            if (!DERIVATIVE && !wave_any(largest_magnitude(s) * __builtin_fabsf(inner) > near)) {
                each(s, [&](float x) { return near_capped(x); });
            } else {
                each(s, [&](float x) {
                    const float magnitude = __builtin_fabsf(x) * __builtin_fabsf(inner);
                    const bool is_near = NEAR_BY_ITSELF && !DERIVATIVE && !(magnitude > near);
                    return is_near ? near_capped(x) : capped(x);
                });
            }
        }
#pragma unroll
        for (int slot = 0; slot < Scores::SLOTS; ++slot) {
            const float m = ALIBI ? slope(slot) : 0.0f;
            const float away = ALIBI ? static_cast<float>(position(slot) - first - Scores::lane_column()) : 0.0f;
#pragma unroll
            for (int i = 0; i < Scores::VALUES; ++i) {
                float x = s.get(slot, i);
                if (DERIVATIVE) derivative.set(slot, i, 1.0f - x * x);
                if (ALIBI) {
                    const float column = Scores::column(i);
                    x = BEFORE ? __builtin_fmaf(x, outer, __builtin_fmaf(m, column, -m * away))
                               : x * outer - m * __builtin_fabsf(away - column);
                }
                s.set(slot, i, x);
            }
        }
    }
};

/* A soft cap bounds the scores. Up to this one 2^score, finished and in base 2, is a number between 2^-72 and 2^72,
 * which float32 and bf16 hold as well as any, with room for sums and values: the softmax needs no reference point, and
 * scores may become weights as they come. For so few score bits tanh |x| is a polynomial in u = e^-2|x|,
 *
 *     (1 - u) / (1 + u) = 1 + c1 u + ... + c7 u^7     for 0 <= u <= 1, exact for u = 0 and 1, error 2.6e-6,
 *
 * which is 1.4e-4 of a score at most: weights would allow ten times that (half an ulp: 2e-3), the log-sum-exp of a row
 * with few keys does not. It spares the unit for transcendental functions a reciprocal. What counts is the absolute
 * error, as scores are exponents. */
struct SmallCap {
    static constexpr float MOST = 50.0f;
#if defined(AITER_DTYPE_BF16)
    static constexpr bool POSSIBLE = SOFTCAP && !ALIBI;
#else
    static constexpr bool POSSIBLE = false;
#endif
    static constexpr int DEGREE = 7;
    bool holds;
    float c[DEGREE + 1]; /* times the cap: from the kernel's parameters they cost no registers */
    float near;          /* the same for tiles near zero: the most of a raw score, and a polynomial in it */
    float odd[3];

    SmallCap() = default;
    explicit SmallCap(const aiter_attention_problem &p) : holds(POSSIBLE && p.softcap <= MOST) {
        constexpr float C[DEGREE + 1] = {1.0f,        -1.99977117f, 1.99356888f,  -1.93760145f,
                                         1.70079957f, -1.1692527f,  0.517487136f, -0.105230259f};
        for (int i = 0; i <= DEGREE; ++i) c[i] = C[i] * p.softcap * LOG2_E;
        const float scale = __builtin_fabsf(p.softmax_scale) / p.softcap;
        const bool powers_are_numbers = scale > 1e-4f && scale < 1e4f;
        near = powers_are_numbers && Score::knows_near(p) ? NEAR / scale : -1.0f;
        float power = p.softcap * LOG2_E * scale;
        for (int i = 0; i < 3; ++i) odd[i] = NEAR_TANH[i] * power, power *= scale * scale;
    }
    /* The same as a constant, where it is known. */
    __device__ __forceinline__ bool applies() const { return POSSIBLE && holds; }
    __device__ __forceinline__ float finish(float exponent) const {
        const float u = exp2(-__builtin_fabsf(exponent));
        float sum = c[DEGREE];
#pragma unroll
        for (int i = DEGREE - 1; i >= 0; --i) sum = __builtin_fmaf(sum, u, c[i]);
        return __builtin_copysignf(sum, exponent);
    }
    __device__ __forceinline__ float near_finish(float raw) const {
        const float square = raw * raw;
        return raw * __builtin_fmaf(__builtin_fmaf(odd[2], square, odd[1]), square, odd[0]);
    }
    template <class Scores> __device__ __forceinline__ void finish(const Score &score, Scores &s) const {
        if (!wave_any(largest_magnitude(s) > near)) {
            each(s, [&](float x) { return near_finish(x); });
        } else {
            each(s, [&](float x) {
                const bool is_near = NEAR_BY_ITSELF && !(__builtin_fabsf(x) > near);
                return is_near ? near_finish(x) : finish(x * score.inner);
            });
        }
    }
};

/* Of a query head, in base 2. */
template <class Tensors>
__device__ __forceinline__ float alibi_slope(const aiter_attention_problem &p, const Tensors &t, int batch, int head) {
    return ALIBI ? usual_nan(t.alibi_slopes[batch * p.alibi_stride + head]) * LOG2_E : 0.0f;
}

} // namespace aiter

#endif
