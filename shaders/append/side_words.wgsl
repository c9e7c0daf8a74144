// How `append/side.wgsl` reads any source.

const SIDE_IS_WHOLE: bool = false;

// The bits as f32 of elements d to d + 7 of a head that begins at word `at` of the source. Zeros past the head.
fn side_bits(at: u32, d: u32, is_zero: bool) -> Eight {
    return Eight(side_quad(at, d, is_zero), side_quad(at, d + 4u, is_zero));
}

fn side_quad(at: u32, d: u32, is_zero: bool) -> vec4<u32> {
    let dim = params.kv.side_dim;
    let element = d + vec4(0u, 1u, 2u, 3u);
    var bits: vec4<u32>;
    if source_type == 0u {
        let i = at + min(element, vec4(dim - 1u));
        bits = vec4(side_source[i.x], side_source[i.y], side_source[i.z], side_source[i.w]);
    } else {
        let i = at + min(element.xz / 2u, vec2((dim - 1u) / 2u));
        bits = bits_of_pairs(vec2(side_source[i.x], side_source[i.y]), source_type);
    }
    return select(vec4(0u), bits, (element < vec4(dim)) & vec4(!is_zero));
}
