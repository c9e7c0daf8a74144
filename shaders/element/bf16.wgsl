// Four bf16 elements, from the words that they lie in: two a word, the lower index below.

alias SideQuad = vec2<u32>;

const SIDE_QUAD_WORDS: u32 = 2u;

fn side_quad_of(words: vec4<u32>) -> SideQuad {
    return words.xy;
}

fn side_floats(quad: SideQuad) -> vec4<f32> {
    // A bf16 is the upper half of an f32.
    let low = quad << vec2(16u);
    let high = quad & vec2(0xffff0000u);
    return bitcast<vec4<f32>>(vec4(low.x, high.x, low.y, high.y));
}
