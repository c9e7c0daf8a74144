// Elements read a quad at a time, for heads of a multiple of four elements.

alias SideUnit = SideQuad;

// Elements 4 * quad to 4 * quad + 3 of the head at a slot. The quad must begin within the head.
fn kv_side_quad(kv: KvLayout, slot: u32, quad: u32) -> vec4<f32> {
    return side_floats(kv_side_unit(slot * kv.side_units + quad));
}
