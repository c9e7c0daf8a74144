// How `append_converted.wgsl` writes one of K and V. The text is joined twice, with each name in the place of `side`.

// The bits as f32 of elements d to d + 3 of a head that begins at word `at` of the source. Zeros past the head.
fn side_bits(at: u32, d: u32, is_zero: bool) -> vec4<u32> {
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

// Writes piece `piece` of a head that begins at word `at` of the source.
fn write_side(at: u32, slot: u32, piece: u32, is_zero: bool) {
    let d = 64u * piece;
    if params.side_units == 0u || d >= params.kv.side_dim {
        return;
    }
    if side_format >= 3u {
        var scales = write_side_block(at, slot, 2u * piece, is_zero);
        if d + 32u < params.kv.side_dim {
            scales |= write_side_block(at, slot, 2u * piece + 1u, is_zero) << 16u;
        }
        let words = (params.kv.side_dim + 63u) / 64u;
        side_cache[params.kv.side_scales + slot * words + piece] = scales;
        return;
    }
    let end = min(d + 64u, params.kv.side_dim);
    if side_format == source_type {
        // As it comes in, bit for bit.
        let per_word = select(2u, 1u, side_format == 0u);
        for (var i = d / per_word; i < end / per_word; i++) {
            side_cache[slot * params.side_units + i] = select(side_source[at + i], 0u, is_zero);
        }
        return;
    }
    for (var first = d; first < end; first += 4u) {
        let bits = side_bits(at, first, is_zero);
        if side_format == 0u {
            let to = slot * params.side_units + first;
            for (var i = 0u; i < min(4u, end - first); i++) {
                side_cache[to + i] = bits[i];
            }
        } else {
            let to = slot * params.side_units + first / 2u;
            side_cache[to] = word_of_bits(bits.xy, side_format);
            if first + 2u < end {
                side_cache[to + 1u] = word_of_bits(bits.zw, side_format);
            }
        }
    }
}

// Writes a block of 32 elements, and returns its scale.
fn write_side_block(at: u32, slot: u32, block: u32, is_zero: bool) -> u32 {
    let d = 32u * block;
    let b0 = side_bits(at, d, is_zero);
    let b1 = side_bits(at, d + 4u, is_zero);
    let b2 = side_bits(at, d + 8u, is_zero);
    let b3 = side_bits(at, d + 12u, is_zero);
    let b4 = side_bits(at, d + 16u, is_zero);
    let b5 = side_bits(at, d + 20u, is_zero);
    let b6 = side_bits(at, d + 24u, is_zero);
    let b7 = side_bits(at, d + 28u, is_zero);
    let most = larger(larger(larger(larger(larger(larger(larger(larger(0u, b0), b1), b2), b3), b4), b5), b6), b7);
    let scale = scale_of(most, side_format);
    let n0 = numbers(b0, scale, side_format);
    let n1 = numbers(b1, scale, side_format);
    let n2 = numbers(b2, scale, side_format);
    let n3 = numbers(b3, scale, side_format);
    let n4 = numbers(b4, scale, side_format);
    let n5 = numbers(b5, scale, side_format);
    let n6 = numbers(b6, scale, side_format);
    let n7 = numbers(b7, scale, side_format);
    if side_format == 3u {
        let to = slot * params.side_units + 8u * block;
        side_cache[to] = bytes_of(n0);
        side_cache[to + 1u] = bytes_of(n1);
        side_cache[to + 2u] = bytes_of(n2);
        side_cache[to + 3u] = bytes_of(n3);
        side_cache[to + 4u] = bytes_of(n4);
        side_cache[to + 5u] = bytes_of(n5);
        side_cache[to + 6u] = bytes_of(n6);
        side_cache[to + 7u] = bytes_of(n7);
    } else {
        // Each plus 8, the first half of the block in the lower halves of the bytes.
        let to = slot * params.side_units + 4u * block;
        side_cache[to] = bytes_of(n0 + 8) | (bytes_of(n4 + 8) << 4u);
        side_cache[to + 1u] = bytes_of(n1 + 8) | (bytes_of(n5 + 8) << 4u);
        side_cache[to + 2u] = bytes_of(n2 + 8) | (bytes_of(n6 + 8) << 4u);
        side_cache[to + 3u] = bytes_of(n3 + 8) | (bytes_of(n7 + 8) << 4u);
    }
    return scale;
}
