/* From the product of a query and a key to their score, as a power of two: what the softmax is taken of.
 *
 *   plain           scale q.k
 *   AITER_SOFTCAP   cap tanh(scale q.k / cap)
 *   AITER_ALIBI     either, - slope |place of the query - place of the key|
 *
 * The plain form is one multiplication, which the softmax does itself; for the others, scores are worked out in place
 * before it.
 */
#ifndef AITER_CPU_SCORE_H
#define AITER_CPU_SCORE_H

#include "sequence.h"

#if AITER_SOFTCAP
constexpr bool SOFTCAP = true;
#else
constexpr bool SOFTCAP = false;
#endif
#if AITER_ALIBI
constexpr bool ALIBI = true;
#else
constexpr bool ALIBI = false;
#endif
constexpr bool PLAIN_SCORES = !SOFTCAP && !ALIBI;

struct Score {
    float sign;          /* what queries (forward) or keys (backward) are multiplied by: -1, 0 or 1 */
    float product_scale; /* with AITER_SOFTCAP, what leads to the argument of tanh */
    float cap;           /* as a power of two */
    const float *slopes; /* of ALiBi: (heads_q,) or (batch, heads_q) */
    int64_t slopes_stride;

    /* Scaling by a negative number is scaling by its magnitude with the query negated, and by zero, with a query of
     * zeros: no product that has overflown can be left then, and a hidden score, -inf, stays what it is. */
    Score(const aiter_attention_problem &p, const float *alibi_slopes, float key_descale = 1.0f)
        : cap(0.0f), slopes(alibi_slopes), slopes_stride(p.alibi_stride) {
        const double factor = static_cast<double>(p.softmax_scale) * key_descale;
        sign = factor < 0.0 ? -1.0f : factor == 0.0 ? 0.0f : 1.0f;
        const double scale = sign == 0.0f ? 1.0 : factor * sign;
        product_scale = static_cast<float>(scale * LOG2_E * (SOFTCAP ? 2.0 / p.softcap : 1.0));
        if (SOFTCAP) cap = static_cast<float>(p.softcap * LOG2_E);
    }

    /* What the softmax multiplies by: scores that were worked out need nothing more. */
    float softmax_scale() const { return PLAIN_SCORES ? product_scale : 1.0f; }

    float slope(int64_t b, int64_t head) const {
        return ALIBI ? static_cast<float>(slopes[b * slopes_stride + head] * LOG2_E) : 0.0f;
    }

    /* Scores of products. `distance`: place of the query less that of the key. */
    template <class Slope> AITER_INLINE_MEMBER Vec operator()(Vec product, IntVec distance, Slope slope) const {
        Vec score = SOFTCAP ? cap * capped(product) : product * product_scale;
        if (ALIBI) score -= penalty(distance, slope);
        return score;
    }

    /* The same with the derivative by scale q.k. */
    template <class Slope>
    AITER_INLINE_MEMBER Vec operator()(Vec product, IntVec distance, Slope slope, Vec &derivative) const {
        const Vec part = SOFTCAP ? capped(product) : Vec{};
        derivative = 1.0f - part * part;
        Vec score = SOFTCAP ? cap * part : product * product_scale;
        if (ALIBI) score -= penalty(distance, slope);
        return score;
    }

  private:
    AITER_INLINE_MEMBER Vec capped(Vec product) const { return tanh_by_exp2<EXP2_DEGREE>(product * product_scale); }

    template <class Slope> static AITER_INLINE_MEMBER Vec penalty(IntVec distance, Slope slope) {
        return __builtin_convertvector(distance < 0 ? -distance : distance, Vec) * slope;
    }
};

/* Where a query token stands, within bounds that keep its distance to any key in 32 bits. */
AITER_INLINE int32_t place_of(const Sequence &s, int64_t token) {
    constexpr int64_t FAR = 1 << 30;
    return static_cast<int32_t>(clamp(token + s.offset, -FAR, FAR));
}

#endif
