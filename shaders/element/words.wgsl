// Elements read a word at a time, for heads of any whole number of words.

alias SideUnit = u32;

// Elements 4 * quad to 4 * quad + 3 of the head at a slot, zeros past its end. The quad must begin within the head.
fn kv_side_quad(kv: KvLayout, slot: u32, quad: u32) -> vec4<f32> {
    let count = kv.side_dim * SIDE_QUAD_WORDS / 4u;
    let i = quad * SIDE_QUAD_WORDS + vec4(0u, 1u, 2u, 3u);
    let at = slot * kv.side_units + min(i, vec4(count - 1u));
    let words = vec4(kv_side_unit(at.x), kv_side_unit(at.y), kv_side_unit(at.z), kv_side_unit(at.w));
    return side_floats(side_quad_of(select(vec4(0u), words, i < vec4(count))));
}
