// K and V read a word at a time, for heads of any even number of bytes; past the end of a head the last
// word comes again.

alias Unit = u32;

fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    let i = min(quad * QUAD_WORDS + vec4(0u, 1u, 2u, 3u), vec4(params.key_units - 1u));
    let at = slot * params.key_units + i;
    return floats(quad_of(vec4(key_cache[at.x], key_cache[at.y], key_cache[at.z], key_cache[at.w])));
}

fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    let i = min(quad * QUAD_WORDS + vec4(0u, 1u, 2u, 3u), vec4(params.value_units - 1u));
    let at = slot * params.value_units + i;
    return floats(quad_of(vec4(value_cache[at.x], value_cache[at.y], value_cache[at.z], value_cache[at.w])));
}
