// Q5_0: blocks of 32 numbers d * (q - 16). The low four bits of q lie as in Q4_0, and the fifth bit of number
// i is bit i of a word.

const PANELS: u32 = 2;
const QUANT_TEXELS: u32 = 2;
const SCALE_WORDS: u32 = 3; // d of both panels, f16; the fifth bits of each panel

struct Panel {
    d: vec4<f32>,
    fifths: vec4<u32>,
    q0: vec4<u32>,
    q1: vec4<u32>,
    q2: vec4<u32>,
    q3: vec4<u32>,
}

fn load_panel(at: Cursor) -> Panel {
    let i = at.panel % PANELS;
    let d = low_halves(scale_words(at, 0u) >> vec4<u32>(16u * i));
    let fifths = scale_words(at, 1u + i);
    return Panel(d, fifths, quant(at, 0u, i), quant(at, 1u, i), quant(at, 2u, i), quant(at, 3u, i));
}

fn four(q: vec4<u32>, fifths: u32, quad: u32) -> vec4<f32> {
    let low = bytes(q[quad % 4u] >> (quad / 4u * 4u)) & vec4<u32>(0xfu);
    let high = (vec4<u32>(fifths >> (4u * quad)) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u);
    return number(low | (high << vec4<u32>(4u))) - 16.0;
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        panel.d.x * four(panel.q0, panel.fifths.x, quad),
        panel.d.y * four(panel.q1, panel.fifths.y, quad),
        panel.d.z * four(panel.q2, panel.fifths.z, quad),
        panel.d.w * four(panel.q3, panel.fifths.w, quad),
    );
}
