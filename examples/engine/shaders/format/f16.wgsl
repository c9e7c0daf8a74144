// F16: 16-bit numbers, IEEE 754's halves.

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
    return vec4<f32>(unpack2x16float(words.x), unpack2x16float(words.y));
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
