// Post norm: adds the RMS norm of a branch's result to the residual stream, scaled by a weight per element.
//
// Joined behind `rms.wgsl`.

@group(0) @binding(0) var<storage, read> weight: array<vec4<f32>>;       // [WIDTH]
@group(0) @binding(1) var<storage, read> branch: array<vec4<f32>>;       // [rows, WIDTH]
@group(0) @binding(2) var<storage, read_write> hidden: array<vec4<f32>>; // [rows, WIDTH]

override WIDTH: u32;
override EPSILON: f32;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = WIDTH / 4u;
    let first = group.x * quads;

    var squares = 0.0;
    for (var i = thread; i < quads; i += THREADS) {
        let x = branch[first + i];
        squares += dot(x, x);
    }
    let scale = rms_scale(thread, squares, WIDTH, EPSILON);

    for (var i = thread; i < quads; i += THREADS) {
        hidden[first + i] += branch[first + i] * scale * weight[i];
    }
}
