/* Which keys a query row sees, and so which pieces of the scores need no work, some, or all of it.
 *
 *              keys ->
 *   rows       . . low [ s e e n ] high . . . .          A row sees the keys of one range. Both ends move on with the
 *     |        . . . low [ s e e n ] high . . .          rows, so the first and the last of some rows say what all of
 *     v        . . . . low [ s e e n ] high . .          them see, and what one of them at least.
 *
 * AITER_CAUSAL: nothing behind the place of a row. AITER_WINDOW: so many keys before and after it, with AITER_CHUNK none
 * of another chunk. Else: all keys.
 */
#ifndef AITER_CPU_MASK_H
#define AITER_CPU_MASK_H

#include "sequence.h"

#if AITER_CAUSAL && AITER_WINDOW
#error "a causal window is a window with nothing to the right: AITER_WINDOW without AITER_CAUSAL"
#endif

#if AITER_CHUNK && !AITER_WINDOW
#error "AITER_CHUNK goes with AITER_WINDOW, whose sides may be without limits"
#endif

#if AITER_WINDOW
constexpr bool WINDOW = true; /* ranges may begin behind the first key */
#else
constexpr bool WINDOW = false;
#endif

/* Keys from low to high - 1. */
struct KeyRange {
    int64_t low, high;
};

struct Mask {
    int64_t left, right; /* of the window, -1: no limit */
    int64_t chunk;       /* keys of a chunk */

    explicit Mask(const aiter_attention_problem &p)
        : left(p.window_left), right(p.window_right), chunk(p.attention_chunk) {}

    /* The keys that a query token sees. */
    KeyRange seen_by(const Sequence &s, int64_t token) const {
        const int64_t place = token + s.offset;
        (void)place;
#if AITER_CAUSAL
        return {0, clamp(place + 1, 0, s.tokens_k)};
#elif AITER_WINDOW
        KeyRange seen{left < 0 ? 0 : clamp(place - left, 0, s.tokens_k),
                      right < 0 ? s.tokens_k : clamp(place + right + 1, 0, s.tokens_k)};
#if AITER_CHUNK
        const int64_t past = place % chunk, first = place - (past < 0 ? past + chunk : past);
        seen.low = maximum(seen.low, clamp(first, 0, s.tokens_k));
        seen.high = minimum(seen.high, clamp(first + chunk, 0, s.tokens_k));
#endif
        return seen;
#else
        return {0, s.tokens_k};
#endif
    }

    /* The most keys that so many tokens in a row can see, of `all`. */
    int64_t most_keys(int64_t tokens, int64_t all) const {
#if AITER_CHUNK
        all = minimum(2 * chunk + tokens, all);
#endif
        return WINDOW && left >= 0 && right >= 0 ? minimum(left + right + tokens, all) : all;
    }
};

/* The keys that some rows see: one of them at least, and every one. */
struct Visibility {
    KeyRange some, every;

    Visibility() {}
    Visibility(const Mask &mask, const Sequence &s, int64_t first_token, int64_t last_token) {
        const KeyRange first = mask.seen_by(s, first_token), last = mask.seen_by(s, last_token);
        some = {first.low, last.high};
        every = {last.low, first.high};
    }

    /* Whether these keys must be looked at one by one. */
    bool cuts(int64_t first, int64_t count) const {
        return every.high < first + count || (WINDOW && first < every.low);
    }
};

/* Addresses of the rows of tokens [first, first + count). Those before `seen` are seen by nobody and need not be there:
 * `seen`, the first token that somebody sees, stands in for them. */
AITER_INLINE void find_seen(const KeyRows &rows, int64_t first, int count, int64_t seen, const Cached **keys,
                            const Cached **values) {
    const int skipped = WINDOW ? static_cast<int>(clamp(seen - first, 0, count)) : 0;
    for (int i = 0; i < skipped; i++) {
        if (i == 0) rows.find(seen, 1, keys, values);
        keys[i] = keys[0];
        values[i] = values[0];
    }
    rows.find(first + skipped, count - skipped, keys + skipped, values + skipped);
}

/* Per lane: whether a key is in the range. */
template <class Key, class Bound> AITER_INLINE IntVec in_range(Key key, Bound low, Bound high) {
#if AITER_WINDOW
    return (key < high) & (key >= low);
#else
    (void)low;
    return key < high;
#endif
}

#endif
