// Head norm: RMS norm of each query and key head of a fused projection, in place.
//
// Joined behind `rms.wgsl`.

@group(0) @binding(0) var<storage, read> weight: array<vec4<f32>>;          // [2, HEAD_DIM]: of queries, then of keys
@group(0) @binding(1) var<storage, read_write> projected: array<vec4<f32>>; // [rows, HEADS + 2 * KV_HEADS, HEAD_DIM]

override HEADS: u32;
override KV_HEADS: u32;
override HEAD_DIM: u32;
override EPSILON: f32;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>, // a head of queries or keys, and its row
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = HEAD_DIM / 4u;
    let head = group.x;
    let first = (group.y * (HEADS + 2u * KV_HEADS) + head) * quads;
    let weights = select(0u, quads, head >= HEADS);

    var squares = 0.0;
    for (var i = thread; i < quads; i += THREADS) {
        let x = projected[first + i];
        squares += dot(x, x);
    }
    let scale = rms_scale(thread, squares, HEAD_DIM, EPSILON);

    for (var i = thread; i < quads; i += THREADS) {
        projected[first + i] *= scale * weight[weights + i];
    }
}
