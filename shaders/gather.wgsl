// Moves batch rows of K and V in place: new row i becomes old row map[i], without a scratch buffer.
//
// A thread owns four columns; a column is the same unit (16 bytes, or a word) of the same head and slot
// in every batch row. All threads run the same short list of row moves, which the host has ordered so
// that no row is overwritten while it is still needed; a cycle goes through registers.
//
// group 0, binding 0: key_cache      [B, H, capacity, D of K]
// group 0, binding 1: value_cache    [B, H, capacity, D of V]
// group 1, binding 0: lists          the moves: copies (from, how many rows, these), then cycles (how
//                                    many rows, these)
// group 2, binding 0: params         a uniform, or immediate data where the device has it

alias Unit = vec4<u32>;

struct Params {
    // Units of a head.
    key_units: u32,
    value_units: u32,
    heads: u32,
    // Workgroups of a head.
    tiles: u32,
    // The ring: token t lies at slot (start + t) mod capacity; only live slots are touched.
    start: u32,
    len: u32,
    capacity: u32,
    // Where the moves lie in `lists`, and in them where the cycles begin and all of it ends.
    list_at: u32,
    cycles_at: u32,
    list_end: u32,
}

@group(0) @binding(0) var<storage, read_write> key_cache: array<Unit>;
@group(0) @binding(1) var<storage, read_write> value_cache: array<Unit>;
@group(1) @binding(0) var<storage, read> lists: array<u32>;
@group(2) @binding(0) var<uniform> params: Params;

// Which moves there are, so that a kernel runs no others. Loops end at their end, never before it: a
// software adapter runs a body that all threads have left once more, with nothing to do.
override has_copies: bool = true;
override has_cycles: bool = true;

const WORKGROUP: u32 = 256u;
// Columns of a workgroup: a thread's four are a workgroup apart, so that neighbours read neighbours.
const TILE: u32 = 1024u;

// Four columns: where they lie in row 0, and which of them are there.
struct Columns {
    at: vec4<u32>,
    is_live: vec4<bool>,
    row_stride: u32,
}

fn columns(h: u32, first: u32, units: u32) -> Columns {
    let live = params.len * units;
    let head = params.capacity * units;
    let i = first + vec4(0u, 1u, 2u, 3u) * WORKGROUP;
    // A column past the end is read as the last one, and not written.
    let at = params.start * units + min(i, vec4(live - 1u));
    return Columns(h * head + select(at, at - head, at >= vec4(head)), i < vec4(live), params.heads * head);
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let h = number / params.tiles;
    if h >= params.heads {
        return;
    }
    let first = number % params.tiles * TILE + local;
    move_keys(columns(h, first, params.key_units));
    move_values(columns(h, first, params.value_units));
}

struct Four {
    x: Unit,
    y: Unit,
    z: Unit,
    w: Unit,
}

fn move_keys(c: Columns) {
    var next = params.list_at;
    if has_copies {
        let end = params.list_at + params.cycles_at;
        loop {
            let held = load_keys(c, lists[next]);
            let last = next + 1u + lists[next + 1u];
            next++;
            loop {
                next++;
                store_keys(c, lists[next], held);
                continuing {
                    break if next == last;
                }
            }
            next++;
            continuing {
                break if next == end;
            }
        }
    }
    if has_cycles {
        let end = params.list_at + params.list_end;
        loop {
            let last = next + lists[next];
            next++;
            var to = lists[next];
            let held = load_keys(c, to);
            loop {
                next++;
                let source = lists[next];
                store_keys(c, to, load_keys(c, source));
                to = source;
                continuing {
                    break if next == last;
                }
            }
            store_keys(c, to, held);
            next++;
            continuing {
                break if next == end;
            }
        }
    }
}

fn load_keys(c: Columns, row: u32) -> Four {
    let at = c.at + row * c.row_stride;
    return Four(key_cache[at.x], key_cache[at.y], key_cache[at.z], key_cache[at.w]);
}

fn store_keys(c: Columns, row: u32, units: Four) {
    let at = c.at + row * c.row_stride;
    if c.is_live.x {
        key_cache[at.x] = units.x;
    }
    if c.is_live.y {
        key_cache[at.y] = units.y;
    }
    if c.is_live.z {
        key_cache[at.z] = units.z;
    }
    if c.is_live.w {
        key_cache[at.w] = units.w;
    }
}

fn move_values(c: Columns) {
    var next = params.list_at;
    if has_copies {
        let end = params.list_at + params.cycles_at;
        loop {
            let held = load_values(c, lists[next]);
            let last = next + 1u + lists[next + 1u];
            next++;
            loop {
                next++;
                store_values(c, lists[next], held);
                continuing {
                    break if next == last;
                }
            }
            next++;
            continuing {
                break if next == end;
            }
        }
    }
    if has_cycles {
        let end = params.list_at + params.list_end;
        loop {
            let last = next + lists[next];
            next++;
            var to = lists[next];
            let held = load_values(c, to);
            loop {
                next++;
                let source = lists[next];
                store_values(c, to, load_values(c, source));
                to = source;
                continuing {
                    break if next == last;
                }
            }
            store_values(c, to, held);
            next++;
            continuing {
                break if next == end;
            }
        }
    }
}

fn load_values(c: Columns, row: u32) -> Four {
    let at = c.at + row * c.row_stride;
    return Four(value_cache[at.x], value_cache[at.y], value_cache[at.z], value_cache[at.w]);
}

fn store_values(c: Columns, row: u32, units: Four) {
    let at = c.at + row * c.row_stride;
    if c.is_live.x {
        value_cache[at.x] = units.x;
    }
    if c.is_live.y {
        value_cache[at.y] = units.y;
    }
    if c.is_live.z {
        value_cache[at.z] = units.z;
    }
    if c.is_live.w {
        value_cache[at.w] = units.w;
    }
}
