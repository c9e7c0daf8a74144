// Elements of q8_0: signed bytes, four a word, in blocks of 32 with an f16 scale each. The scales of two blocks share a
// word.

alias SideUnit = u32;

// Elements 4 * quad to 4 * quad + 3 of the head at a slot, zeros past its end. The quad must begin within the head.
fn kv_side_quad(kv: KvLayout, slot: u32, quad: u32) -> vec4<f32> {
    let word = kv_side_unit(slot * kv.side_units + quad);
    // A row of scales has a word for each 16 words of the row, or fewer.
    let row = (kv.side_units + 8u) / 16u;
    let scales = unpack2x16float(kv_side_unit(kv.side_scales + slot * row + quad / 16u));
    return select(scales.x, scales.y, (quad & 8u) != 0u) * side_numbers(word);
}

// Quads 4 * run to 4 * run + 3 of the head at a slot, zeros past its end. The run must begin within the head.
fn kv_side_run(kv: KvLayout, slot: u32, run: u32) -> mat4x4<f32> {
    let at = slot * kv.side_units + 4u * run;
    let row = (kv.side_units + 8u) / 16u;
    let scales = unpack2x16float(kv_side_unit(kv.side_scales + slot * row + run / 4u));
    let scale = select(scales.x, scales.y, (run & 2u) != 0u);
    return mat4x4(
        scale * side_numbers(kv_side_unit(at)),
        scale * side_numbers(kv_side_unit(at + 1u)),
        scale * side_numbers(kv_side_unit(at + 2u)),
        scale * side_numbers(kv_side_unit(at + 3u)),
    );
}

fn side_numbers(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4(word) << vec4(24u, 16u, 8u, 0u)) >> vec4(24u));
}

const SIDE_IS_QUANTIZED: bool = true;
