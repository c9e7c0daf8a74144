// The root mean square of a row that a workgroup shares. Joined before the kernels that normalise rows.

const THREADS: u32 = 64;

var<workgroup> partial: array<f32, THREADS>;

// The factor that scales a row of `elements` numbers to a root mean square of one. Each thread passes the sum of
// the squares of its own numbers.
fn rms_scale(thread: u32, squares: f32, elements: u32, epsilon: f32) -> f32 {
    partial[thread] = squares;
    workgroupBarrier();

    // Every thread adds up all partial sums: one barrier, and so few of them that a tree would not
    // pay.
    var total = 0.0;
    for (var i = 0u; i < THREADS; i++) {
        total += partial[i];
    }
    return inverseSqrt(total / f32(elements) + epsilon);
}
