// All rows have the same start and length.

// The layout of batch row b alone, for kv_slot_in_row: a shader that stays in one row takes it once.
fn kv_row(kv: KvLayout, b: u32) -> KvLayout {
    return kv;
}

