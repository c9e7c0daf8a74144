// F32: 32-bit numbers.

const PANELS: u32 = 1;
const QUANT_TEXELS: u32 = 8;
const SCALE_WORDS: u32 = 0;

struct Panel {
    at: Cursor,
}

fn load_panel(at: Cursor) -> Panel {
    return Panel(at);
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        bitcast<vec4<f32>>(quant(panel.at, 0u, quad)),
        bitcast<vec4<f32>>(quant(panel.at, 1u, quad)),
        bitcast<vec4<f32>>(quant(panel.at, 2u, quad)),
        bitcast<vec4<f32>>(quant(panel.at, 3u, quad)),
    );
}
