// Four f16 elements, from the words that they lie in: two a word, the lower index below.

alias SideQuad = vec2<u32>;

const SIDE_QUAD_WORDS: u32 = 2u;

fn side_quad_of(words: vec4<u32>) -> SideQuad {
    return words.xy;
}

fn side_floats(quad: SideQuad) -> vec4<f32> {
    return vec4(unpack2x16float(quad.x), unpack2x16float(quad.y));
}
