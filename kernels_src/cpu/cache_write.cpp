/* Writes new keys and values to their places in a cache, on their way rotated or made 8-bit floats where that is asked
 * for; and rotates the queries that come with them. See aiter_cache_write_problem.
 *
 *   token of key   [head 0 | head 1 | ...]  -->  page 7, position 3   of key_cache
 *   token of value [head 0 | head 1 | ...]  -->  page 7, position 3   of value_cache
 *   token of query [head 0 | head 1 | ...]  -->  the same token       of rotated
 *
 * Threads take tokens from a shared counter. A row that stays as it is, is copied; else it goes through floats. All
 * places are looked at before anything is written. Built for one dtype and one kind of cache, any sizes. */
#define AITER_CACHE_WRITE
#include "cache_rows.h"
#include "launch_errors.h"
#include "parallel.h"
#include "simd.h"
#include "starts.h"

constexpr int MAX_DIM = 1024;
constexpr int64_t UNITS_AT_ONCE = 16;
constexpr double SERIAL_ELEMENTS = 65536.0; /* fewer are written before a second thread is awake */
#if AITER_FP8_CACHE
typedef Fp8 CacheElement;
#else
typedef Element CacheElement;
#endif

struct Write {
    const aiter_cache_write_call &call;
    const int64_t units;
    int64_t next = 0; /* taken atomically */

    explicit Write(const aiter_cache_write_call &c) : call(c), units(cache_write_units(c)) {}

    bool fits() const {
        const aiter_cache_write_problem &p = call.problem;
        if (!starts_fit(call.tensors.starts_new, nullptr, p.batch, p.total_new, p.total_new) ||
            (p.heads_q > 0 && !starts_fit(call.tensors.starts_q, nullptr, p.batch, p.total_q, p.total_q)))
            return false;
        for (int64_t unit = 0; unit < units - new_units(call); unit++) /* values go where their keys do */
            if (cache_token(call, unit).fate == TOKEN_HAS_NO_PLACE) return false;
        return true;
    }

    void operator()() {
        for (int64_t first; (first = __atomic_fetch_add(&next, UNITS_AT_ONCE, __ATOMIC_RELAXED)) < units;)
            for (int64_t unit = first; unit < units && unit < first + UNITS_AT_ONCE; unit++) {
                const CacheToken token = cache_token(call, unit);
                if (token.fate != TOKEN_IS_WRITTEN) continue;
                if (AITER_FP8_CACHE && token.which != 0) convert<CacheElement>(token);
                else if (token.rotary_dim > 0) convert<Element>(token);
                else copy(token);
            }
    }

  private:
    static void copy(const CacheToken &token) {
        const Element *from = static_cast<const Element *>(token.from) + token.from_at;
        Element *to = static_cast<Element *>(token.to) + token.to_at;
        for (int32_t head = 0; head < token.heads; head++, from += token.from_head, to += token.to_head) {
            if (token.from_element == 1 && token.to_element == 1) memcpy(to, from, token.dim * sizeof(Element));
            else
                for (int32_t d = 0; d < token.dim; d++) to[d * token.to_element] = from[d * token.from_element];
        }
    }

    template <class Target> void convert(const CacheToken &token) const {
        float angles[2][MAX_DIM / 2];
        if (token.rotary_dim > 0) {
            const aiter_cache_write_problem &p = call.problem;
            read(angles[0], static_cast<const Element *>(call.tensors.rotary_cos) + token.angles * p.cos_stride, 1,
                 token.rotary_dim / 2);
            read(angles[1], static_cast<const Element *>(call.tensors.rotary_sin) + token.angles * p.sin_stride, 1,
                 token.rotary_dim / 2);
        }
        const Element *from = static_cast<const Element *>(token.from) + token.from_at;
        Target *to = static_cast<Target *>(token.to) + token.to_at;
        for (int32_t head = 0; head < token.heads; head++, from += token.from_head, to += token.to_head) {
            float row[MAX_DIM];
            read(row, from, token.from_element, token.dim);
            if (token.rotary_dim > 0) rotate(row, angles[0], angles[1], token.rotary_dim / 2);
            write(to, token.to_element, row, token.dim, token.scale ? token.scale[head * token.scale_stride] : 1.0f);
        }
    }

    static void read(float *row, const Element *from, int64_t step, int32_t count) {
        Element gathered[MAX_DIM];
        if (step != 1) {
            for (int32_t d = 0; d < count; d++) gathered[d] = from[d * step];
            from = gathered;
        }
        for (int32_t d = 0; d < count; d += LANES) {
            const Vec values = to_floats(from + d, count - d);
            memcpy(row + d, &values, minimum(LANES, count - d) * sizeof(float));
        }
    }

    void rotate(float *row, const float *cosines, const float *sines, int32_t pairs) const {
        const bool interleaved = call.problem.interleaved;
        const int32_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
        for (int32_t d = 0; d < pairs; d++) {
            const float x = row[d * step], y = row[d * step + apart];
            row[d * step] = x * cosines[d] - y * sines[d];
            row[d * step + apart] = y * cosines[d] + x * sines[d];
        }
    }

    static void write(Element *to, int64_t step, const float *row, int32_t count, float) {
        Element scattered[MAX_DIM];
        Element *target = step == 1 ? to : scattered;
        for (int32_t d = 0; d < count; d += LANES) {
            Vec values = {};
            memcpy(&values, row + d, minimum(LANES, count - d) * sizeof(float));
            store_elements(target + d, values, count - d);
        }
        if (step != 1)
            for (int32_t d = 0; d < count; d++) to[d * step] = scattered[d];
    }

#if AITER_FP8_CACHE
    static void write(Fp8 *to, int64_t step, const float *row, int32_t count, float scale) {
        for (int32_t d = 0; d < count; d++) to[d * step] = to_fp8(row[d] / scale);
    }
#endif

    static int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }
};

AITER_EXPORT void aiter_describe(aiter_description *description) {
    description->abi_version = AITER_ABI_VERSION;
    description->call_bytes = sizeof(aiter_call);
}

AITER_EXPORT int64_t aiter_workspace_bytes(const aiter_call *) { return 0; }

AITER_EXPORT int aiter_launch(const aiter_call *call, void *executor) {
    const aiter_cpu_executor *cpu = static_cast<const aiter_cpu_executor *>(executor);
    const aiter_cache_write_problem &p = call->problem;
    Write write(*call);
    if (!write.fits()) return BAD_VALUES;
    const double elements = static_cast<double>(query_units(*call)) * p.heads_q * p.head_dim +
                            static_cast<double>(new_units(*call)) * p.heads_kv * (p.head_dim + p.value_dim);
    run_parallel(cpu, elements < SERIAL_ELEMENTS ? 1 : cpu->num_threads, write);
    return OK;
}
