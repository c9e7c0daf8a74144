// Four columns of K and V rows: what a thread of a kernel that moves whole batch rows holds and writes.
//
// A column is the same unit (16 bytes, or a word) of the same head and token in every batch row. Joined to
// kernels that have `key_cache` and `value_cache` to write to, `params.heads`, `params.tiles` (workgroups of
// a head) and `params.len`.

const WORKGROUP: u32 = 256u;
// Columns of a workgroup.
const TILE: u32 = 1024u;
// A thread's four columns are this many apart: eight neighbours read 128 bytes together, a line of a GPU's
// cache, and then the next line. So a CPU, which runs eight threads at a time, sees few streams and long.
const RUN: u32 = 8u;

// Which columns are a thread's: the head, and the first unit of the head's live tokens.
struct Share {
    head: u32,
    first: u32,
}

fn share(number: u32, local: u32) -> Share {
    let head = number / params.tiles;
    let tile = number - head * params.tiles;
    return Share(head, tile * TILE + local / RUN * (4u * RUN) + local % RUN);
}

// The words of an invocation's columns in row 0 of a ring, and which of them exist.
struct Columns {
    at: vec4<u32>,
    is_live: vec4<bool>,
    row_stride: u32,
}

// In a ring of `capacity` slots whose first token lies at slot `start`, with `units` to a token of a head, from unit
// `base` of the buffer on. Without units there is no column.
fn columns(share: Share, base: u32, units: u32, start: u32, capacity: u32) -> Columns {
    // A workgroup that is one too many does as the last one, and writes nothing.
    let h = min(share.head, params.heads - 1u);
    let live = params.len * units;
    let head = capacity * units;
    let i = share.first + vec4(0u, 1u, 2u, 3u) * RUN;
    // A column past the end is read as the last one, and not written.
    let at = start * units + min(i, vec4(max(live, 1u) - 1u));
    return Columns(
        base + h * head + select(at, at - head, at >= vec4(head)),
        (i < vec4(live)) & vec4(share.head < params.heads),
        params.heads * head,
    );
}

struct Four {
    x: Unit,
    y: Unit,
    z: Unit,
    w: Unit,
}

// What a thread holds of a row.
struct Held {
    key: Four,
    value: Four,
}

fn store(key: Columns, value: Columns, row: u32, held: Held) {
    let k = key.at + row * key.row_stride;
    if key.is_live.x {
        key_cache[k.x] = held.key.x;
    }
    if key.is_live.y {
        key_cache[k.y] = held.key.y;
    }
    if key.is_live.z {
        key_cache[k.z] = held.key.z;
    }
    if key.is_live.w {
        key_cache[k.w] = held.key.w;
    }
    let v = value.at + row * value.row_stride;
    if value.is_live.x {
        value_cache[v.x] = held.value.x;
    }
    if value.is_live.y {
        value_cache[v.y] = held.value.y;
    }
    if value.is_live.z {
        value_cache[v.z] = held.value.z;
    }
    if value.is_live.w {
        value_cache[v.w] = held.value.w;
    }
}
