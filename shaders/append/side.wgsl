// How `append_converted.wgsl` writes one of K and V. The text is joined twice, with each name in the place of `side`.

// Writes piece `piece` of a head that begins at word `at` of the source. Nothing branches before the stores, as in
// `append.wgsl`.
fn write_side(at: u32, slot: u32, piece: u32, is_zero: bool, is_asked: bool) {
    if params.side_units == 0u {
        return;
    }
    let d = 64u * piece;
    // A head of the other one of K and V may have more pieces.
    let is_written = is_asked & (d < params.kv.side_dim);
    if side_format >= 3u {
        let low = write_side_block(at, slot, 2u * piece, is_zero, is_written);
        let has_high = SIDE_IS_WHOLE | (d + 32u < params.kv.side_dim);
        let high = write_side_block(at, slot, 2u * piece + 1u, is_zero, is_written & has_high);
        let words = (params.kv.side_dim + 63u) / 64u;
        if is_written {
            side_cache[params.kv.side_scales + slot * words + piece] = low | select(0u, high << 16u, has_high);
        }
        return;
    }
    for (var first = d; first < d + 64u; first += 16u) {
        let low = side_bits(at, first, is_zero);
        let high = side_bits(at, first + 8u, is_zero);
        if is_written {
            store_side(slot, first, low.first);
            store_side(slot, first + 4u, low.second);
            store_side(slot, first + 8u, high.first);
            store_side(slot, first + 12u, high.second);
        }
    }
}

// Stores elements d to d + 3 of a head, as far as it has them.
fn store_side(slot: u32, d: u32, bits: vec4<u32>) {
    let end = select(min(4u, params.kv.side_dim - min(d, params.kv.side_dim)), 4u, SIDE_IS_WHOLE);
    if side_format == 0u {
        let to = slot * params.side_units + d;
        for (var i = 0u; i < end; i++) {
            side_cache[to + i] = bits[i];
        }
        return;
    }
    let to = slot * params.side_units + d / 2u;
    let words = vec2(word_of_bits(bits.xy, side_format), word_of_bits(bits.zw, side_format));
    if end > 0u {
        side_cache[to] = words.x;
    }
    if end > 2u {
        side_cache[to + 1u] = words.y;
    }
}

// Writes a block of 32 elements, and returns its scale.
fn write_side_block(at: u32, slot: u32, block: u32, is_zero: bool, is_written: bool) -> u32 {
    let d = 32u * block;
    let q0 = side_bits(at, d, is_zero);
    let q1 = side_bits(at, d + 8u, is_zero);
    let q2 = side_bits(at, d + 16u, is_zero);
    let q3 = side_bits(at, d + 24u, is_zero);
    let b0 = q0.first;
    let b1 = q0.second;
    let b2 = q1.first;
    let b3 = q1.second;
    let b4 = q2.first;
    let b5 = q2.second;
    let b6 = q3.first;
    let b7 = q3.second;
    var most: u32;
    if side_format == 3u {
        const SIZES: vec4<u32> = vec4(SIZE);
        let low = max(max(b0 & SIZES, b1 & SIZES), max(b2 & SIZES, b3 & SIZES));
        let high = max(max(b4 & SIZES, b5 & SIZES), max(b6 & SIZES, b7 & SIZES));
        let all = max(low, high);
        most = max(max(all.x, all.y), max(all.z, all.w));
    } else {
        most = larger(larger(larger(larger(larger(larger(larger(larger(0u, b0), b1), b2), b3), b4), b5), b6), b7);
    }
    let scale = scale_of(most, side_format);
    let step = step_of(scale);
    let flip = (scale & 0x8000u) << 16u;
    let n0 = numbers(b0 ^ vec4(flip), step, side_format);
    let n1 = numbers(b1 ^ vec4(flip), step, side_format);
    let n2 = numbers(b2 ^ vec4(flip), step, side_format);
    let n3 = numbers(b3 ^ vec4(flip), step, side_format);
    let n4 = numbers(b4 ^ vec4(flip), step, side_format);
    let n5 = numbers(b5 ^ vec4(flip), step, side_format);
    let n6 = numbers(b6 ^ vec4(flip), step, side_format);
    let n7 = numbers(b7 ^ vec4(flip), step, side_format);
    if is_written & (side_format == 3u) {
        let to = slot * params.side_units + 8u * block;
        side_cache[to] = bytes_of(n0);
        side_cache[to + 1u] = bytes_of(n1);
        side_cache[to + 2u] = bytes_of(n2);
        side_cache[to + 3u] = bytes_of(n3);
        side_cache[to + 4u] = bytes_of(n4);
        side_cache[to + 5u] = bytes_of(n5);
        side_cache[to + 6u] = bytes_of(n6);
        side_cache[to + 7u] = bytes_of(n7);
    }
    if is_written & (side_format == 4u) {
        // Each plus 8, the first half of the block in the lower halves of the bytes.
        let to = slot * params.side_units + 4u * block;
        side_cache[to] = bytes_of(n0 + 8) | (bytes_of(n4 + 8) << 4u);
        side_cache[to + 1u] = bytes_of(n1 + 8) | (bytes_of(n5 + 8) << 4u);
        side_cache[to + 2u] = bytes_of(n2 + 8) | (bytes_of(n6 + 8) << 4u);
        side_cache[to + 3u] = bytes_of(n3 + 8) | (bytes_of(n7 + 8) << 4u);
    }
    return scale;
}
