// Q4_K: blocks of 256 numbers, eight sub-blocks of 32: (d * scale) * q - dmin * min. Two sub-blocks share 32
// bytes, the first in their low halves. Scales and mins have six bits each, 96 in three words.

const PANELS: u32 = 8;
const QUANT_TEXELS: u32 = 8;
const SCALE_WORDS: u32 = 4; // d and dmin, f16; the six-bit scales and mins

struct Panel {
    at: Cursor,
    scale: vec4<f32>,
    least: vec4<f32>,
}

fn load_panel(at: Cursor) -> Panel {
    // The twelve bytes are scales 0 to 3, mins 0 to 3, and the low halves of scales and mins 4 to 7. The top
    // two bits of these four are the top two of bytes 0 to 3 and 4 to 7.
    let byte = vec4<u32>(8u * (at.panel % 4u));
    let first = scale_words(at, 1u) >> byte;
    let second = scale_words(at, 2u) >> byte;
    let third = scale_words(at, 3u) >> byte;
    let is_late = at.panel % PANELS >= 4u;
    let top = vec4<u32>(0x30u);
    let scale = select(first & vec4<u32>(0x3fu), (third & vec4<u32>(0xfu)) | ((first >> vec4<u32>(2u)) & top), is_late);
    let least = select(second & vec4<u32>(0x3fu), ((third >> vec4<u32>(4u)) & vec4<u32>(0xfu)) | ((second >> vec4<u32>(2u)) & top), is_late);
    let words = scale_words(at, 0u);
    return Panel(
        at,
        low_halves(words) * number(scale),
        low_halves(words >> vec4<u32>(16u)) * number(least),
    );
}

fn four(panel: Panel, output: u32, quad: u32) -> vec4<f32> {
    let word = quant(panel.at, output, panel.at.panel % PANELS / 2u * 2u + quad / 4u)[quad % 4u];
    return number(bytes(word >> (panel.at.panel % 2u * 4u)) & vec4<u32>(0xfu));
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        panel.scale.x * four(panel, 0u, quad) - panel.least.x,
        panel.scale.y * four(panel, 1u, quad) - panel.least.y,
        panel.scale.z * four(panel, 2u, quad) - panel.least.z,
        panel.scale.w * four(panel, 3u, quad) - panel.least.w,
    );
}
