// Q6_K: blocks of 256 numbers d * scale * (q - 32), a signed byte of scale for 16 numbers. In each half block
// of four panels, 64 bytes hold the low four bits of q (panels 0 and 1 low, 2 and 3 high) and 32 bytes the top
// two bits (two bits a panel, panel 0 lowest).

const PANELS: u32 = 8;
const QUANT_TEXELS: u32 = 12; // low bits of both halves, then top bits of both
const SCALE_WORDS: u32 = 5;   // sixteen bytes of scales; d, f16

struct Panel {
    at: Cursor,
    scale0: vec4<f32>, // of the first 16 numbers
    scale1: vec4<f32>, // of the others
}

// Byte `i` of four words, with its sign.
fn signed_byte(words: vec4<u32>, i: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(words << vec4<u32>(24u - 8u * i)) >> vec4<u32>(24u));
}

fn load_panel(at: Cursor) -> Panel {
    let i = 2u * (at.panel % PANELS);
    let words = scale_words(at, i / 4u);
    let d = low_halves(scale_words(at, 4u));
    return Panel(at, d * signed_byte(words, i % 4u), d * signed_byte(words, i % 4u + 1u));
}

fn four(panel: Panel, output: u32, quad: u32) -> vec4<f32> {
    let half = panel.at.panel % PANELS / 4u;
    let i = panel.at.panel % 4u;
    let low = quant(panel.at, output, 4u * half + i % 2u * 2u + quad / 4u)[quad % 4u] >> (i / 2u * 4u);
    let top = quant(panel.at, output, 8u + 2u * half + quad / 4u)[quad % 4u] >> (2u * i);
    let q = (bytes(low) & vec4<u32>(0xfu)) | ((bytes(top) & vec4<u32>(3u)) << vec4<u32>(4u));
    return number(q) - 32.0;
}

// Inputs 4 * quad to 4 * quad + 3: column i holds output i's.
fn weights(panel: Panel, quad: u32) -> mat4x4<f32> {
    let scale = select(panel.scale0, panel.scale1, quad >= 4u);
    return mat4x4<f32>(
        scale.x * four(panel, 0u, quad),
        scale.y * four(panel, 1u, quad),
        scale.z * four(panel, 2u, quad),
        scale.w * four(panel, 3u, quad),
    );
}
