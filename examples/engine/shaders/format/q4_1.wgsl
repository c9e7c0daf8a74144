// Q4_1: blocks of 32 numbers d * q + m. A block's first 16 numbers are the low halves of its 16 bytes.

const PANELS: u32 = 1;
const QUANT_TEXELS: u32 = 1;
const SCALE_WORDS: u32 = 1; // d and m, f16

struct Panel {
    d: vec4<f32>,
    m: vec4<f32>,
    q0: vec4<u32>,
    q1: vec4<u32>,
    q2: vec4<u32>,
    q3: vec4<u32>,
}

fn load_panel(at: Cursor) -> Panel {
    let words = scale_words(at, 0u);
    return Panel(
        low_halves(words),
        low_halves(words >> vec4<u32>(16u)),
        quant(at, 0u, 0u),
        quant(at, 1u, 0u),
        quant(at, 2u, 0u),
        quant(at, 3u, 0u),
    );
}

fn four(q: vec4<u32>, quad: u32) -> vec4<f32> {
    return number(bytes(q[quad % 4u] >> (quad / 4u * 4u)) & vec4<u32>(0xfu));
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        panel.d.x * four(panel.q0, quad) + panel.m.x,
        panel.d.y * four(panel.q1, quad) + panel.m.y,
        panel.d.z * four(panel.q2, quad) + panel.m.z,
        panel.d.w * four(panel.q3, quad) + panel.m.w,
    );
}
