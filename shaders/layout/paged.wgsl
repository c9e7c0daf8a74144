// Tokens in pages: K and V are pools of pages [page, H, capacity, D], and a table names
// the pages of each row, in order. Token t (0 is the oldest) of a row is its (start + t)-th slot.
//
// Join this text to a shader that reads a view. Element d of K is at kv_slot(..) * key_dim + d. The
// shader says how word i of the table's buffer is read: fn kv_table(i: u32) -> u32.

fn kv_slot_in_row(kv: KvLayout, b: u32, h: u32, t: u32) -> u32 {
    let slot = kv.start + t;
    let page = kv_table(kv.table + b * kv.table_stride + (slot >> countTrailingZeros(kv.capacity)));
    return (page * kv.heads + h) * kv.capacity + (slot & (kv.capacity - 1u));
}
