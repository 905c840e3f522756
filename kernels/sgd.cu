// Stochastic gradient descent with momentum and weight decay, in one pass:
//
//   v ← momentum·v + dw + decay·w;   w ← w - rate·v
//
// A thread moves one number. With `rows`, none twice, row r of dw (R, E) moves row rows[r] of w and
// v (K, E); with null the arrays have the same shape. Called by gpu.sgd.
extern "C" __global__ void
sgd(float* w, float* v, const float* dw, const int* rows, unsigned total, unsigned e, float rate,
    float momentum, float decay)
{
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;      // in dw
    if (at >= total) return;
    const long long to = rows ? static_cast<long long>(rows[at / e]) * e + at % e : at;
    v[to] = momentum * v[to] + dw[at] + decay * w[to];
    w[to] -= rate * v[to];
}
