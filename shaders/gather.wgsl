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

// Which moves there are, so that a kernel runs no others. Loops break at the end of their bodies: a software
// adapter runs to its end a body that all threads have left before, and takes a `continuing` block for the
// beginning of the next round.
override has_copies: bool = true;
override has_cycles: bool = true;

const WORKGROUP: u32 = 256u;
// Columns of a workgroup.
const TILE: u32 = 1024u;
// A thread's four columns are this many apart: eight neighbours read 128 bytes together, a line of a GPU's
// cache, and then the next line. So a CPU, which runs eight threads at a time, sees few streams and long.
const RUN: u32 = 8u;

// Four columns: where they lie in row 0, and which of them are there.
struct Columns {
    at: vec4<u32>,
    is_live: vec4<bool>,
    row_stride: u32,
}

fn columns(number: u32, first: u32, units: u32) -> Columns {
    // A workgroup that is one too many does as the last one, and writes nothing.
    let h = min(number, params.heads - 1u);
    let live = params.len * units;
    let head = params.capacity * units;
    let i = first + vec4(0u, 1u, 2u, 3u) * RUN;
    // A column past the end is read as the last one, and not written.
    let at = params.start * units + min(i, vec4(live - 1u));
    return Columns(
        h * head + select(at, at - head, at >= vec4(head)),
        (i < vec4(live)) & vec4(number < params.heads),
        params.heads * head,
    );
}

@compute @workgroup_size(WORKGROUP)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = group.x + groups.x * (group.y + groups.y * group.z);
    let h = number / params.tiles;
    let first = (number - h * params.tiles) * TILE + local / RUN * (4u * RUN) + local % RUN;
    let key = columns(h, first, params.key_units);
    let value = columns(h, first, params.value_units);
    var next = params.list_at;
    if has_copies {
        let end = params.list_at + params.cycles_at;
        loop {
            let held = load(key, value, lists[next]);
            let last = next + 1u + lists[next + 1u];
            next++;
            loop {
                next++;
                store(key, value, lists[next], held);
                if next == last {
                    break;
                }
            }
            next++;
            if next == end {
                break;
            }
        }
    }
    if has_cycles {
        let end = params.list_at + params.list_end;
        loop {
            let last = next + lists[next];
            next++;
            var to = lists[next];
            let held = load(key, value, to);
            loop {
                next++;
                let source = lists[next];
                store(key, value, to, load(key, value, source));
                to = source;
                if next == last {
                    break;
                }
            }
            store(key, value, to, held);
            next++;
            if next == end {
                break;
            }
        }
    }
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

fn load(key: Columns, value: Columns, row: u32) -> Held {
    let k = key.at + row * key.row_stride;
    let v = value.at + row * value.row_stride;
    return Held(
        Four(key_cache[k.x], key_cache[k.y], key_cache[k.z], key_cache[k.w]),
        Four(value_cache[v.x], value_cache[v.y], value_cache[v.z], value_cache[v.w]),
    );
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
