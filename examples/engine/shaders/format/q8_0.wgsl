// Q8_0: blocks of 32 numbers d * q, q a signed byte.

const PANELS: u32 = 2;
const QUANT_TEXELS: u32 = 4;
const SCALE_WORDS: u32 = 1; // d of both panels, f16

struct Panel {
    at: Cursor,
    d: vec4<f32>,
}

fn load_panel(at: Cursor) -> Panel {
    return Panel(at, low_halves(scale_words(at, 0u) >> vec4<u32>(16u * (at.panel % PANELS))));
}

fn four(panel: Panel, output: u32, quad: u32) -> vec4<f32> {
    let word = quant(panel.at, output, panel.at.panel % PANELS * 2u + quad / 4u)[quad % 4u];
    // Each byte to the top of its word, and down again with its sign.
    return vec4<f32>((vec4<i32>(bitcast<i32>(word)) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u));
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        panel.d.x * four(panel, 0u, quad),
        panel.d.y * four(panel, 1u, quad),
        panel.d.z * four(panel, 2u, quad),
        panel.d.w * four(panel, 3u, quad),
    );
}
