// Four f32 elements of K or V, from the words that they lie in.

alias Quad = vec4<u32>;

const QUAD_WORDS: u32 = 4u;

fn quad_of(words: vec4<u32>) -> Quad {
    return words;
}

fn floats(quad: Quad) -> vec4<f32> {
    return bitcast<vec4<f32>>(quad);
}
