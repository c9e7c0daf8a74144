// Tokens in a ring: K and V are [B, H, capacity, D], and token t (0 is the oldest) of
// a row lies at slot (start + t) mod capacity.
//
// Join this text to a shader that reads a view. Element d of K is at kv_slot(..) * key_dim + d.

fn kv_slot_in_row(kv: KvLayout, b: u32, h: u32, t: u32) -> u32 {
    // start < capacity and t < capacity: one subtraction is the whole modulus.
    let slot = kv.start + t;
    return (b * kv.heads + h) * kv.capacity + select(slot, slot - kv.capacity, slot >= kv.capacity);
}
