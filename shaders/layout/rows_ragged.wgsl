// Each row has its own start, length and pages. A record of four words a row holds them: the start, the
// length, the row's first word in the table (counted from kv.table), and a zero.

// The layout of batch row b alone, for kv_slot_in_row: a shader that stays in one row takes it once.
fn kv_row(kv: KvLayout, b: u32) -> KvLayout {
    let record = kv.rows + 4u * b;
    var row = kv;
    row.start = kv_table(record);
    row.len = kv_table(record + 1u);
    row.table = kv.table + kv_table(record + 2u);
    row.table_stride = 0u;
    return row;
}

