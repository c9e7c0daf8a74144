// K and V read a quad at a time, for heads of a multiple of four elements.

alias Unit = Quad;

fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    return floats(key_cache[slot * params.key_units + quad]);
}

fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    return floats(value_cache[slot * params.value_units + quad]);
}
