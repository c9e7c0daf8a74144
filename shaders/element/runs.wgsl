// Runs of elements that have no scales, for either of `vectors.wgsl` and `words.wgsl`.

// Quads 4 * run to 4 * run + 3 of the head at a slot, which must all begin within the head.
fn kv_side_run(kv: KvLayout, slot: u32, run: u32) -> mat4x4<f32> {
    return mat4x4(
        kv_side_quad(kv, slot, 4u * run),
        kv_side_quad(kv, slot, 4u * run + 1u),
        kv_side_quad(kv, slot, 4u * run + 2u),
        kv_side_quad(kv, slot, 4u * run + 3u),
    );
}

const SIDE_IS_QUANTIZED: bool = false;
