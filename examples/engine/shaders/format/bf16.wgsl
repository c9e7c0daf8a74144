// BF16: 16-bit numbers, the upper halves of 32-bit ones.

const PANELS: u32 = 1;
const QUANT_TEXELS: u32 = 4;
const SCALE_WORDS: u32 = 0;

struct Panel {
    at: Cursor,
}

fn load_panel(at: Cursor) -> Panel {
    return Panel(at);
}

fn four(panel: Panel, output: u32, quad: u32) -> vec4<f32> {
    let texel = quant(panel.at, output, quad / 2u);
    let words = select(texel.xy, texel.zw, quad % 2u == 1u);
    return bitcast<vec4<f32>>(vec4<u32>(words.x << 16u, words.x & 0xffff0000u, words.y << 16u, words.y & 0xffff0000u));
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        four(panel, 0u, quad),
        four(panel, 1u, quad),
        four(panel, 2u, quad),
        four(panel, 3u, quad),
    );
}
