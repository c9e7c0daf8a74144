//! The kernels between the matrix products against plain arithmetic in f64 on the host.

use super::*;

/// Numbers of both signs, of several magnitudes.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| {
        let mixed = u16::try_from((i * 7919 + seed * 104_729) % 2003).expect("few");
        (f32::from(mixed) / 1001.0 - 1.0) * [1.0, 30.0, 0.01][i % 3]
    };
    (0..count).map(number).collect()
}

fn constant(n: usize) -> f64 {
    f64::from(u32::try_from(n).expect("few"))
}

/// A buffer of numbers.
fn floats(gpu: &Gpu, numbers: &[f32]) -> wgpu::Buffer {
    let words: Vec<u32> = numbers.iter().map(|number| number.to_bits()).collect();
    buffer(gpu, &words, wgpu::BufferUsages::STORAGE)
}

fn whole(buffer: &wgpu::Buffer) -> Bound<'_> {
    Bound::Buffer(buffer.as_entire_buffer_binding())
}

/// A texture that a kernel writes, and its numbers after that.
struct Output {
    texture: wgpu::Texture,
    view: wgpu::TextureView,
}

impl Output {
    fn new(gpu: &Gpu, columns: usize, rows: usize) -> Self {
        let [width, height] = [columns / 4, rows].map(|n| u32::try_from(n).expect("few"));
        let texture = gpu.device().create_texture(&wgpu::TextureDescriptor {
            label: None,
            size: wgpu::Extent3d { width, height, depth_or_array_layers: 1 },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: wgpu::TextureFormat::Rgba32Float,
            usage: wgpu::TextureUsages::STORAGE_BINDING | wgpu::TextureUsages::COPY_SRC,
            view_formats: &[],
        });
        let view = texture.create_view(&wgpu::TextureViewDescriptor::default());
        Self { texture, view }
    }

    fn read(&self, gpu: &Gpu) -> Vec<f32> {
        let size = self.texture.size();
        let row = (16 * size.width).next_multiple_of(wgpu::COPY_BYTES_PER_ROW_ALIGNMENT);
        let words = (row / 4 * size.height) as usize;
        let copy = buffer(gpu, &vec![0; words], wgpu::BufferUsages::COPY_DST);
        let mut encoder =
            gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let layout = wgpu::TexelCopyBufferLayout {
            offset: 0,
            bytes_per_row: Some(row),
            rows_per_image: None,
        };
        encoder.copy_texture_to_buffer(
            self.texture.as_image_copy(),
            wgpu::TexelCopyBufferInfo { buffer: &copy, layout },
            size,
        );
        gpu.queue().submit([encoder.finish()]);
        let padded = read(gpu, &copy);
        let rows = padded.chunks_exact((row / 4) as usize);
        rows.flat_map(|row| row[..(4 * size.width) as usize].to_vec()).collect()
    }
}

/// What a row is after its norm.
fn normed(row: &[f32], weight: &[f32], epsilon: f64) -> Vec<f64> {
    let squares: f64 = row.iter().map(|&x| f64::from(x).powi(2)).sum();
    let scale = (squares / constant(row.len()) + epsilon).sqrt().recip();
    row.iter().zip(weight).map(|(&x, &weight)| f64::from(x) * scale * f64::from(weight)).collect()
}

#[track_caller]
fn assert_near(got: &[f32], due: &[f64], what: &str) {
    assert_eq!(got.len(), due.len(), "{what}");
    for (i, (&got, due)) in got.iter().zip(due).enumerate() {
        let error = (f64::from(got) - due).abs();
        assert!(error <= 1e-5 * (due.abs() + 1e-2), "{what}, number {i}: {got} for {due}");
    }
}

/// Rows narrower and wider than a workgroup; for the head only the rows that it reads, in its order.
#[test]
fn rms_norm_of_all_rows_and_of_the_last_ones() {
    const EPSILON: f64 = 1e-3;
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let wgsl = normalising(include_str!("../../../shaders/rms_norm.wgsl"));
    for width in [20, 640] {
        let (hidden, weight) = (numbers(5 * width, 1), numbers(width, 2));
        let rows: Vec<_> = hidden.chunks(width).map(|row| normed(row, &weight, EPSILON)).collect();
        for picked in [&[0, 1, 2, 3, 4][..], &[4, 1]] {
            let is_last = picked.len() < rows.len();
            let constants = [
                ("WIDTH", constant(width)),
                ("EPSILON", EPSILON),
                ("LAST", f64::from(u8::from(is_last))),
            ];
            let kernel = kernel(&gpu, "norm", &wgsl, &[Read, Read, Read, Store], &constants);
            let ends: Vec<u32> = picked.iter().map(|&row| u32::try_from(row).unwrap()).collect();
            let ends = buffer(&gpu, &ends, wgpu::BufferUsages::STORAGE);
            let [weight, hidden] = [&weight, &hidden].map(|it| floats(&gpu, it));
            let output = Output::new(&gpu, width, picked.len());
            let bound =
                [whole(&ends), whole(&weight), whole(&hidden), Bound::Texture(&output.view)];
            let group = kernel.bind(&gpu, &bound);
            let count = u32::try_from(picked.len()).expect("few");
            gpu.submit_pass("test", |pass| kernel.dispatch(pass, &group, count, 1));
            let due: Vec<f64> = picked.iter().flat_map(|&row: &usize| rows[row].clone()).collect();
            assert_near(&output.read(&gpu), &due, &format!("width {width}, rows {picked:?}"));
        }
    }
}

/// The norm of a branch is added to what the residual stream holds.
#[test]
fn a_post_norm_adds_to_the_residual_stream() {
    const EPSILON: f64 = 1e-3;
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let wgsl = normalising(include_str!("../../../shaders/post_norm.wgsl"));
    for width in [20, 640] {
        let (branch, hidden) = (numbers(3 * width, 3), numbers(3 * width, 4));
        let weight = numbers(width, 5);
        let added = branch.chunks(width).flat_map(|row| normed(row, &weight, EPSILON));
        let due: Vec<f64> =
            added.zip(&hidden).map(|(it, &before)| it + f64::from(before)).collect();
        let constants = [("WIDTH", constant(width)), ("EPSILON", EPSILON)];
        let kernel = kernel(&gpu, "post norm", &wgsl, &[Read, Read, Write], &constants);
        let [weight, branch, hidden] = [&weight, &branch, &hidden].map(|it| floats(&gpu, it));
        let group = kernel.bind(&gpu, &[&weight, &branch, &hidden].map(whole));
        gpu.submit_pass("test", |pass| kernel.dispatch(pass, &group, 3, 1));
        assert_near(&read(&gpu, &hidden), &due, &format!("width {width}"));
    }
}

/// Each query and key head has a norm of its own, with the weights of its kind; values stay.
#[test]
fn a_head_norm_leaves_values_alone() {
    const EPSILON: f64 = 1e-3;
    const HEADS: usize = 3;
    const KV_HEADS: usize = 2;
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let wgsl = normalising(include_str!("../../../shaders/head_norm.wgsl"));
    for head_dim in [12, 256] {
        let all = HEADS + 2 * KV_HEADS;
        let (weight, before) = (numbers(2 * head_dim, 6), numbers(4 * all * head_dim, 7));
        let heads = before.chunks(head_dim).enumerate();
        let due: Vec<f64> = heads
            .flat_map(|(i, head)| match i % all {
                i if i < HEADS => normed(head, &weight[..head_dim], EPSILON),
                i if i < HEADS + KV_HEADS => normed(head, &weight[head_dim..], EPSILON),
                _ => head.iter().copied().map(f64::from).collect(),
            })
            .collect();
        let constants = [
            ("HEADS", constant(HEADS)),
            ("KV_HEADS", constant(KV_HEADS)),
            ("HEAD_DIM", constant(head_dim)),
            ("EPSILON", EPSILON),
        ];
        let kernel = kernel(&gpu, "head norm", &wgsl, &[Read, Write], &constants);
        let [weight, projected] = [&weight, &before].map(|it| floats(&gpu, it));
        let group = kernel.bind(&gpu, &[&weight, &projected].map(whole));
        let normed = u32::try_from(HEADS + KV_HEADS).expect("few");
        gpu.submit_pass("test", |pass| kernel.dispatch(pass, &group, normed, 4));
        assert_near(&read(&gpu, &projected), &due, &format!("heads of {head_dim}"));
    }
}

/// Queries and keys turn by the angle of their position, values stay. Whatever elements a pair has, its
/// turned elements are neighbours.
#[test]
fn rope_turns_pairs_of_neighbours_and_of_halves() {
    const HEADS: usize = 3;
    const KV_HEADS: usize = 2;
    const PAIRS: usize = 6;
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let positions = [5_u32, 0, 9];
    let angles: Vec<f64> =
        (0..10 * PAIRS).map(|i| constant(i / PAIRS) * 0.3_f64.powf(constant(i % PAIRS))).collect();
    #[expect(clippy::cast_possible_truncation, reason = "what the shader takes")]
    let turns: Vec<f32> =
        angles.iter().flat_map(|angle| [angle.cos() as f32, angle.sin() as f32]).collect();
    let all = HEADS + 2 * KV_HEADS;
    let projected = numbers(positions.len() * all * 2 * PAIRS, 8);
    for halves in [false, true] {
        // Pairs of each kind of head, in order: queries, keys, values.
        let mut due = [Vec::new(), Vec::new(), Vec::new()];
        for (i, head) in projected.chunks(2 * PAIRS).enumerate() {
            let position = positions[i / all] as usize;
            let kind = usize::from(i % all >= HEADS) + usize::from(i % all >= HEADS + KV_HEADS);
            for pair in 0..PAIRS {
                let [x, y] = if halves && kind < 2 {
                    [head[pair], head[PAIRS + pair]]
                } else {
                    [head[2 * pair], head[2 * pair + 1]]
                }
                .map(f64::from);
                let (sin, cos) = angles[position * PAIRS + pair].sin_cos();
                let turned = [x * cos - y * sin, x * sin + y * cos];
                due[kind].extend(if kind < 2 { turned } else { [x, y] });
            }
        }
        let constants = [
            ("HEADS", constant(HEADS)),
            ("KV_HEADS", constant(KV_HEADS)),
            ("PAIRS", constant(PAIRS)),
            ("HALVES", f64::from(u8::from(halves))),
        ];
        let wgsl = include_str!("../../../shaders/rope.wgsl");
        let binds = [Read, Read, Read, Write, Write, Write];
        let kernel = kernel(&gpu, "rope", wgsl, &binds, &constants);
        let zeros = |count: usize| buffer(&gpu, &vec![0; count], wgpu::BufferUsages::STORAGE);
        let [query, key, value] = [0, 1, 2].map(|kind: usize| zeros(due[kind].len()));
        let at = buffer(&gpu, &positions, wgpu::BufferUsages::STORAGE);
        let [turns, projected] = [&turns, &projected].map(|it| floats(&gpu, it));
        let bound = [&at, &turns, &projected, &query, &key, &value].map(whole);
        let group = kernel.bind(&gpu, &bound);
        gpu.submit_pass("test", |pass| kernel.dispatch(pass, &group, 1, 3));
        for (kind, (buffer, due)) in [query, key, value].iter().zip(due).enumerate() {
            let got = read(&gpu, buffer);
            assert_eq!(got.len(), due.len());
            for (i, (got, due)) in got.into_iter().zip(due).enumerate() {
                let error = (f64::from(got) - due).abs();
                let bound = 1e-5 * (due.abs() + 0.1);
                assert!(
                    error <= bound,
                    "halves: {halves}, kind {kind}, number {i}: {got} for {due}"
                );
            }
        }
    }
}

/// Small and large gates of both signs: a gate far from zero is passed as it is, or not at all.
#[test]
fn gates_are_silu_and_gelu() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let gate: Vec<f32> =
        [numbers(56, 9), vec![1e4, -1e4, 88.0, -88.0, 1e-20, 0.0, 12.0, -12.0]].concat();
    let up = numbers(64, 10);
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let gelu = |x: f64| 0.5 * x * (1.0 + (root * (x + 0.044_715 * x.powi(3))).tanh());
    for (is_gelu, act) in [(0.0, &silu as &dyn Fn(f64) -> f64), (1.0, &gelu)] {
        // Two rows: the same numbers, and in reverse.
        let rows = [(gate.clone(), up.clone()), (up.clone(), gate.clone())];
        let projected: Vec<f32> =
            rows.iter().flat_map(|(gate, up)| [gate.clone(), up.clone()].concat()).collect();
        let due = rows.iter().flat_map(|(gate, up)| gate.iter().zip(up));
        let due: Vec<f64> = due.map(|(&gate, &up)| act(f64::from(gate)) * f64::from(up)).collect();
        let constants = [("WIDTH", constant(gate.len())), ("GELU", is_gelu)];
        let wgsl = include_str!("../../../shaders/gate.wgsl");
        let kernel = kernel(&gpu, "gate", wgsl, &[Read, Store], &constants);
        let projected = floats(&gpu, &projected);
        let output = Output::new(&gpu, gate.len(), 2);
        let group = kernel.bind(&gpu, &[whole(&projected), Bound::Texture(&output.view)]);
        gpu.submit_pass("test", |pass| kernel.dispatch(pass, &group, 1, 2));
        assert_near(&output.read(&gpu), &due, if is_gelu > 0.0 { "gelu" } else { "silu" });
    }
}

/// Embeddings are multiplied by the scale of the model.
#[test]
fn embeddings_are_scaled() {
    const WIDTH: usize = 20;
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let (stored, plain) = rows(Format::F32, WIDTH, b"scaled");
    let matrix = upload(&gpu, Format::F32, WIDTH, &stored);
    let constants = [("WIDTH", constant(WIDTH)), ("SCALE", 25.5)];
    let kernel = kernel(&gpu, "embed", &embed_wgsl(Format::F32), EMBED_BINDS, &constants);
    let embed = Embed([(Format::F32, kernel)].into());
    let tokens = buffer(&gpu, &[69, 3], wgpu::BufferUsages::STORAGE);
    let hidden = floats(&gpu, &[0.0; 2 * WIDTH]);
    let bound = embed.bind(&gpu, &matrix, &tokens, &hidden).expect("bind groups");
    gpu.submit_pass("test", |pass| embed.dispatch(pass, &bound, 20, 2));
    let due = plain[69 * WIDTH..].iter().chain(&plain[3 * WIDTH..4 * WIDTH]);
    let due: Vec<f64> = due.map(|&number| 25.5 * f64::from(number)).collect();
    assert_near(&read(&gpu, &hidden), &due, "embeddings");
}
