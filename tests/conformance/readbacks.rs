//! What a read-back asks of the device and of the executor that it runs on.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

use wgpu_kvcache::wgpu::PollType;
use wgpu_kvcache::{CachePosition, DType, Error, GetFuture};

use crate::gpu;
use crate::model::Block;
use crate::rig::{Rig, compare, plain_gpu, upload};

const APPEND: CachePosition<'_> = CachePosition::Append;

fn rigs() -> [Rig; 3] {
    [Rig::dynamic(&gpu()), Rig::fixed(&gpu(), 20, 3), Rig::paged(&gpu(), 4)].map(|mut rig| {
        rig.update(0, [2, 2, 5, 4], 4, APPEND);
        rig
    })
}

/// A token in a pass that is not submitted yet.
fn recorded(rig: &mut Rig) -> wgpu_kvcache::wgpu::CommandBuffer {
    let block = Block::noise([2, 2, 1, 4], 4, 9);
    let token = upload(&rig.gpu, DType::F32, &block);
    let mut encoder = rig.gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    rig.cache
        .update(&mut pass, &token.view(), &token.view(), 0, APPEND)
        .map(|_| ())
        .expect("a valid update");
    drop(pass);
    rig.model.update(0, &block, &block, APPEND).expect("the same");
    encoder.finish()
}

/// One thread, two tasks: the other one submits what the read-back is waiting for, after the bytes that it
/// asked for first have arrived.
#[test]
fn another_task_of_the_executor_gets_its_turn() {
    for mut rig in rigs() {
        let commands = recorded(&mut rig);
        let gpu = rig.gpu.clone();
        let mut read = pin!(rig.cache.get_async(0));
        let mut context = Context::from_waker(Waker::noop());
        assert!(read.as_mut().poll(&mut context).is_pending(), "nothing has arrived yet");
        gpu.device().poll(PollType::wait_indefinitely()).expect("a live device");
        for _ in 0..3 {
            let Poll::Pending = read.as_mut().poll(&mut context) else {
                panic!("the other task got no turn");
            };
        }
        gpu.queue().submit([commands]);
        let got = block_on(read).0.expect("everything is submitted");
        compare(got, rig.model.get(0), "submitted by another task");
    }
}

struct Unpark {
    thread: Thread,
    wakes: AtomicU64,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.wakes.fetch_add(1, Ordering::AcqRel);
        self.thread.unpark();
    }
}

/// Sleeps until it is woken. The answer, and how often the future was polled.
fn block_on(mut future: Pin<&mut GetFuture<'_>>) -> (<GetFuture<'static> as Future>::Output, u64) {
    let unpark = Arc::new(Unpark { thread: std::thread::current(), wakes: AtomicU64::new(0) });
    let waker = Waker::from(Arc::clone(&unpark));
    let mut context = Context::from_waker(&waker);
    for polls in 1.. {
        let wakes = unpark.wakes.load(Ordering::Acquire);
        if let Poll::Ready(answer) = future.as_mut().poll(&mut context) {
            return (answer, polls);
        }
        while unpark.wakes.load(Ordering::Acquire) == wakes {
            std::thread::park();
        }
    }
    unreachable!("the polls do not run out")
}

/// While the device works, and while a pass is not submitted, a future is polled now and then.
#[test]
fn a_future_does_not_spin() {
    for mut rig in rigs() {
        let commands = recorded(&mut rig);
        let start = Instant::now();
        let (answer, polls) = block_on(pin!(rig.cache.get_async(0)));
        let due = 100 + 4 * u64::try_from(start.elapsed().as_millis()).expect("a short wait");
        assert!(matches!(answer, Err(Error::NotSubmitted { calls: 1 })), "{answer:?}");
        assert!((2..due).contains(&polls), "{polls} polls, at most {due}");
        rig.gpu.queue().submit([commands]);
        rig.check("submitted");
    }
}

/// A future may be given up at any time.
#[test]
fn a_future_that_is_dropped_leaves_nothing_behind() {
    for mut rig in rigs() {
        for polls in 0..3 {
            let mut read = pin!(rig.cache.get_async(0));
            for _ in 0..polls {
                let mut context = Context::from_waker(Waker::noop());
                if read.as_mut().poll(&mut context).is_ready() {
                    break;
                }
            }
        }
        rig.check("given up");
        rig.update(0, [2, 2, 3, 4], 4, APPEND);
        rig.check("written on");
    }
}

/// Rows that share their pages come out one by one, and are more bytes than a buffer may have.
#[test]
fn rows_that_share_pages_are_read_in_pieces() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 1 << 20;
    });
    for (dtype, heads, dim, value_dim) in
        [(DType::F32, 1, 32, 32), (DType::F32, 2, 16, 3), (DType::F16, 1, 6, 64)]
    {
        let mut rig = Rig::paged(&gpu, 16);
        rig.update_as(dtype, 0, [1, heads, 2000, dim], value_dim, APPEND);
        rig.check("one row");
        rig.repeat_interleave(8);
        rig.check("eight rows");
        rig.update_as(dtype, 0, [8, heads, 3, dim], value_dim, APPEND);
        rig.crop(1990);
        rig.select(&[7, 0, 3, 3, 2, 1, 0, 4, 5, 6, 6]);
        rig.check("eleven rows");
        let got = pollster::block_on(rig.cache.get_async(0)).expect("submitted");
        compare(got, rig.model.get(0), "eleven rows, without blocking");
    }
}

/// A layer as large as a buffer may be is read back, too.
#[test]
fn a_layer_as_large_as_a_buffer_is_read_back() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 1 << 20;
    });
    let mut rig = Rig::fixed(&gpu, 4096, 1);
    rig.update(0, [2, 1, 4096, 32], 32, APPEND);
    rig.check("full");
    rig.crop(0);
    rig.check("empty");
    rig.crop(0);
    rig.truncate(0);
    let mut rig = Rig::paged(&gpu, 16);
    rig.update(0, [2, 1, 4096, 32], 32, APPEND);
    rig.check("full");
}
