// Q4_0: blocks of 32 numbers d * (q - 8). A block's first 16 numbers are the low halves of its 16 bytes.

const PANELS: u32 = 2;
const QUANT_TEXELS: u32 = 2;
const SCALE_WORDS: u32 = 1; // d of both panels, f16

struct Panel {
    d: vec4<f32>,
    q0: vec4<u32>,
    q1: vec4<u32>,
    q2: vec4<u32>,
    q3: vec4<u32>,
}

fn load_panel(at: Cursor) -> Panel {
    let i = at.panel % PANELS;
    let d = low_halves(scale_words(at, 0u) >> vec4<u32>(16u * i));
    return Panel(d, quant(at, 0u, i), quant(at, 1u, i), quant(at, 2u, i), quant(at, 3u, i));
}

fn four(q: vec4<u32>, quad: u32) -> vec4<f32> {
    return number(bytes(q[quad % 4u] >> (quad / 4u * 4u)) & vec4<u32>(0xfu)) - 8.0;
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        panel.d.x * four(panel.q0, quad),
        panel.d.y * four(panel.q1, quad),
        panel.d.z * four(panel.q2, quad),
        panel.d.w * four(panel.q3, quad),
    );
}
