// Tokens in one piece: K and V are [B, H, capacity, D], and token t (0 is the oldest) of
// a row lies at slot start + t.
//
// Join this text to a shader that reads a view. Element d of K is at kv_slot(..) * key_dim + d.

fn kv_slot_in_row(kv: KvLayout, b: u32, h: u32, t: u32) -> u32 {
    return (b * kv.heads + h) * kv.capacity + kv.start + t;
}
