// Elements of q4_0: 4 bits each, in blocks of 32 with an f16 scale each. Byte j of a block holds element j in its lower
// half and element j + 16 in its upper one, each plus 8. The scales of two blocks share a word.

alias SideUnit = u32;

// Elements 4 * quad to 4 * quad + 3 of the head at a slot, zeros past its end. The quad must begin within the head.
fn kv_side_quad(kv: KvLayout, slot: u32, quad: u32) -> vec4<f32> {
    // Quads 0 to 3 of a block are the lower halves of its four words, quads 4 to 7 the upper ones.
    let word = kv_side_unit(slot * kv.side_units + quad / 8u * 4u + (quad & 3u)) >> (quad & 4u);
    // A row of scales has a word for each 8 words of the row, or fewer.
    let row = (kv.side_units + 4u) / 8u;
    let scales = unpack2x16float(kv_side_unit(kv.side_scales + slot * row + quad / 16u));
    return select(scales.x, scales.y, (quad & 8u) != 0u) * side_numbers(word);
}

// Quads 4 * run to 4 * run + 3 of the head at a slot, zeros past its end. The run must begin within the head.
fn kv_side_run(kv: KvLayout, slot: u32, run: u32) -> mat4x4<f32> {
    let at = slot * kv.side_units + run / 2u * 4u;
    let shift = (run & 1u) * 4u;
    let row = (kv.side_units + 4u) / 8u;
    let scales = unpack2x16float(kv_side_unit(kv.side_scales + slot * row + run / 4u));
    let scale = select(scales.x, scales.y, (run & 2u) != 0u);
    return mat4x4(
        scale * side_numbers(kv_side_unit(at) >> shift),
        scale * side_numbers(kv_side_unit(at + 1u) >> shift),
        scale * side_numbers(kv_side_unit(at + 2u) >> shift),
        scale * side_numbers(kv_side_unit(at + 3u) >> shift),
    );
}

// Of the lower halves of a word's bytes.
fn side_numbers(word: u32) -> vec4<f32> {
    return vec4<f32>(vec4<i32>((vec4(word) >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) - vec4(8));
}

const SIDE_IS_QUANTIZED: bool = true;
