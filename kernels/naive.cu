// Convolution as its formula says it: a thread for each number of the result. Read this before
// conv.cu, which computes the same in tiles. Only tests and dev/bench.py launch it.
//
//   y[n,i,j,f]  = b[f] + Σ_{p,q,c} x[n, i·stride+p-pad, j·stride+q-pad, c] · w[p,q,c,f]
//   dx[n,i,j,c] = Σ dy[n,i',j',f] · w[p,q,c,f] over i'·stride+p-pad = i, j'·stride+q-pad = j, and f
//   dw[p,q,c,f] = Σ_{n,i,j} x[n, i·stride+p-pad, j·stride+q-pad, c] · dy[n,i,j,f]
//
// x (N, H, W, C), w (KH, KW, C, F), y (N, OH, OW, F). Neighbouring threads make neighbouring
// numbers of the result, so they write, and mostly read, neighbouring memory. Called by
// gpu.naive_*.

struct Shape {
    int n, h, w, c;                     // of x
    int kh, kw, f;                      // of the filters
    int oh, ow;                         // of y
    int stride, pad;

    // where x[n, i, j, channel] is, and so on
    __device__ int x(int n, int i, int j, int channel) const
    {
        return ((n * h + i) * w + j) * c + channel;
    }
    __device__ int y(int n, int i, int j, int filter) const
    {
        return ((n * oh + i) * ow + j) * f + filter;
    }
    __device__ int filter(int p, int q, int channel, int filter) const
    {
        return ((p * kw + q) * c + channel) * f + filter;
    }
    __device__ bool inside(int i, int j) const { return 0 <= i && i < h && 0 <= j && j < w; }
};
static_assert(sizeof(Shape) == SHAPE_BYTES, "gpu.SHAPE has the same fields");

extern "C" __global__ void
naive_forward(const float* x, const float* w, const float* b, float* y, const Shape s)
{
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= s.n * s.oh * s.ow * s.f) return;
    const int f = index % s.f, j = index / s.f % s.ow, i = index / s.f / s.ow % s.oh;
    const int n = index / s.f / s.ow / s.oh;
    float sum = b[f];
    for (int p = 0; p < s.kh; p++)
        for (int q = 0; q < s.kw; q++) {
            const int row = i * s.stride + p - s.pad, col = j * s.stride + q - s.pad;
            if (!s.inside(row, col)) continue;              // zeros around the image
            for (int c = 0; c < s.c; c++)
                sum += x[s.x(n, row, col, c)] * w[s.filter(p, q, c, f)];
        }
    y[index] = sum;
}

extern "C" __global__ void
naive_backward_input(const float* dy, const float* w, float* dx, const Shape s)
{
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= s.n * s.h * s.w * s.c) return;
    const int c = index % s.c, j = index / s.c % s.w, i = index / s.c / s.w % s.h;
    const int n = index / s.c / s.w / s.h;
    float sum = 0;
    for (int p = 0; p < s.kh; p++)
        for (int q = 0; q < s.kw; q++) {
            const int row = i + s.pad - p, col = j + s.pad - q;     // i'·stride, j'·stride
            if (row % s.stride || col % s.stride) continue;
            const int oi = row / s.stride, oj = col / s.stride;
            if (oi < 0 || oi >= s.oh || oj < 0 || oj >= s.ow) continue;
            for (int f = 0; f < s.f; f++)
                sum += dy[s.y(n, oi, oj, f)] * w[s.filter(p, q, c, f)];
        }
    dx[index] = sum;
}

extern "C" __global__ void
naive_backward_filter(const float* x, const float* dy, float* dw, const Shape s)
{
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= s.kh * s.kw * s.c * s.f) return;
    const int f = index % s.f, c = index / s.f % s.c, q = index / s.f / s.c % s.kw;
    const int p = index / s.f / s.c / s.kw;
    float sum = 0;
    for (int n = 0; n < s.n; n++)
        for (int i = 0; i < s.oh; i++)
            for (int j = 0; j < s.ow; j++) {
                const int row = i * s.stride + p - s.pad, col = j * s.stride + q - s.pad;
                if (s.inside(row, col)) sum += x[s.x(n, row, col, c)] * dy[s.y(n, i, j, f)];
            }
    dw[index] = sum;
}
