/* Holds gpu/divisor.h against the processor's division: every divisor up to 3000, powers of two and their neighbours,
 * the greatest ones, and drawn ones; dividends around drawn multiples, around 0 and the greatest. A line and exit
 * status 1 for the first that differs. */
#include <stdint.h>
#include <stdio.h>

#define __host__
#define __device__
#define __forceinline__ inline
#include "gpu/divisor.h"

static uint64_t state = 1;
static int64_t drawn() { /* of 31 bits */
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>(state >> 33);
}
static bool right(int64_t by) {
    constexpr int64_t MOST = 0x7fffffff;
    if (by < 1 || by > MOST) return true;
    const aiter::Divisor divisor(by);
    for (int i = 0; i < 400; ++i) {
        const int64_t start = i == 0 ? 0 : i == 1 ? MOST : i == 2 ? MOST / by * by : drawn() / by * by;
        for (int64_t n = start - 2; n <= start + 2; ++n)
            if (n >= 0 && n <= MOST && divisor.quotient(static_cast<int>(n)) != n / by) {
                printf("%lld / %lld is not %d\n", static_cast<long long>(n), static_cast<long long>(by),
                       divisor.quotient(static_cast<int>(n)));
                return false;
            }
    }
    return true;
}
int main() {
    for (int64_t by = 1; by <= 3000; ++by)
        if (!right(by)) return 1;
    for (int bit = 0; bit < 32; ++bit)
        for (int64_t by = (int64_t(1) << bit) - 3; by <= (int64_t(1) << bit) + 3; ++by)
            if (!right(by)) return 1;
    for (int i = 0; i < 20000; ++i)
        if (!right((drawn() >> drawn() % 31) + 1)) return 1;
    return 0;
}
