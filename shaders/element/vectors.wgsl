// K and V read a quad at a time, for heads of a multiple of four elements.

alias Unit = Quad;

// Zeros past the end of a head: there q is zero, too, but zero times an infinity would be a NaN.
fn key_quad(slot: u32, quad: u32) -> vec4<f32> {
    if has_rest {
        let at = slot * params.key_units + min(quad, params.key_units - 1u);
        return select(vec4(0.0), floats(key_cache[at]), quad < params.key_units);
    }
    return floats(key_cache[slot * params.key_units + quad]);
}

fn value_quad(slot: u32, quad: u32) -> vec4<f32> {
    return floats(value_cache[slot * params.value_stride + quad]);
}
