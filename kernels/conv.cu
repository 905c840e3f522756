// Convolution as a matrix product whose left operand is never stored.
//
//   y[m, n] = Σ_k left[m, k] · right[k, n]
//
//   forward          m = output pixel   k = (p, q, c) of the patch   n = filter f
//   input gradient   m = input pixel    k = (p, q, f), on dy         n = channel c
//   filter gradient  m = (p, q, c)      k = output pixel             n = filter f
//
// The input gradient is the forward product on dy, its pixels DILATE = stride apart, with turned
// filters. The filter gradient (FILTER = 1) transposes the left operand, which is gathered from an
// NHWC image on the way to shared memory; `right` is a matrix with k as its row: filters, or dy.
//
// naive.cu has the same three operations with a thread for each number: read that first.
//
// A block makes BM×BN numbers of y. It walks along k in tiles of BK, STAGES - 1 of them in flight
// (copy_async). blockIdx: x = row tile, y = column tile, z = part of k; with several parts each
// writes its own sums, and add_parts adds them in a fixed order, so that every run gives the same
// bits.
//
// Constants that gpu.py injects: BM, BN, BK, STAGES, THREADS, STAGE_BYTES, VEC (4: sixteen-byte
// loads, channels and columns must be multiples of 4; 1: any size), FILTER, DILATE, INNER (0: fmaf;
// 1: TF32; 3: three TF32 products). Tensor cores read TF32, so each fragment is rounded when it is
// loaded.

// a[k][m] or a[m][k], its pitch such that the k, or rows, of a fragment differ in bank
#define A_PITCH (FILTER ? BM + 8 : BK + 4)
#define A_SIZE ((FILTER ? BK : BM) * A_PITCH)
#define A_AT(m, k) a[FILTER ? (k) * A_PITCH + (m) : (m) * A_PITCH + (k)]
#define B_PITCH (BN + 8)                    // b[place of k][n]: see Product
#define B_SIZE (BK * B_PITCH)
#define B_PLACE(k) (INNER && !FILTER ? (k) / 8 * 8 + (k) % 2 * 4 + (k) % 8 / 2 : (k))
#define B_AT(k, n) b[B_PLACE(k) * B_PITCH + (n)]
static_assert(4 * (A_SIZE + B_SIZE) == STAGE_BYTES, "gpu.stage_bytes is the pitches above");

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
    static const int OUTSIDE = 1 << 28;     // rows above or below the image
    int h, w;                               // of the image
    int stride, top, left;                  // top, left: of the zero border
    int pixels;                             // of the grid, of all images
    Divisor c, kw, oh, ow;
    int rows, cols, depth, part;            // part: numbers of k that a block adds

    // pixel m of the grid -> the corner of its patch, and where in x that is (with dilation, where
    // its image is); outside from pixel `end` on
    __device__ void pixel(int m, int end, int& i, int& j, int& corner) const
    {
        int oi, oj;
        const int n = oh.divide(ow.divide(m, oj), oi);
        i = oi * stride - top;
        j = oj * stride - left;
        corner = (DILATE == 1 ? (n * h + i) * w + j : n * h * w) * int(c.d);
        if (m >= end) i = -OUTSIDE;
    }

    // k -> tap (p, q), outside if not `valid`, and how much further in x tap and channel are
    __device__ void tap(int k, bool valid, int& p, int& q, int& further) const
    {
        int channel;
        p = kw.divide(c.divide(k, channel), q);
        further = (DILATE == 1 ? (p * w + q) * int(c.d) : 0) + channel;
        if (!valid) p = 2 * OUTSIDE;
    }

    // x[at] of pixel (i, j), zeros outside the image; if dilated, `at` is its corner and channel
    __device__ void copy(float* to, const float* x, int i, int j, int at) const
    {
        if (DILATE > 1) at += (i / DILATE * w + j / DILATE) * int(c.d);
        const bool valid = i % DILATE == 0 && j % DILATE == 0 && unsigned(i) < unsigned(h * DILATE)
                           && unsigned(j) < unsigned(w * DILATE);
        copy_async<4 * VEC>(to, x + at, valid);
    }

    // two neighbours in a row of y, plus bias (cols,) if it is not null, then with `relu` max(y, 0)
    __device__ void store(float* y, const float* bias, bool relu, int row, int col, float v0,
                          float v1) const
    {
        float v[] = {v0, v1};
        float* at = y + static_cast<long long>(row) * cols + col;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (row >= rows || col + n >= cols) return;
            if (bias) v[n] += bias[col + n];
            if (relu && v[n] < 0) v[n] = 0;                         // a NaN stays
            if (VEC == 1) at[n] = v[n];
        }
        if (VEC == 4) *reinterpret_cast<float2*>(at) = make_float2(v[0], v[1]);
    }
};
static_assert(sizeof(Geometry) == GEOMETRY_BYTES, "gpu.GEOMETRY has the same fields");

#if FILTER
// Tile of the left operand, transposed: a thread's rows (p, q, c) stay, the pixels move on.
struct Left {
    static const int GROUPS = BM / VEC, STEP = THREADS / GROUPS;
    int p, q, further;

    __device__ Left(const Geometry& shape, int row0)
    {
        const int row = row0 + threadIdx.x % GROUPS * VEC;
        shape.tap(row, row < shape.rows, p, q, further);
    }

    // All lanes of a warp copy from the same pixel at a time. Each lane finds out where one of the
    // tile's pixels is (BK = 32), and the others ask it: the divisions would cost more.
    __device__ void load(float* a, const float* x, const Geometry& shape, int k0, int end) const
    {
        int my_i, my_j, my_corner;
        shape.pixel(k0 + threadIdx.x % 32, end, my_i, my_j, my_corner);
        float* to = &A_AT(threadIdx.x % GROUPS * VEC, threadIdx.x / GROUPS);
#pragma unroll (BK / STEP < 16 ? BK / STEP : 4)               // unrolling all 32 did not help
        for (int r = 0; r < BK / STEP; r++) {
            const int k = threadIdx.x / GROUPS + r * STEP;
            const int i = __shfl_sync(0xffffffffu, my_i, k);
            const int j = __shfl_sync(0xffffffffu, my_j, k);
            const int corner = __shfl_sync(0xffffffffu, my_corner, k);
            shape.copy(to + r * STEP * A_PITCH, x, i + p, j + q, corner + further);
        }
    }
};
#else
// Tile of the left operand: a thread's pixels stay, the taps and channels move on.
struct Left {
    static const int GROUPS = BK / VEC, STEP = THREADS / GROUPS, COUNT = BM / STEP;
    int i[COUNT], j[COUNT], corner[COUNT];

    __device__ Left(const Geometry& shape, int row0)
    {
#pragma unroll
        for (int r = 0; r < COUNT; r++)
            shape.pixel(row0 + threadIdx.x / GROUPS + r * STEP, shape.pixels, i[r], j[r],
                        corner[r]);
    }

    __device__ void load(float* a, const float* x, const Geometry& shape, int k0, int end) const
    {
        const int k = threadIdx.x % GROUPS * VEC;
        int p, q, further;
        shape.tap(k0 + k, k0 + k < end, p, q, further);
        float* to = &A_AT(threadIdx.x / GROUPS, k);
#pragma unroll
        for (int r = 0; r < COUNT; r++)
            shape.copy(to + r * STEP * A_PITCH, x, i[r] + p, j[r] + q, corner[r] + further);
    }
};
#endif

// Tile of the right operand: rows k0 … k0+BK, BN columns.
__device__ void load_right(float* b, const float* right, const Geometry& shape, int k0, int end)
{
    constexpr int groups = BN / VEC, fit = THREADS / groups;
    constexpr int step = fit == 5 ? 4 : fit;                // BN = 96 gives 5, no divisor of BK
    const int n = threadIdx.x % groups * VEC, first = threadIdx.x / groups, col = blockIdx.y * BN;
    if (THREADS % groups && first >= step) return;          // the last threads, if BN is 96
#pragma unroll (BK / step < 16 ? BK / step : 4)
    for (int r = 0; r < BK / step; r++) {
        const int k = first + r * step;
        const bool valid = k0 + k < end && col + n < shape.cols;
        copy_async<4 * VEC>(&B_AT(k, n), right + ((k0 + k) * shape.cols + col + n), valid);
    }
}

#if INNER == 0
// Plain multiply-adds: thread (ty, tx) of 16×16 makes rows ty + 16 i, columns 4 tx + 64 j … + 3.
struct Product {
    static const int ROWS = BM / 16, QUADS = BN / 64;
    float y[ROWS][QUADS][4] = {};

    static __device__ int ty() { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8; }
    static __device__ int tx() { return threadIdx.x % 8 + threadIdx.x / 32 % 2 * 8; }

    __device__ void add(const float* a, const float* b)
    {
#pragma unroll 4
        for (int k = 0; k < BK; k++) {
            float left[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; i++) left[i] = A_AT(ty() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                const float4 four = *reinterpret_cast<const float4*>(&B_AT(k, 4 * tx() + 64 * j));
                const float right[] = {four.x, four.y, four.z, four.w};
#pragma unroll
                for (int n = 0; n < 4 * ROWS; n++)
                    y[n / 4][j][n % 4] = fmaf(left[n / 4], right[n % 4], y[n / 4][j][n % 4]);
            }
        }
    }

    __device__ void store(const Geometry& shape, float* to, const float* bias, bool relu)
    {
#pragma unroll
        for (int i = 0; i < ROWS; i++)
#pragma unroll
            for (int j = 0; j < QUADS; j++) {
                const int row = blockIdx.x * BM + ty() + 16 * i;
                const int col = blockIdx.y * BN + 4 * tx() + 64 * j;
                shape.store(to, bias, relu, row, col, y[i][j][0], y[i][j][1]);
                shape.store(to, bias, relu, row, col + 2, y[i][j][2], y[i][j][3]);
            }
    }
};
#else
// Tensor cores: each warp makes ROW_TILES × COL_TILES products of 8 rows × 16 columns, eight k at a
// time. What mma calls a and its rows are `right` and columns here: so neighbours in memory are
// neighbouring registers, as mma wants them, and one access brings two. For that, columns 2g and
// 2g+1 are mma's rows g and g + 8, and if not FILTER its k = t and t + 4 are ours 2t and 2t+1,
// which lie four rows of b apart. No two lanes of a half warp read the same bank.
struct Product {
    static const int BESIDE = BN % 32 ? 1 : 2;              // 2×2 warps, or 4×1 where BN is 16
    static const int ROW_TILES = BM / 32 * BESIDE, COL_TILES = BN / 16 / BESIDE;
    float y[COL_TILES][ROW_TILES][4] = {};

    static __device__ int t() { return threadIdx.x % 4; }
    static __device__ int g() { return threadIdx.x % 32 / 4; }
    static __device__ int col() { return threadIdx.x / 32 % BESIDE * COL_TILES * 16 + 2 * g(); }

    // the row of the tile that is number n of the eight of an mma
    static __device__ int row(int n)
    {
        return threadIdx.x / 32 / BESIDE * ROW_TILES * 8 + (FILTER ? n : n / 4 + n % 4 * 2);
    }

    // x = hi + lo, both TF32: together they hold 21 bits of the 24 of a float. INNER = 1 takes hi.
    static __device__ void split(float x, unsigned& hi, unsigned& lo)
    {
        hi = to_tf32(x);
        lo = to_tf32(x - __uint_as_float(hi));
    }

    __device__ void add(const float* a, const float* b)
    {
#pragma unroll (INNER == 3 ? 1 : BK / 8)                        // 1: fewer registers
        for (int k = 0; k < BK; k += 8) {
            unsigned right[COL_TILES][4], rest[COL_TILES][4];
#pragma unroll
            for (int n = 0; n < 2 * COL_TILES; n++) {
                const float2 two = *reinterpret_cast<const float2*>(
                    b + (k + t() + n % 2 * 4) * B_PITCH + col() + n / 2 * 16);
                split(two.x, right[n / 2][n % 2 * 2], rest[n / 2][n % 2 * 2]);
                split(two.y, right[n / 2][n % 2 * 2 + 1], rest[n / 2][n % 2 * 2 + 1]);
            }
#pragma unroll
            for (int j = 0; j < ROW_TILES; j++) {
                const int r = row(g()) + 8 * j;
                const float2 two = FILTER ? make_float2(A_AT(r, k + t()), A_AT(r, k + t() + 4))
                                          : *reinterpret_cast<const float2*>(&A_AT(r, k + 2 * t()));
                unsigned left[2], lo[2];
                split(two.x, left[0], lo[0]);
                split(two.y, left[1], lo[1]);
                float sum[COL_TILES][4] = {};                   // mma truncates, + rounds
#pragma unroll
                for (int n = INNER == 3 ? 0 : 2; n < 3; n++)    // small terms first
#pragma unroll
                    for (int i = 0; i < COL_TILES; i++)
                        mma_tf32(INNER == 3 ? sum[i] : y[i][j], n == 1 ? rest[i] : right[i],
                                 n == 0 ? lo : left);
#pragma unroll
                for (int n = 0; n < 4 * COL_TILES && INNER == 3; n++)
                    y[n / 4][j][n % 4] += sum[n / 4][n % 4];
            }
        }
    }

    __device__ void store(const Geometry& shape, float* to, const float* bias, bool relu)
    {
#pragma unroll
        for (int i = 0; i < COL_TILES; i++)
#pragma unroll
            for (int j = 0; j < ROW_TILES; j++) {
                const int r = blockIdx.x * BM + 8 * j, c = blockIdx.y * BN + col() + 16 * i;
                shape.store(to, bias, relu, r + row(2 * t()), c, y[i][j][0], y[i][j][2]);
                shape.store(to, bias, relu, r + row(2 * t() + 1), c, y[i][j][1], y[i][j][3]);
            }
    }
};
#endif

// Called by gpu._launch_conv. y (parts, rows, cols), bias (cols,) or null. With FILTER a part has
// one more row, the sums of the columns of `right`, which make db: the blocks of the first row tile
// add them up on the way.
extern "C" __global__ void __launch_bounds__(THREADS, VEC == 4 ? 2 : 1)
conv(const float* x, const float* right, float* y, const float* bias, int relu,
     const Geometry shape)
{
    float* part = y + static_cast<long long>(blockIdx.z) * (shape.rows + FILTER) * shape.cols;
    const int row0 = blockIdx.x * BM, col = blockIdx.y * BN + threadIdx.x;
    const int begin = blockIdx.z * shape.part, end = min(shape.depth, begin + shape.part);
    const int tiles = (end - begin + BK - 1) / BK;

    float* shared = shared_memory();                        // STAGES × (A_SIZE + B_SIZE)
    const Left left(shape, row0);
    Product product;
    const bool adds = FILTER && blockIdx.x == 0 && threadIdx.x < BN;
    float sum = 0;                                          // of column `col`

    const auto load = [&](int tile) {
        if (tile < tiles) {
            float* a = shared + tile % STAGES * (A_SIZE + B_SIZE);
            left.load(a, x, shape, begin + tile * BK, end);
            load_right(a + A_SIZE, right, shape, begin + tile * BK, end);
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
        if (adds)
#pragma unroll 8
            for (int k = 0; k < BK; k++) sum += a[A_SIZE + k * B_PITCH + threadIdx.x];
    }
    product.store(shape, part, bias, relu);
    if (adds && col < shape.cols)
        part[static_cast<long long>(shape.rows) * shape.cols + col] = sum;
}
