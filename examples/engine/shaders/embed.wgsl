// Embedding: writes each token's row of the embedding matrix into the residual stream.
//
// Joined behind `weights.wgsl` and a text of `format/`; lines between `//: each` and `//: end` are repeated by
// the host. Tokens outside this part of the matrix are left to the dispatch over their own.

@group(0) @binding(3) var<storage, read> tokens: array<u32>;             // [rows]
@group(0) @binding(4) var<storage, read_write> hidden: array<vec4<f32>>; // [rows, WIDTH]

override WIDTH: u32;
override SCALE: f32 = 1; // what embeddings are multiplied by

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) global_id: vec3<u32>,
) {
    let quads = WIDTH / 4u;
    let first = global_id.x * 8u; // quad of the row; a thread unpacks one panel
    let token = global_id.y;
    let row = tokens[token] - part.first; // wraps for tokens before this part
    if first >= quads || row >= part.rows {
        return;
    }
    let panel = load_panel(Cursor(row / (4u * LANES), row % LANES, first / 8u));
    let output = row / LANES % 4u;
    //: each quad in QUADS
    if first + {quad}u < quads {
        var block = weights(panel, {quad}u);
        hidden[token * quads + first + {quad}u] = block[output] * SCALE;
    }
    //: end
}
