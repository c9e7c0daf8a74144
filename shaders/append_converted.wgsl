// Writes new tokens of K and V into a layer, each at its position, in the layer's formats.
//
// A thread converts a piece of one token of one head, of K and of V: 64 elements, which are two blocks of a quantized
// format and share a word of scales. Everything that decides a bit is done with integers, or with floats whose results
// are exact, so that every device stores the same bits. `append/common.wgsl` is joined (parameters, bindings,
// positions), `append/convert.wgsl`, `append/side.wgsl` and one of
// `append/side_vectors.wgsl` and `append/side_words.wgsl` for K and for V, and a text of `layout/`.
//
// group 0, binding 0: key_source     new K, any strides over (B, H, T), elements of a head adjacent
// group 0, binding 1: value_source   new V, likewise
// group 0, binding 2: key_cache      K in its format: elements of all slots, then scales
// group 0, binding 3: value_cache    V likewise
// group 1, binding 0: lists          positions that are not a plain run, as in `append/common.wgsl`; pages, records of
//                                    ragged rows
// group 1, binding 1: witness        counts the calls that ran
// group 2, binding 0: params         a uniform, or immediate data where the device has it

// What is written.
alias Target = u32;

// Formats: 0 f32, 1 f16, 2 bf16, 3 q8_0, 4 q4_0; new K and V are of one of the first three.
override source_type: u32 = 0u;
override key_format: u32 = 3u;
override value_format: u32 = 3u;
// Whether the source is (B, T, H, D): then neighbouring threads take the heads of a token, else the tokens of a head.
override is_bthd: bool = false;
// Threads of a workgroup: fewer for a step, whose pieces are few.
override threads: u32 = 64u;

@compute @workgroup_size(threads)
fn main(
    @builtin(local_invocation_index) local: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let number = (group.x + groups.x * (group.y + groups.y * group.z)) * threads + local;
    let piece = number % params.tiles;
    let row = number / params.tiles;
    let heads = params.kv.heads;
    var h = row / params.entries % heads;
    var entry = row % params.entries;
    if is_bthd {
        h = row % heads;
        entry = row / heads % params.entries;
    }
    let batch = select(params.kv.batch, 1u, position_form == 2u);
    let b = row / heads / params.entries;
    // A thread that is one too many reads what another reads, and writes nothing.
    let row_of_source = min(b, batch - 1u);
    let place = place_of(row_of_source, vec4(entry), vec4(b < batch));
    let slot = kv_slot(params.kv, place.row.x, h, place.position.x);
    let key = first_units(params.key, row_of_source, vec4(h)).x + place.token.x * params.key.stride_t;
    write_key(key, slot, piece, place.is_zero.x, place.is_written.x);
    let value = first_units(params.value, row_of_source, vec4(h)).x + place.token.x * params.value.stride_t;
    write_value(value, slot, piece, place.is_zero.x, place.is_written.x);
    if number == 0u {
        atomicAdd(&witness, 1u);
    }
}
