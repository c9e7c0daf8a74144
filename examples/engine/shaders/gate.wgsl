// Gate: the feed-forward activation, act(gate) * up, from one fused projection.

@group(0) @binding(0) var<storage, read> projected: array<vec4<f32>>; // [rows, 2, WIDTH]: gate, then up
@group(0) @binding(1) var activated: texture_storage_2d<rgba32float, write>; // [rows, WIDTH], four elements a texel

override WIDTH: u32;
override GELU: bool = false; // act is GELU in its approximation by tanh; otherwise SiLU

@compute @workgroup_size(64)
fn main(
    @builtin(global_invocation_id) id: vec3<u32>,
) {
    let quads = WIDTH / 4u;
    let i = id.x;
    let row = id.y;
    if i >= quads {
        return;
    }
    let gate = projected[row * 2u * quads + i];
    let up = projected[row * 2u * quads + quads + i];
    // Both are gate * sigmoid(z): (1 + tanh(y)) / 2 is sigmoid(2 y). The built-in tanh is NaN for large arguments
    // on some drivers.
    var z = gate;
    if GELU {
        z = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate); // 2 * sqrt(2 / pi)
    }
    textureStore(activated, vec2<u32>(i, row), gate / (1.0 + exp(-z)) * up);
}
