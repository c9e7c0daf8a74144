//! Which buffers stay alive because of bind groups: few, and none after their layer is gone.
//!
//! The witness is wgpu itself, which logs each buffer that it destroys. A binary of its own, because a logger
//! is global and other tests would be counted as well.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use wgpu_kvcache::{
    Attention, AttentionOptions, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Gpu,
    KVCache, PagedKVCache, StaticKVCache, TensorView, wgpu,
};

/// Every line of wgpu's log that a test asks for.
struct Witness(Mutex<Vec<String>>);

static WITNESS: Witness = Witness(Mutex::new(Vec::new()));
/// One test at a time: the witness cannot tell them apart.
static ALONE: Mutex<()> = Mutex::new(());

impl log::Log for Witness {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("wgpu_core")
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = record.args().to_string();
            if line.starts_with("Destroy raw Buffer")
                || line.starts_with("Device::create_bind_group ")
            {
                self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
        }
    }

    fn flush(&self) {}
}

fn alone() -> MutexGuard<'static, ()> {
    static INSTALL: Once = Once::new();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    INSTALL.call_once(|| {
        log::set_logger(&WITNESS).expect("no other logger");
        log::set_max_level(log::LevelFilter::Trace);
    });
    WITNESS.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    alone
}

/// Lines so far that contain `text`.
fn count(text: &str) -> usize {
    let lines = WITNESS.0.lock().unwrap_or_else(PoisonError::into_inner);
    lines.iter().filter(|line| line.contains(text)).count()
}

/// Buffers with this label that are gone, once the device has done all its work.
fn gone(gpu: &Gpu, label: &str) -> usize {
    gpu.queue().submit([]);
    gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("the device answers");
    count(&format!("'{label}'"))
}

const HEADS: usize = 2;
const DIM: usize = 16;

fn buffer(gpu: &Gpu, label: &str, heads: usize) -> wgpu::Buffer {
    gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size: (heads * DIM * 4) as u64,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    })
}

fn view(buffer: &wgpu::Buffer, heads: usize) -> TensorView<'_> {
    TensorView::new(buffer, DType::F32, &[1, heads, 1, DIM]).expect("a shape")
}

/// Appends a token to a layer.
fn append(gpu: &Gpu, cache: &mut dyn KVCache, layer: usize, [key, value]: [&wgpu::Buffer; 2]) {
    gpu.submit_pass("append", |pass| {
        let (key, value) = (view(key, HEADS), view(value, HEADS));
        cache.update(pass, &key, &value, layer, CachePosition::Append).map(|_| ())
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

/// Four query heads a K/V head.
fn attend(
    gpu: &Gpu,
    attention: &mut Attention,
    cache: &dyn KVCache,
    layer: usize,
    [query, output]: [&wgpu::Buffer; 2],
) {
    let layer = cache.view(layer).expect("it exists").expect("it was written");
    let options = AttentionOptions::default();
    gpu.submit_pass("attend", |pass| {
        let (query, output) = (view(query, 4 * HEADS), view(output, 4 * HEADS));
        attention.record(pass, &query, &layer, &output, options)
    })
    .unwrap_or_else(|error| panic!("{error}"));
}

fn pair(gpu: &Gpu, label: &str, heads: usize) -> [wgpu::Buffer; 2] {
    [0, 1].map(|_| buffer(gpu, label, heads))
}

fn kinds(gpu: &Gpu) -> [Box<dyn KVCache>; 3] {
    [
        Box::new(DynamicKVCache::new(gpu)),
        Box::new(
            StaticKVCache::with_options(
                gpu,
                CacheOptions::default().with_max_cache_len(4000).with_num_layers(40),
            )
            .expect("both options"),
        ),
        Box::new(PagedKVCache::new(gpu)),
    ]
}

fn gpu() -> Gpu {
    Gpu::headless().unwrap_or_else(|error| panic!("{error}"))
}

/// Of buffers that are made anew at every call none is kept.
#[test]
fn buffers_that_come_once_are_let_go() {
    let _alone = alone();
    let gpu = gpu();
    for (number, mut cache) in kinds(&gpu).into_iter().enumerate() {
        let mut attention = Attention::new(&gpu);
        let (sources, heads) = (format!("new {number}"), format!("heads {number}"));
        for _ in 0..40 {
            append(&gpu, cache.as_mut(), 0, pair(&gpu, &sources, HEADS).each_ref());
            let pair = pair(&gpu, &heads, 4 * HEADS);
            attend(&gpu, &mut attention, cache.as_ref(), 0, pair.each_ref());
        }
        assert_eq!(gone(&gpu, &sources), 80, "of new K and V");
        assert_eq!(gone(&gpu, &heads), 80, "of q and the output");
    }
}

/// Of buffers that come again few are kept, however many there are.
#[test]
fn few_of_those_that_come_again_are_kept() {
    let _alone = alone();
    let gpu = gpu();
    let mut cache = DynamicKVCache::new(&gpu);
    let mut attention = Attention::new(&gpu);
    append(&gpu, &mut cache, 0, pair(&gpu, "first", HEADS).each_ref());
    for _ in 0..40 {
        let pair = pair(&gpu, "often", 4 * HEADS);
        for _ in 0..5 {
            attend(&gpu, &mut attention, &cache, 0, pair.each_ref());
        }
    }
    assert!(gone(&gpu, "often") >= 2 * (40 - 4), "{} of 80 are gone", gone(&gpu, "often"));
    attention.release();
    assert_eq!(gone(&gpu, "often"), 80, "after the release");
}

/// Buffers that came often go when their layer is reset, grows or is dropped, or with the `Attention`; and
/// the layer's own go with it.
#[test]
fn nothing_outlives_its_layer() {
    let _alone = alone();
    let gpu = gpu();
    for (number, end) in
        ["reset", "grow", "drop", "drop attention", "release"].into_iter().enumerate()
    {
        let mut attention = Some(Attention::new(&gpu));
        let mut cache = Some(DynamicKVCache::new(&gpu));
        let label = format!("{end} {number}");
        let sources = pair(&gpu, "source", HEADS);
        {
            let (attention, cache) =
                (attention.as_mut().expect("made"), cache.as_mut().expect("made"));
            append(&gpu, cache, 0, sources.each_ref());
            let pair = pair(&gpu, &label, 4 * HEADS);
            for _ in 0..5 {
                attend(&gpu, attention, cache, 0, pair.each_ref());
            }
        }
        assert_eq!(gone(&gpu, &label), 0, "kept for the next call");
        let own = gone(&gpu, "kvcache layer 0 key");
        match end {
            "reset" => cache.as_mut().expect("made").reset(),
            "grow" => {
                for _ in 0..200 {
                    append(&gpu, cache.as_mut().expect("made"), 0, sources.each_ref());
                }
            }
            "drop" => drop(cache.take()),
            "drop attention" => drop(attention.take()),
            _ => attention.as_mut().expect("made").release(),
        }
        assert_eq!(gone(&gpu, &label), 2, "{end}: q and the output");
        let own = gone(&gpu, "kvcache layer 0 key") - own;
        // From 64 tokens to 128, and to 256.
        let expected = match end {
            "grow" => 2,
            "drop" => 1,
            _ => 0,
        };
        assert_eq!(own, expected, "{end}: K");
    }
}

/// One `Attention` for all layers of a model, with buffers for each or for all: from the third step on no bind
/// group is made, whether rows are split or not.
#[test]
fn a_steady_step_of_thirty_layers_makes_no_bind_group() {
    let _alone = alone();
    const LAYERS: usize = 30;
    let gpu = gpu();
    for filled in [1, 2100] {
        for mut cache in kinds(&gpu) {
            let mut attention = Attention::new(&gpu);
            let one = pair(&gpu, "all layers", HEADS);
            let heads: Vec<_> = (0..LAYERS).map(|_| pair(&gpu, "one layer", 4 * HEADS)).collect();
            let ones = vec![1.0_f32; HEADS * filled * DIM];
            let prompt = gpu.upload(&ones, &[1, HEADS, filled, DIM]).expect("it fits");
            gpu.submit_pass("fill", |pass| {
                for layer in 0..LAYERS {
                    let prompt = prompt.view();
                    cache
                        .update(pass, &prompt, &prompt, layer, CachePosition::Append)
                        .expect("it fits");
                }
            });
            let mut step = || {
                let before = count("Device::create_bind_group ");
                for layer in 0..LAYERS {
                    append(&gpu, cache.as_mut(), layer, one.each_ref());
                    let pair = heads[if filled == 1 { 0 } else { layer }].each_ref();
                    attend(&gpu, &mut attention, cache.as_ref(), layer, pair);
                }
                let made = count("Device::create_bind_group ") - before;
                gpu.device().poll(wgpu::PollType::wait_indefinitely()).expect("it answers");
                made
            };
            let made: Vec<_> = (0..12).map(|_| step()).collect();
            assert!(made[0] >= 2 * LAYERS, "the witness would see it: {made:?}");
            assert_eq!(made[2..], [0; 10], "{filled} tokens: {made:?}");
        }
    }
}
