// Copies rows from a buffer into the texture that a matrix product reads.

@group(0) @binding(0) var<storage, read> rows: array<vec4<f32>>;               // [rows, WIDTH]
@group(0) @binding(1) var texels: texture_storage_2d<rgba32float, write>;      // the same, four elements a texel

override WIDTH: u32;

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) global_id: vec3<u32>,
) {
    let quads = WIDTH / 4u;
    let i = global_id.x;
    let row = global_id.y;
    if i >= quads {
        return;
    }
    textureStore(texels, vec2<u32>(i, row), rows[row * quads + i]);
}
