/* Numbers of half precision as uint16_t. */

#include <stdint.h>

enum { NOT_A_NUMBER = 0x7e00, LARGEST = 0x7bff, SIGN = 0x8000 };

static inline float half_to_float(uint16_t half)
{
    union {
        uint32_t bits;
        float number;
    } u = {.bits = (uint32_t)(half & 0x7fff) << 13};
    if (u.bits >= 0x7c00u << 13)
        u.bits |= 0x7f800000u; /* infinite, or not a number */
    else
        u.number *= 0x1p112f; /* moves the exponent, and is right for subnormal numbers too */
    u.bits |= (uint32_t)(half & SIGN) << 16;
    return u.number;
}

/* The nearest half that is not below (``up``) or not above the number; what is out of range becomes the largest. */
static uint16_t float_to_half(float number, int up)
{
    union {
        float number;
        uint32_t bits;
    } u = {.number = number};
    int negative = u.bits >> 31;
    u.bits &= 0x7fffffff;
    if (!(u.number < 65504.0f))
        return (uint16_t)(LARGEST | (negative ? SIGN : 0));
    float magnitude = u.number;
    u.number *= 0x1p-112f;
    uint16_t half = (uint16_t)(u.bits >> 13); /* towards zero */
    if (half_to_float(half) > magnitude)
        half--; /* where halves are subnormal the product is, too, and was rounded */
    if (half_to_float(half) < magnitude && up != negative)
        half++;
    return (uint16_t)(half | (negative ? SIGN : 0));
}
