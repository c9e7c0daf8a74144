// How `append/side.wgsl` reads a source of whole pieces that is aligned to 16 bytes, if no position becomes zero.

const SIDE_IS_WHOLE: bool = true;

// The bits as f32 of elements d to d + 7 of a head that begins at vector `at` of the source; d is a multiple of 8.
fn side_bits(at: u32, d: u32, is_zero: bool) -> Eight {
    if source_type == 0u {
        return Eight(side_source[at + d / 4u], side_source[at + d / 4u + 1u]);
    }
    let words = side_source[at + d / 8u];
    return Eight(bits_of_pairs(words.xy, source_type), bits_of_pairs(words.zw, source_type));
}
