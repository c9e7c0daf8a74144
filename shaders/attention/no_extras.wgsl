// Attention without masks, biases, sinks and row starts: what `extras.wgsl` has, for calls that use none of it.

fn first_token(b: u32) -> u32 {
    return 0u;
}

fn with_extras(item: Item, len: u32, row: vec4<u32>, token: u32, scored: Scored) -> Scored {
    return scored;
}

struct Sink {
    highest: vec4<f32>,
    total: vec4<f32>,
}

fn sinks(item: Item, row: vec4<u32>, is_first: bool) -> Sink {
    return Sink(vec4(LOWEST), vec4(0.0));
}
