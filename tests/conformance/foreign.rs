//! Buffers that cannot be bound: destroyed ones, those of another device, and those that wgpu refused to make.
//! Each is an error of the call that is handed one, with an error handler and without, and changes nothing.

use wgpu_kvcache::wgpu::{
    Backends, Buffer, BufferUsages, DeviceDescriptor, ErrorFilter, Instance, InstanceDescriptor,
    PollType, RequestAdapterOptions,
};
use wgpu_kvcache::{
    Attention, CacheOptions, CachePosition, DType, Error, Gpu, KVCache, StaticKVCache, TensorView,
};

use crate::kernels_run;
use crate::model::Block;
use crate::rig::{Rig, buffer, plain_gpu, upload};
use crate::wait::wait;

const APPEND: CachePosition<'_> = CachePosition::Append;

/// Two devices of one instance.
fn siblings() -> [Gpu; 2] {
    let mut descriptor = InstanceDescriptor::new_without_display_handle_from_env();
    if !kernels_run() {
        descriptor.backends = Backends::NOOP;
        descriptor.backend_options.noop.enable = true;
    }
    let instance = Instance::new(descriptor);
    [0, 1].map(|_| {
        // A noop adapter makes one device, so each has its own.
        let adapter =
            wait(instance.request_adapter(&RequestAdapterOptions::default())).expect("an adapter");
        let device = wait(adapter.request_device(&DeviceDescriptor::default()));
        let (device, queue) = device.expect("a device of WebGPU's limits");
        Gpu::new(device, queue).unwrap_or_else(|error| panic!("{error}"))
    })
}

fn source(gpu: &Gpu) -> Buffer {
    buffer(gpu, 2 * 2 * 4 * 4, BufferUsages::STORAGE | BufferUsages::COPY_SRC)
}

fn destroyed(gpu: &Gpu) -> Buffer {
    let buffer = source(gpu);
    buffer.destroy();
    buffer
}

fn refused(gpu: &Gpu) -> Buffer {
    let scope = gpu.device().push_error_scope(ErrorFilter::Validation);
    let buffer = buffer(gpu, gpu.device().limits().max_buffer_size + 4, BufferUsages::STORAGE);
    assert!(wait(scope.pop()).is_some(), "wgpu makes no such buffer");
    buffer
}

fn token(buffer: &Buffer) -> TensorView<'_> {
    TensorView::new(buffer, DType::F32, &[2, 2, 1, 4]).expect("a shape")
}

/// Hands a bad buffer in wherever a call takes one.
fn check(gpu: &Gpu, bad: &Buffer, name: &str) {
    let good = source(gpu);
    let output = source(gpu);
    let mut attention = Attention::new(gpu);
    for mut rig in [Rig::dynamic(gpu), Rig::fixed(gpu, 80, 2), Rig::paged(gpu, 16)] {
        rig.update(0, [2, 2, 5, 4], 4, APPEND);
        let before = rig.cache.stats();
        for (key, value) in [(bad, &good), (&good, bad), (bad, bad)] {
            for layer in [0, 1, 0, 1] {
                let refused = gpu.submit_pass("refused", |pass| {
                    let (key, value) = (token(key), token(value));
                    rig.cache.update(pass, &key, &value, layer, APPEND).map(|_| ())
                });
                assert_due(refused, name);
            }
        }
        let view = rig.cache.view(0).expect("it exists").expect("it was written");
        for (query, output) in [(bad, &output), (&good, bad), (bad, &output)] {
            let refused = gpu.submit_pass("refused", |pass| {
                let (query, output) = (token(query), token(output));
                attention.record(pass, &query, &view, &output, Default::default())
            });
            assert_due(refused, name);
        }
        assert_eq!(rig.cache.stats(), before, "{name}");
        rig.check(name);
        rig.update(0, [2, 2, 1, 4], 4, APPEND);
        rig.update(1, [1, 1, 1, 2], 2, APPEND);
        rig.check(name);
        let view = rig.cache.view(0).expect("it exists").expect("it was written");
        gpu.submit_pass("good", |pass| {
            let (query, output) = (token(&good), token(&output));
            attention.record(pass, &query, &view, &output, Default::default())
        })
        .expect("good buffers");
    }
}

fn assert_due(refused: Result<(), Error>, name: &str) {
    let error = refused.expect_err(name);
    assert!(!error.to_string().is_empty(), "{name}: {error}");
}

/// With `is_lenient`, errors go to a handler; without, they would be a panic.
fn each(run: impl Fn(Gpu)) {
    for is_lenient in [false, true] {
        let gpu = plain_gpu(|_| ());
        if is_lenient {
            gpu.device().on_uncaptured_error(std::sync::Arc::new(|_| ()));
        }
        run(gpu);
    }
}

#[test]
fn a_destroyed_buffer_is_refused() {
    each(|gpu| check(&gpu, &destroyed(&gpu), "destroyed"));
}

#[test]
fn a_buffer_that_was_never_made_is_refused() {
    each(|gpu| check(&gpu, &refused(&gpu), "never made"));
}

#[test]
fn a_buffer_of_another_device_is_refused() {
    for is_lenient in [false, true] {
        let [gpu, other] = siblings();
        if is_lenient {
            gpu.device().on_uncaptured_error(std::sync::Arc::new(|_| ()));
        }
        check(&gpu, &source(&other), "another device");
    }
}

/// Tensors and views know their device, of whatever instance it is.
#[test]
fn tensors_and_views_of_another_device_are_refused() {
    let [first, second] = siblings();
    let [third, fourth] = [plain_gpu(|_| ()), plain_gpu(|_| ())];
    for (gpu, other) in [(&first, &second), (&second, &third), (&third, &fourth), (&fourth, &first)]
    {
        let block = Block::noise([2, 2, 1, 4], 4, 3);
        let [own, foreign] = [gpu, other].map(|gpu| upload(gpu, DType::F32, &block));
        let output = upload(gpu, DType::F32, &block);
        let mut rig = Rig::paged(gpu, 4);
        rig.update(0, [2, 2, 5, 4], 4, APPEND);
        for (key, value) in [(&own, &foreign), (&foreign, &own)] {
            let refused = gpu.submit_pass("refused", |pass| {
                rig.cache.update(pass, &key.view(), &value.view(), 0, APPEND).map(|_| ())
            });
            assert!(refused.expect_err("another device").to_string().contains("device"));
        }
        rig.check("foreign tensors");
        let mut theirs = StaticKVCache::with_options(
            other,
            CacheOptions::default().with_max_cache_len(8).with_num_layers(1),
        )
        .expect("both options");
        let view = other.submit_pass("fill", |pass| {
            theirs.update(pass, &foreign.view(), &foreign.view(), 0, APPEND).map(|_| ())
        });
        view.expect("their own");
        let view = theirs.view(0).expect("it exists").expect("it was written");
        let own_view = rig.cache.view(0).expect("it exists").expect("it was written");
        let mut attention = Attention::new(gpu);
        for (query, view, output) in
            [(&own, &view, &output), (&foreign, &own_view, &output), (&own, &own_view, &foreign)]
        {
            let refused = gpu.submit_pass("refused", |pass| {
                attention.record(pass, &query.view(), view, &output.view(), Default::default())
            });
            assert!(refused.expect_err("another device").to_string().contains("device"));
        }
        gpu.submit_pass("good", |pass| {
            attention.record(pass, &own.view(), &own_view, &output.view(), Default::default())
        })
        .expect("its own");
    }
}

/// Two `Gpu`s of one device are one device.
#[test]
fn two_handles_of_one_device_work_together() {
    let gpu = plain_gpu(|_| ());
    let same = Gpu::new(gpu.device().clone(), gpu.queue().clone()).expect("the same device");
    let block = Block::noise([2, 2, 1, 4], 4, 3);
    let mut rig = Rig::dynamic(&gpu);
    let [key, output] = [0, 1].map(|_| upload(&same, DType::F32, &block));
    gpu.submit_pass("fill", |pass| {
        rig.cache.update(pass, &key.view(), &key.view(), 0, APPEND).map(|_| ())
    })
    .expect("the same device");
    rig.model.update(0, &block, &block, APPEND).expect("the same");
    rig.check("from the other handle");
    let view = rig.cache.view(0).expect("it exists").expect("it was written");
    same.submit_pass("attention", |pass| {
        let (query, output) = (key.view(), output.view());
        Attention::new(&same).record(pass, &query, &view, &output, Default::default())
    })
    .expect("the same device");
}

/// wgpu finds a buffer of another instance by a number that may not exist there, and panics.
#[test]
fn a_buffer_of_another_instance_is_refused() {
    let [gpu, other] = [plain_gpu(|_| ()), plain_gpu(|_| ())];
    // More buffers than the first instance has.
    let many: Vec<Buffer> = (0..200).map(|_| source(&other)).collect();
    check(&gpu, many.last().expect("200"), "another instance");
    other.device().poll(PollType::wait_indefinitely()).expect("a live device");
}
