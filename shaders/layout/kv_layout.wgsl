// The parameters of a view. A text of `layout/rows_*.wgsl` and one of a layout follow.

struct KvLayout {
    heads: u32,
    // Elements a head.
    key_dim: u32,
    value_dim: u32,
    // Live tokens of the longest row. Of one row: kv_len.
    len: u32,
    // Slot of the oldest live token; of a paged view, in a row's first page.
    start: u32,
    // Slots of each row and head; of a paged view, of each page and head: a power of two.
    capacity: u32,
    // Of a paged view: the first word of the table in its buffer, and words from one row to the next.
    table: u32,
    table_stride: u32,
    batch: u32,
    // Of a ragged view: the first word of the records of the rows, in the buffer of the table.
    rows: u32,
    // Units from one slot to the next, as the texts that read elements count them.
    key_units: u32,
    value_units: u32,
    // Of quantized K and V: the 32-bit word of the buffer at which the scales begin.
    key_scales: u32,
    value_scales: u32,
    // Zero today.
    reserved_14: u32,
    reserved_15: u32,
}

// Live tokens of batch row b.
fn kv_len(kv: KvLayout, b: u32) -> u32 {
    return kv_row(kv, b).len;
}

// The slot of live token t (0 is the oldest) of batch row b and K/V head h.
fn kv_slot(kv: KvLayout, b: u32, h: u32, t: u32) -> u32 {
    return kv_slot_in_row(kv_row(kv, b), b, h, t);
}

