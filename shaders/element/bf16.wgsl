// Four bf16 elements of K or V, from the words that they lie in: two a word, the lower index below.

alias Quad = vec2<u32>;

const QUAD_WORDS: u32 = 2u;

fn quad_of(words: vec4<u32>) -> Quad {
    return words.xy;
}

fn floats(quad: Quad) -> vec4<f32> {
    // A bf16 is the upper half of an f32.
    let low = quad << vec2(16u);
    let high = quad & vec2(0xffff0000u);
    return bitcast<vec4<f32>>(vec4(low.x, high.x, low.y, high.y));
}
