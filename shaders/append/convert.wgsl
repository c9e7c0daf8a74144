// Conversions between formats, bit for bit the same on every device.

// The bits as f32 of two pairs of 16-bit elements, the lower index below. Types: 1 f16, 2 bf16.
fn bits_of_pairs(words: vec2<u32>, kind: u32) -> vec4<u32> {
    let halves = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    if kind == 2u {
        return halves << vec4(16u);
    }
    let size = halves & vec4(0x7fffu);
    // Steps below 2^-14 are 2^-24; both factors and the product are exact.
    let small = bitcast<vec4<u32>>(vec4<f32>(size) * 5.9604644775390625e-8);
    let normal = (size << vec4(13u)) + vec4(0x38000000u);
    let special = (size << vec4(13u)) + vec4(0x70000000u);
    let bits = select(select(normal, small, size < vec4(0x400u)), special, size >= vec4(0x7c00u));
    return bits | ((halves & vec4(0x8000u)) << vec4(16u));
}

// Eight elements, as the bits of f32.
struct Eight {
    first: vec4<u32>,
    second: vec4<u32>,
}

const SIZE: u32 = 0x7fffffffu;

// Of four elements and one before them, as bits, the first whose magnitude no other exceeds.
fn larger(first: u32, four: vec4<u32>) -> u32 {
    var most = select(first, four.x, (four.x & SIZE) > (first & SIZE));
    most = select(most, four.y, (four.y & SIZE) > (most & SIZE));
    most = select(most, four.z, (four.z & SIZE) > (most & SIZE));
    return select(most, four.w, (four.w & SIZE) > (most & SIZE));
}

// A positive f32 divided by 127, as bits, rounded to nearest even. Zero for what is far below an f16.
fn divided_by_127(bits: u32) -> u32 {
    let exponent = bits >> 23u;
    if exponent < 64u {
        return 0u;
    }
    // 32 bits over 7: a quotient of 25 or 26 bits, of which an f32 keeps 24.
    let dividend = (bits | 0x800000u) << 8u;
    let quotient = dividend / 127u;
    let rest = dividend - quotient * 127u;
    let spare = select(1u, 2u, quotient >= 0x2000000u);
    let kept = quotient >> spare;
    let half = 1u << (spare - 1u);
    let past = quotient & (2u * half - 1u);
    let is_up = past > half || (past == half && (rest > 0u || (kept & 1u) == 1u));
    // The quotient stands 31 bits below the exponent. A carry of the rounding goes into the exponent, as it should.
    return ((exponent + spare - 9u) << 23u) + kept + select(0u, 1u, is_up);
}

// The scale of a block whose element of the largest magnitude has these bits, as f16 bits. NaN if no finite f16 can
// hold it.
fn scale_of(most: u32, format: u32) -> u32 {
    if (most & 0x7fffffffu) >= 0x7f800000u {
        return 0x7e00u;
    }
    var scale = most & 0x7fffffffu;
    if format == 3u {
        scale = divided_by_127(scale);
    } else {
        // Divided by -8.
        scale = select(scale - 0x1800000u, 0u, scale < 0x2000000u) | (~most & 0x80000000u);
    }
    let half = word_of_bits(vec2(scale, 0u), 1u) & 0xffffu;
    // Not minus zero.
    return select(select(half, 0u, (half & 0x7fffu) == 0u), 0x7e00u, (half & 0x7c00u) == 0x7c00u);
}

// The size of a scale as f32; zero for one that is no finite number.
fn step_of(scale: u32) -> f32 {
    let size = scale & 0x7fffu;
    if size >= 0x7c00u {
        return 0.0;
    }
    return select(bitcast<f32>((size << 13u) + 0x38000000u), f32(size) * 5.9604644775390625e-8, size < 0x400u);
}

// Four elements divided by a step, rounded to nearest even, within what the format has. Zeros for no step.
fn numbers(bits: vec4<u32>, step: f32, format: u32) -> vec4<i32> {
    let is_none = step == 0.0;
    let x = bitcast<vec4<f32>>(select(bits, vec4(0u), vec4(is_none)));
    // A device may divide inexactly, so the result is near. The rest is exact: a number of few bits times a step of
    // 11 bits, which is within a factor of two of x or zero.
    let near = round(x * select(1.0 / step, 0.0, is_none));
    let number = vec4<i32>(near);
    let twice = 2.0 * (x - near * step);
    // Half a step up or down is enough for an odd number, and too little for an even one.
    let parity = bitcast<vec4<u32>>(number & vec4(1));
    let most = bitcast<vec4<f32>>(vec4(bitcast<u32>(step)) - select(parity, vec4(0u), vec4(is_none)));
    let nearest = number + vec4<i32>(twice > most) - vec4<i32>(twice < -most);
    if format == 3u {
        return clamp(nearest, vec4(-127), vec4(127));
    }
    return clamp(nearest, vec4(-8), vec4(7));
}

// Four numbers as the bytes of a word.
fn bytes_of(numbers: vec4<i32>) -> u32 {
    let bytes = bitcast<vec4<u32>>(numbers) & vec4(0xffu);
    return bytes.x | (bytes.y << 8u) | (bytes.z << 16u) | (bytes.w << 24u);
}
