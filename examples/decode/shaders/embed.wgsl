// Embedding: copies each token's row of the embedding matrix into the residual stream.

@group(0) @binding(0) var<storage, read> tokens: array<u32>;             // [rows]
@group(0) @binding(1) var<storage, read> embedding: array<mat4x4<f32>>;  // as the weight in matmul.wgsl
@group(0) @binding(2) var<storage, read_write> hidden: array<vec4<f32>>; // [rows, WIDTH]

override WIDTH: u32;

const LANES: u32 = 8;

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) id: vec3<u32>,
) {
    let quad = id.x;
    let row = id.y;
    let quads = WIDTH / 4u;
    if quad >= quads {
        return;
    }
    let token = tokens[row];
    // Column k of a block holds element k of four neighbouring tokens.
    let block = embedding[(token / 4u / LANES * quads + quad) * LANES + token / 4u % LANES];
    var transposed = transpose(block);
    hidden[row * quads + quad] = transposed[token % 4u];
}
