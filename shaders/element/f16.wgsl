// Four f16 elements of K or V, from the words that they lie in: two a word, the lower index below.

alias Quad = vec2<u32>;

const QUAD_WORDS: u32 = 2u;

fn quad_of(words: vec4<u32>) -> Quad {
    return words.xy;
}

fn floats(quad: Quad) -> vec4<f32> {
    return vec4(unpack2x16float(quad.x), unpack2x16float(quad.y));
}
