// Four f32 elements, from the words that they lie in.

alias SideQuad = vec4<u32>;

const SIDE_QUAD_WORDS: u32 = 4u;

fn side_quad_of(words: vec4<u32>) -> SideQuad {
    return words;
}

fn side_floats(quad: SideQuad) -> vec4<f32> {
    return bitcast<vec4<f32>>(quad);
}
