/* No kernel: fails to compile where a tile of some head_dim would not fit into the shared memory that a block of the arch
 * can have, or would not consist of whole copies and matrices. All head_dims that are served, in one translation unit. */
#define AITER_HEAD_DIM 64
#define AITER_CAUSAL 1
#define AITER_DTYPE_BF16 1
#include <type_traits>

#include "gpu/backward_loop.h"
#include "gpu/decode_schedule.h"
#include "gpu/tile_loop.h"
#if defined(AITER_WGMMA)
#include "gpu/arch/sm90_backward.h"
#include "gpu/arch/sm90_forward.h"
#elif defined(AITER_GFX9)
#include "gpu/arch/gfx9_paired_forward.h"
#endif

namespace aiter {

template <int BYTES> constexpr bool fits() {
    static_assert(BYTES <= SHARED_LIMIT, "more shared memory than a block of this arch can have");
    return BYTES <= SHARED_LIMIT;
}

template <int HEAD_DIM, int VALUE_DIM> constexpr bool forward_fits() {
#if defined(AITER_WGMMA)
    if constexpr (HEAD_DIM <= 256 && VALUE_DIM <= 256) return fits<WarpgroupLoop<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>();
#endif
#if defined(AITER_GFX9)
    return fits<TileLoop<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>() && fits<LoopOf<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>();
#else
    return fits<TileLoop<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>();
#endif
}
template <int HEAD_DIM, int VALUE_DIM> constexpr bool decode_fits() {
#if defined(AITER_WGMMA)
    if constexpr (HEAD_DIM <= 256 && VALUE_DIM <= 256) return fits<RingLoop<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>();
#endif
    return fits<DecodeMemory<HEAD_DIM, VALUE_DIM>::SHARED_BYTES>();
}
#if defined(AITER_WGMMA)
template <int D, int V, int PASS>
using Tiles = std::conditional_t<D <= 256 && V <= 256, BackwardWarpgroupTiles<D, V, PASS>, Backward<D, V, PASS>>;
#else
template <int HEAD_DIM, int VALUE_DIM, int PASS> using Tiles = Backward<HEAD_DIM, VALUE_DIM, PASS>;
#endif
template <int D, int V> constexpr bool backward_fits() {
    if constexpr (Tiles<D, V, GRAD_KEY_VALUE>::BOTH_IN_ONE_PASS)
        return fits<Tiles<D, V, GRAD_QUERY>::SHARED_BYTES>() && fits<Tiles<D, V, GRAD_KEY_VALUE>::SHARED_BYTES>();
    else
        return fits<Tiles<D, V, GRAD_QUERY>::SHARED_BYTES>() && fits<Tiles<D, V, GRAD_KEY>::SHARED_BYTES>() &&
               fits<Tiles<D, V, GRAD_VALUE>::SHARED_BYTES>();
}
template <int HEAD_DIM, int VALUE_DIM> constexpr bool all_fit() {
    return forward_fits<HEAD_DIM, VALUE_DIM>() && decode_fits<HEAD_DIM, VALUE_DIM>() &&
           backward_fits<HEAD_DIM, VALUE_DIM>();
}

/* Equal dims, and every head_dim with some others for the values. */
template <int HEAD_DIM> constexpr bool every_head_dim() {
    bool fit = all_fit<HEAD_DIM, HEAD_DIM>() && all_fit<HEAD_DIM, 8>() && all_fit<HEAD_DIM, 128>() &&
               all_fit<HEAD_DIM, 264>() && all_fit<HEAD_DIM, 512>();
    if constexpr (HEAD_DIM > 8) fit = fit && every_head_dim<HEAD_DIM - 8>();
    return fit;
}
static_assert(every_head_dim<512>(), "");

/* Latent attention; for many rows, its tiles do not fit into 64 KB of LDS. */
static_assert(decode_fits<576, 512>(), "");
#if !defined(AITER_GFX90A) && !defined(AITER_GFX942)
static_assert(forward_fits<576, 512>(), "");
#endif

} // namespace aiter
