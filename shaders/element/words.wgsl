// K and V read a word at a time, for heads of any even number of bytes.

alias Unit = u32;

// Zeros past the end of a head: there q is zero, too, but zero times an infinity would be a NaN.
fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    let i = quad * QUAD_WORDS + vec4(0u, 1u, 2u, 3u);
    let at = slot * params.key_units + min(i, vec4(params.key_units - 1u));
    let words = vec4(key_cache[at.x], key_cache[at.y], key_cache[at.z], key_cache[at.w]);
    return floats(quad_of(select(vec4(0u), words, i < vec4(params.key_units))));
}

// Past the end of a head its last word comes again; sums of these elements are not written.
fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    let i = min(quad * QUAD_WORDS + vec4(0u, 1u, 2u, 3u), vec4(params.value_units - 1u));
    let at = slot * params.value_stride + i;
    return floats(quad_of(vec4(value_cache[at.x], value_cache[at.y], value_cache[at.z], value_cache[at.w])));
}
