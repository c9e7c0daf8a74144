//! Cases that are compared are measured in turns, a sample of each after the other.
//!
//! Other work on a machine, and where its scheduler happens to put a driver's threads, change what the same
//! work takes by a tenth and more, for seconds on end. Measured one after the other, two cases meet different
//! moments, and their ratio tells of these; measured in turns they meet the same.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use criterion::{Bencher, BenchmarkId, Criterion, SamplingMode, Throughput};

type Run<'a> = Box<dyn FnMut(&mut Bencher<'_>) + Send + 'a>;

struct Case<'a> {
    group: String,
    id: BenchmarkId,
    bytes: Option<u64>,
    run: Run<'a>,
}

/// Cases to be measured in turns.
#[derive(Default)]
pub(crate) struct Turns<'a> {
    cases: Vec<Case<'a>>,
}

impl<'a> Turns<'a> {
    /// Adds the case `group/id`, which moves so many bytes, where that tells something. What it needs is made
    /// and touched beforehand.
    pub(crate) fn add(
        &mut self,
        group: &str,
        id: BenchmarkId,
        bytes: Option<u64>,
        run: impl FnMut(&mut Bencher<'_>) + Send + 'a,
    ) {
        self.cases.push(Case { group: group.to_owned(), id, bytes, run: Box::new(run) });
    }

    /// Measures `samples` samples of each case. Criterion measures a case from its first sample to its last, so
    /// each has a thread, and one of these runs at a time.
    pub(crate) fn measure(self, samples: usize, warm_up: Duration) {
        let ring = Ring::new(self.cases.len());
        thread::scope(|scope| {
            for (id, mut case) in self.cases.into_iter().enumerate() {
                let ring = &ring;
                scope.spawn(move || {
                    let seat = ring.sit(id);
                    let mut criterion = Criterion::default().configure_from_args();
                    let mut group = criterion.benchmark_group(&case.group);
                    group.sample_size(samples).warm_up_time(warm_up);
                    // Samples as long as one another, so that turns are too.
                    group.sampling_mode(SamplingMode::Flat);
                    if let Some(bytes) = case.bytes {
                        group.throughput(Throughput::Bytes(bytes));
                    }
                    group.bench_function(case.id, |bencher| {
                        seat.pass();
                        (case.run)(bencher);
                    });
                });
            }
        });
    }
}

/// Whose turn it is: that of the first.
struct Ring {
    order: Mutex<VecDeque<usize>>,
    moved_on: Condvar,
}

impl Ring {
    fn new(seats: usize) -> Self {
        Self { order: Mutex::new((0..seats).collect()), moved_on: Condvar::new() }
    }

    /// Waits for the first turn of `id`.
    fn sit(&self, id: usize) -> Seat<'_> {
        self.wait(self.lock(), id);
        Seat { ring: self, id }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.order.lock().expect("nothing panics with the order in hand")
    }

    fn wait(&self, order: MutexGuard<'_, VecDeque<usize>>, id: usize) {
        let is_another = |order: &mut VecDeque<usize>| order.front() != Some(&id);
        drop(self.moved_on.wait_while(order, is_another).expect("as above"));
    }
}

/// A place in the ring, given up when dropped, a panic included.
struct Seat<'a> {
    ring: &'a Ring,
    id: usize,
}

impl Seat<'_> {
    /// Lets the others run, and waits until the turn comes round again.
    fn pass(&self) {
        let mut order = self.ring.lock();
        order.rotate_left(1);
        self.ring.moved_on.notify_all();
        self.ring.wait(order, self.id);
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.ring.lock().pop_front();
        self.ring.moved_on.notify_all();
    }
}
