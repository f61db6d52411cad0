// e^x over the vectors of one instruction set. A file includes this inside its own unnamed namespace, after these.

// e^x with a relative error below 2e-7 (Cephes' polynomial); 0 below -87.3, where the result would be denormal. At most
// 88 goes in. NaN stays.
inline Vec exponential(Vec x) {
    const Vec y = greatest(set(-87.3f), x);
    const Vec n = rounded(y * set(1.44269504088896341f));
    const Vec r = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), y));
    Vec p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, r * r, r + set(1.0f));
    return zero_below(x, set(-87.3f), p * power_of_two(n));
}
