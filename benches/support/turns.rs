//! Cases that are compared are measured in turns, a sample of each after the other.
//!
//! Other work on a machine, and its scheduler's choice of cores for a driver's threads, change the time of the same
//! work by a tenth and more for seconds. If two cases are measured one after the other, this changes their ratio. If
//! they are measured in turns, it affects both.

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
    /// Adds the case `group/id`, which moves `bytes` bytes if given. Its resources must have been created and written
    /// before.
    pub(crate) fn add(
        &mut self,
        group: &str,
        id: BenchmarkId,
        bytes: Option<u64>,
        run: impl FnMut(&mut Bencher<'_>) + Send + 'a,
    ) {
        self.cases.push(Case { group: group.to_owned(), id, bytes, run: Box::new(run) });
    }

    /// Measures `samples` samples of each case. Criterion measures a case from its first sample to its last without a
    /// break, so each case has a thread, and one of these runs at a time.
    pub(crate) fn measure(self, samples: usize, warm_up: Duration) {
        let ring = Ring::new(self.cases.len());
        thread::scope(|scope| {
            for (id, mut case) in self.cases.into_iter().enumerate() {
                let ring = &ring;
                scope.spawn(move || {
                    let slot = ring.join(id);
                    let mut criterion = Criterion::default().configure_from_args();
                    let mut group = criterion.benchmark_group(&case.group);
                    group.sample_size(samples).warm_up_time(warm_up);
                    // Samples of equal length, so that turns are equally long.
                    group.sampling_mode(SamplingMode::Flat);
                    if let Some(bytes) = case.bytes {
                        group.throughput(Throughput::Bytes(bytes));
                    }
                    group.bench_function(case.id, |bencher| {
                        slot.pass();
                        (case.run)(bencher);
                    });
                });
            }
        });
    }
}

/// The order of the cases. The first one has its turn.
struct Ring {
    order: Mutex<VecDeque<usize>>,
    moved_on: Condvar,
}

impl Ring {
    fn new(cases: usize) -> Self {
        Self { order: Mutex::new((0..cases).collect()), moved_on: Condvar::new() }
    }

    /// Waits for the first turn of `id`.
    fn join(&self, id: usize) -> Slot<'_> {
        self.wait(self.lock(), id);
        Slot { ring: self, id }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<usize>> {
        self.order.lock().expect("no thread panics while it holds the order")
    }

    fn wait(&self, order: MutexGuard<'_, VecDeque<usize>>, id: usize) {
        let is_another = |order: &mut VecDeque<usize>| order.front() != Some(&id);
        drop(self.moved_on.wait_while(order, is_another).expect("as above"));
    }
}

/// A case's entry in the ring. It is removed when dropped, also by a panic.
struct Slot<'a> {
    ring: &'a Ring,
    id: usize,
}

impl Slot<'_> {
    /// Gives the turn to the next case, and waits for its own next turn.
    fn pass(&self) {
        let mut order = self.ring.lock();
        order.rotate_left(1);
        self.ring.moved_on.notify_all();
        self.ring.wait(order, self.id);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.ring.lock().pop_front();
        self.ring.moved_on.notify_all();
    }
}
