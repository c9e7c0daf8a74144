// Two elements of a 16-bit type in a word, the lower index below. Types: 1 f16, 2 bf16.

fn pair_of(word: u32, kind: u32) -> vec2<f32> {
    if kind == 1u {
        return unpack2x16float(word);
    }
    // A bf16 is the upper half of an f32.
    return bitcast<vec2<f32>>(vec2(word << 16u, word & 0xffff0000u));
}

// Rounded to nearest, to even where two are equally near. A NaN stays one.
fn word_of(pair: vec2<f32>, kind: u32) -> u32 {
    return word_of_bits(bitcast<vec2<u32>>(pair), kind);
}

// Of the bits of two f32.
fn word_of_bits(bits: vec2<u32>, kind: u32) -> u32 {
    let magnitude = bits & vec2(0x7fffffffu);
    let is_nan = magnitude > vec2(0x7f800000u);
    if kind == 1u {
        // Not pack2x16float: it leaves open how it rounds, and what becomes of what is out of range.
        let tie = (magnitude >> vec2(13u)) & vec2(1u);
        // From 65520 on the nearest is infinity. 0xc8000fff: less the difference of the exponents' offsets, and all
        // but a half of the last place.
        let normal = (min(magnitude, vec2(0x47800000u)) + vec2(0xc8000fffu) + tie) >> vec2(13u);
        // Below 2^-14 the steps are those of an f32 from 0.5 on.
        let small = bitcast<vec2<u32>>(bitcast<vec2<f32>>(magnitude) + vec2(0.5)) - vec2(0x3f000000u);
        var half = select(normal, small, magnitude < vec2(0x38800000u));
        half = select(half, vec2(0x7e00u), is_nan);
        half |= (bits >> vec2(16u)) & vec2(0x8000u);
        return half.x | (half.y << 16u);
    }
    let tie = (bits >> vec2(16u)) & vec2(1u);
    let rounded = select(bits + vec2(0x7fffu) + tie, bits | vec2(0x400000u), is_nan);
    return (rounded.x >> 16u) | (rounded.y & 0xffff0000u);
}
