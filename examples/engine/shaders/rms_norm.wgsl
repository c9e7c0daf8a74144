// RMS norm: scales each row to a root mean square of one, then by a weight per element.
//
// Joined behind `rms.wgsl`.

@group(0) @binding(0) var<storage, read> ends: array<u32>;         // rows of `hidden` that the head reads
@group(0) @binding(1) var<storage, read> weight: array<vec4<f32>>; // [WIDTH]
@group(0) @binding(2) var<storage, read> hidden: array<vec4<f32>>; // [tokens, WIDTH]
@group(0) @binding(3) var normed: texture_storage_2d<rgba32float, write>; // [rows, WIDTH], four elements a texel

override WIDTH: u32;
override EPSILON: f32;
// The head needs only the last token of each sequence: row i of `normed` is then row ends[i] of `hidden`.
override LAST: bool = false;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let quads = WIDTH / 4u;
    let row = group.x;
    var token = row;
    if LAST {
        token = ends[row];
    }
    let source = token * quads;

    var squares = 0.0;
    for (var i = thread; i < quads; i += THREADS) {
        let x = hidden[source + i];
        squares += dot(x, x);
    }
    let scale = rms_scale(thread, squares, WIDTH, EPSILON);

    for (var i = thread; i < quads; i += THREADS) {
        textureStore(normed, vec2<u32>(i, row), hidden[source + i] * scale * weight[i]);
    }
}
