// Convolution as a matrix product whose left operand is never stored.
//
//   y[m, n] = Σ_k left[m, k] · right[k, n]
//
//   forward          m = output pixel   k = (p, q, c) of the patch   n = filter f
//   input gradient   m = input pixel    k = (p, q, f), on dy         n = channel c
//   filter gradient  m = (p, q, c)      k = output pixel             n = filter f
//
// The input gradient is the forward product with other arguments: the image is dy, its pixels
// `dilate` = stride apart, and the filters are turned round. The filter gradient
// (FILTER = 1) transposes the left operand. The left operand is gathered from an NHWC image on the
// way to shared memory, `right` is a plain matrix with k as its row: w (KH*KW*C, F), or dy.
//
// A block makes BM×BN numbers of y. It walks along k in tiles of BK, STAGES - 1 of them in flight
// (copy_async). blockIdx: x = row tile, y = column tile, z = part of k; with several parts each
// writes its own sums, and `reduce` adds them in a fixed order. So all bits are the same every run.
//
// Constants that gpu.py injects: BM, BN, STAGES, VEC (4: sixteen-byte loads, channels and columns
// must be multiples of 4; 1: any size), FILTER, INNER (0: fmaf; 1: TF32; 3: three TF32 products).

#define BK 32
#if FILTER
#define A_PITCH (BM + 8)                    // a[k][m]; 8: the four k of a fragment differ in bank
#define A_SIZE (BK * A_PITCH)
#define A_AT(m, k) a[(k) * A_PITCH + (m)]
#else
#define A_PITCH (BK + 4)                    // a[m][k]; 4: its eight rows differ in bank
#define A_SIZE (BM * A_PITCH)
#define A_AT(m, k) a[(m) * A_PITCH + (k)]
#endif
#define B_PITCH (BN + 8)                    // b[k][n]
#define B_SIZE (BK * B_PITCH)
#define B_AT(k, n) b[(k) * B_PITCH + (n)]

#if INNER
#define THREADS 128                         // 2×2 warps, each 64 × BN/2
#define ROW_TILES (BM / 32)                 // mma tiles of 16×8 in a warp's part
#define COL_TILES (BN / 16)
#else
#define THREADS 256                         // 16×16 threads, each BM/16 × BN/16
#define ROWS_EACH (BM / 16)
#define QUADS_EACH (BN / 64)
#endif

// n / d for 0 <= n < 2^31 as a product: gpu.py works out mul and shift for each d.
struct Divisor {
    unsigned d, mul, shift;

    __device__ int divide(int n, int& rest) const
    {
        const int quotient = (__umulhi(n, mul) + n) >> shift;
        rest = n - quotient * d;
        return quotient;
    }
};

// The shapes of a product, packed by gpu.py field by field: the image x (pixels, C) that the left
// operand is gathered from, the grid of its patches, and the matrix y (rows, cols).
struct Geometry {
    int h, w;                               // of the image
    int stride, pad, dilate, pixels;        // pixels: of the grid, of all images
    Divisor c, kw, oh, ow;
    int rows, cols, depth, part;            // part: numbers of k that a block adds
    int pitch, relu;                        // pitch: numbers from a row of y to the next

    // pixel m of the grid -> image n (as its first pixel) and the corner of its patch
    __device__ void pixel(int m, int& first, int& i, int& j) const
    {
        int oi, oj;
        const int n = oh.divide(ow.divide(m, oj), oi);
        first = n * h * w;
        i = m < pixels ? oi * stride - pad : -(1 << 28);    // outside, wherever the tap is
        j = oj * stride - pad;
    }

    // k -> tap (p, q) and channel
    __device__ void tap(int k, int& p, int& q, int& channel) const
    {
        p = kw.divide(c.divide(k, channel), q);
    }

    // where in x pixel (i, j) and a channel are; false where there is a zero instead
    __device__ bool find(int first, int i, int j, int channel, int& at) const
    {
        bool inside = true;
        if (dilate > 1) {
            inside = i % dilate == 0 && j % dilate == 0;    // a negative one fails below
            i = i < 0 ? i : i / dilate;
            j = j < 0 ? j : j / dilate;
        }
        inside = inside && unsigned(i) < unsigned(h) && unsigned(j) < unsigned(w);
        at = inside ? (first + i * w + j) * c.d + channel : 0;
        return inside;
    }
};
static_assert(sizeof(Geometry) == GEOMETRY_BYTES, "gpu.GEOMETRY has the same fields");

// Where a result goes, and what is done to it on the way.
struct Result {
    float* y;
    const float* bias;                      // (cols,) or null
    const Geometry& shape;

    __device__ float finish(int col, float v) const
    {
        if (bias) v += bias[col];
        return shape.relu && v < 0 ? 0 : v;                 // a NaN stays
    }

    // two neighbours in a row
    __device__ void store(int row, int col, float v0, float v1) const
    {
        if (row >= shape.rows || col >= shape.cols) return;
        float* at = y + static_cast<long long>(row) * shape.pitch + col;
        v0 = finish(col, v0);
        if (col + 1 < shape.cols) v1 = finish(col + 1, v1);
#if VEC == 4
        *reinterpret_cast<float2*>(at) = make_float2(v0, v1);
#else
        at[0] = v0;
        if (col + 1 < shape.cols) at[1] = v1;
#endif
    }
};

#if FILTER
// Tile of the left operand, transposed: a thread's rows (p, q, c) stay, the pixels move on.
struct Left {
    static const int GROUPS = BM / VEC, STEP = THREADS / GROUPS;
    int p, q, channel;
    bool there;

    __device__ Left(const Geometry& shape, int row0)
    {
        const int row = row0 + threadIdx.x % GROUPS * VEC;
        there = row < shape.rows;
        shape.tap(row, p, q, channel);
    }

    // All lanes of a warp copy from the same pixel at a time. Each lane finds out where one of the
    // tile's pixels is (BK = 32), and the others ask it: the divisions would cost more.
    __device__ void load(float* a, const float* x, const Geometry& shape, int k0, int end) const
    {
        const int m = threadIdx.x % GROUPS * VEC;
        int my_first, my_i, my_j;
        shape.pixel(k0 + threadIdx.x % 32, my_first, my_i, my_j);
#pragma unroll (BK / STEP < 16 ? BK / STEP : 4)               // 32 copies help nobody
        for (int k = threadIdx.x / GROUPS; k < BK; k += STEP) {
            const int first = __shfl_sync(0xffffffffu, my_first, k);
            const int i = __shfl_sync(0xffffffffu, my_i, k);
            const int j = __shfl_sync(0xffffffffu, my_j, k);
            int at;
            const bool valid = shape.find(first, i + p, j + q, channel, at);
            copy_async<4 * VEC>(&A_AT(m, k), x + at, valid && there && k0 + k < end);
        }
    }
};
#else
// Tile of the left operand: a thread's pixels stay, the taps and channels move on.
struct Left {
    static const int GROUPS = BK / VEC, STEP = THREADS / GROUPS, COUNT = BM / STEP;
    int first[COUNT], i[COUNT], j[COUNT];

    __device__ Left(const Geometry& shape, int row0)
    {
#pragma unroll
        for (int r = 0; r < COUNT; r++)
            shape.pixel(row0 + threadIdx.x / GROUPS + r * STEP, first[r], i[r], j[r]);
    }

    __device__ void load(float* a, const float* x, const Geometry& shape, int k0, int end) const
    {
        const int k = threadIdx.x % GROUPS * VEC;
        int p, q, channel;
        shape.tap(k0 + k, p, q, channel);
#pragma unroll
        for (int r = 0; r < COUNT; r++) {
            int at;
            const bool valid = shape.find(first[r], i[r] + p, j[r] + q, channel, at);
            copy_async<4 * VEC>(&A_AT(threadIdx.x / GROUPS + r * STEP, k), x + at,
                                valid && k0 + k < end);
        }
    }
};
#endif

// Tile of the right operand: rows k0 … k0+BK, columns col0 … col0+BN.
__device__ void load_right(float* b, const float* right, int k0, int end, int col0, int cols)
{
    const int groups = BN / VEC, n = threadIdx.x % groups * VEC;
#pragma unroll
    for (int k = threadIdx.x / groups; k < BK; k += THREADS / groups) {
        const bool valid = k0 + k < end && col0 + n < cols;
        const long long at = static_cast<long long>(k0 + k) * cols + col0 + n;
        copy_async<4 * VEC>(&B_AT(k, n), right + (valid ? at : 0), valid);
    }
}

#if INNER == 0
// Plain multiply-adds: thread (ty, tx) makes rows ty + 16 i and columns 4 tx + 64 j … + 3.
struct Product {
    float y[ROWS_EACH][QUADS_EACH][4] = {};

    static __device__ int ty() { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8; }
    static __device__ int tx() { return threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8; }

    __device__ void add(const float* a, const float* b)
    {
#pragma unroll 4
        for (int k = 0; k < BK; k++) {
            float left[ROWS_EACH];
#pragma unroll
            for (int i = 0; i < ROWS_EACH; i++) left[i] = A_AT(ty() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < QUADS_EACH; j++) {
                const float4 right =
                    *reinterpret_cast<const float4*>(&B_AT(k, 4 * tx() + 64 * j));
#pragma unroll
                for (int i = 0; i < ROWS_EACH; i++) {
                    y[i][j][0] = fmaf(left[i], right.x, y[i][j][0]);
                    y[i][j][1] = fmaf(left[i], right.y, y[i][j][1]);
                    y[i][j][2] = fmaf(left[i], right.z, y[i][j][2]);
                    y[i][j][3] = fmaf(left[i], right.w, y[i][j][3]);
                }
            }
        }
    }

    __device__ void store(const Result& to, int row0, int col0) const
    {
#pragma unroll
        for (int i = 0; i < ROWS_EACH; i++)
#pragma unroll
            for (int j = 0; j < QUADS_EACH; j++) {
                const int row = row0 + ty() + 16 * i, col = col0 + 4 * tx() + 64 * j;
                to.store(row, col, y[i][j][0], y[i][j][1]);
                to.store(row, col + 2, y[i][j][2], y[i][j][3]);
            }
    }
};
#else
// Tensor cores: each warp makes ROW_TILES × COL_TILES products of 16×8, eight k at a time.
struct Product {
    float y[ROW_TILES][COL_TILES][4] = {};

    static __device__ int row() { return threadIdx.x / 64 * (BM / 2) + threadIdx.x % 32 / 4; }
    static __device__ int col() { return threadIdx.x / 32 % 2 * (BN / 2); }

    // x = hi + lo, both TF32: together they hold 21 bits of the 24 of a float
    static __device__ void split(float x, unsigned& hi, unsigned& lo)
    {
        hi = to_tf32(x);
#if INNER == 3
        lo = to_tf32(x - __uint_as_float(hi));
#endif
    }

    __device__ void add(const float* a, const float* b)
    {
        const int t = threadIdx.x % 4, g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int k = 0; k < BK; k += 8) {
            unsigned hi[ROW_TILES][4], lo[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    split(A_AT(row() + 16 * i + n % 2 * 8, k + t + n / 2 * 4), hi[i][n], lo[i][n]);
#pragma unroll
            for (int j = 0; j < COL_TILES; j++) {
                unsigned right[2], rest[2];
#pragma unroll
                for (int n = 0; n < 2; n++)
                    split(B_AT(k + t + 4 * n, col() + 8 * j + g), right[n], rest[n]);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
#if INNER == 3
                    mma_tf32(y[i][j], lo[i], right);            // small terms first
                    mma_tf32(y[i][j], hi[i], rest);
#endif
                    mma_tf32(y[i][j], hi[i], right);
                }
            }
        }
    }

    __device__ void store(const Result& to, int row0, int col0) const
    {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int j = 0; j < COL_TILES; j++) {
                const int r = row0 + row() + 16 * i, c = col0 + col() + 8 * j + 2 * t;
                to.store(r, c, y[i][j][0], y[i][j][1]);
                to.store(r + 8, c, y[i][j][2], y[i][j][3]);
            }
    }
};
#endif

// Called by gpu.conv_forward, conv_backward_input and conv_backward_filter.
extern "C" __global__ void __launch_bounds__(THREADS, VEC == 4 ? 2 : 1)
conv(const float* x, const float* right, float* y, const float* bias, const Geometry shape)
{
    const long long own = static_cast<long long>(blockIdx.z) * shape.rows * shape.pitch;
    const Result result = {y + own, bias, shape};
    const int row0 = blockIdx.x * BM, col0 = blockIdx.y * BN;
    const int begin = blockIdx.z * shape.part, end = min(shape.depth, begin + shape.part);
    const int tiles = (end - begin + BK - 1) / BK;

    float* shared = shared_memory();                        // STAGES × (A_SIZE + B_SIZE)
    const Left left(shape, row0);
    Product product;

    const auto load = [&](int tile) {
        if (tile < tiles) {
            float* a = shared + tile % STAGES * (A_SIZE + B_SIZE);
            left.load(a, x, shape, begin + tile * BK, end);
            load_right(a + A_SIZE, right, begin + tile * BK, end, col0, shape.cols);
        }
        copy_commit();                                      // a group each, for copy_wait counts
    };
#pragma unroll
    for (int tile = 0; tile < STAGES - 1; tile++) load(tile);
    for (int tile = 0; tile < tiles; tile++) {
        copy_wait<STAGES - 2>();                            // this tile has landed, for me
        __syncthreads();                                    // … for all; and all left the last one
        load(tile + STAGES - 1);                            // into the memory of the last one
        const float* a = shared + tile % STAGES * (A_SIZE + B_SIZE);
        product.add(a, a + A_SIZE);
    }
    product.store(result, row0, col0);
}
