//! A device that truly runs out of memory: while a layer grows, while rows are gathered into new
//! buffers, and while a read-back is allocated. Each is an error, and afterwards the cache still holds
//! everything that it held.
//!
//! A software adapter allocates from the process, so the process is given less: `prlimit` (util-linux)
//! lowers its address space, for this binary alone. Elsewhere than on Linux, and on adapters with memory
//! of their own, there is no way to ask for this, and the test says so.

#![cfg(target_os = "linux")]

use std::process::Command;

use wgpu_kvcache::{
    Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, TensorView,
    wgpu,
};

/// Lets the process map this many bytes more than it has now, or as many as it likes.
fn allow(more: Option<u64>) {
    let limit = more.map_or("unlimited:unlimited".to_owned(), |more| {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
        let pages: u64 =
            statm.split(' ').next().and_then(|pages| pages.parse().ok()).expect("a page count");
        format!("{}:unlimited", pages * 4096 + more)
    });
    let status = Command::new("prlimit")
        .args(["--pid", &std::process::id().to_string(), &format!("--as={limit}")])
        .status()
        .expect("prlimit, from util-linux");
    assert!(status.success(), "prlimit --as={limit}");
}

const HEADS: usize = 8;
const DIM: usize = 64;

/// `batch` rows of `tokens` tokens whose every word is `mark`, in a buffer that all rows share.
fn source(gpu: &Gpu, tokens: usize, mark: u32) -> wgpu::Buffer {
    let words = vec![mark; tokens * HEADS * DIM];
    let buffer = gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some("source"),
        size: (words.len() * 4) as u64,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    gpu.queue().write_buffer(&buffer, 0, bytemuck::cast_slice(&words));
    buffer
}

fn append(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    source: &wgpu::Buffer,
    batch: usize,
    tokens: usize,
) -> Result<(), Error> {
    // A stride of zero along the batch: all rows are the same.
    let view = TensorView::new(source, DType::F32, &[batch, HEADS, tokens, DIM])?.with_strides([
        0,
        tokens * DIM,
        DIM,
        1,
    ]);
    gpu.submit_pass("append", |pass| {
        cache.update(pass, &view, &view, 0, CachePosition::Append).map(|_| ())
    })
}

/// Everything in the cache is `mark`, in this shape.
fn check(cache: &dyn KVCache, shape: [usize; 4], mark: u32) {
    let (key, value) = cache.get(0).expect("read back").expect("written");
    for tensor in [key, value] {
        assert_eq!(tensor.shape(), shape);
        let words: &[u32] = bytemuck::cast_slice(tensor.bytes());
        assert!(words.iter().all(|&word| word == mark), "a word is not {mark:x}");
    }
}

fn assert_out_of_memory<T: std::fmt::Debug>(answer: Result<T, Error>, what: &str) {
    match answer {
        Err(Error::OutOfMemory { bytes, label }) => {
            assert!(bytes > 0 && label.contains("kvcache"), "{what}: {bytes}, {label}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn out_of_memory_changes_nothing() {
    let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
    let info = gpu.device().adapter_info();
    if (info.device_type, info.backend) != (wgpu::DeviceType::Cpu, wgpu::Backend::Vulkan) {
        eprintln!("skipped: only software Vulkan takes its memory from the process and says so");
        return;
    }
    // 12 rows of 4096 tokens: K and V of 96 MiB each.
    const BATCH: usize = 12;
    const TOKENS: usize = 4096;
    const MARK: u32 = 0x7fc1_2345;
    let token = source(&gpu, 1, MARK);
    let prompt = source(&gpu, TOKENS / 4, MARK);
    let mut cache =
        DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(TOKENS))
            .expect("a capacity");
    for _ in 0..4 {
        append(&gpu, &mut cache, &prompt, BATCH, TOKENS / 4).expect("room");
    }
    let full = [BATCH, HEADS, TOKENS, DIM];
    check(&cache, full, MARK);
    let before = cache.stats();

    // While a read-back is allocated.
    allow(Some(24 << 20));
    assert_out_of_memory(cache.get(0), "get");
    assert_eq!(cache.stats(), before);
    allow(None);
    check(&cache, full, MARK);

    // While rows are gathered into new buffers: 15 rows need 120 MiB for each of K and V.
    let before = cache.stats();
    let rows: Vec<u32> = (0..15).map(|row| row % 12).collect();
    allow(Some(24 << 20));
    let answer = gpu.submit_pass("select", |pass| cache.batch_select_indices(pass, &rows));
    assert_out_of_memory(answer, "select");
    assert_eq!(cache.stats(), before);
    allow(None);
    check(&cache, full, MARK);
    gpu.submit_pass("select", |pass| cache.batch_select_indices(pass, &rows)).expect("memory");
    check(&cache, [15, HEADS, TOKENS, DIM], MARK);

    // While a layer grows: one token more than there is room for, in half of the rows.
    gpu.submit_pass("select", |pass| cache.batch_select_indices(pass, &rows[..7])).expect("rows");
    let before = cache.stats();
    allow(Some(24 << 20));
    let answer = append(&gpu, &mut cache, &token, 7, 1);
    assert_out_of_memory(answer, "growth");
    assert_eq!(cache.stats(), before);
    assert_eq!(cache.get_seq_length(0), Ok(TOKENS));
    allow(None);
    check(&cache, [7, HEADS, TOKENS, DIM], MARK);
    append(&gpu, &mut cache, &token, 7, 1).expect("memory");
    check(&cache, [7, HEADS, TOKENS + 1, DIM], MARK);
}
