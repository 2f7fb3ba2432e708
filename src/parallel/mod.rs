//! Work on several threads, with the same bits whatever their number.
//!
//! Work is split into chunks that depend on the shapes alone. Threads claim chunks dynamically,
//! each chunk writes its own output, and reductions run afterwards in the order of the chunks. The
//! threads are those of PyTorch's OpenMP where it is loaded, else a rayon pool's.

mod openmp;
mod pool;

#[cfg(feature = "python")]
pub(crate) use openmp::remember_process;
use std::any::Any;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `work(i)` for every `i` below `chunks` on at most `threads` threads, the caller's included.
///
/// The calling thread begins at once and returns when every chunk is done. It does not wait for
/// every helper to wake up, which takes longer than a small call.
pub(crate) fn for_each(threads: usize, chunks: usize, work: impl Fn(usize) + Sync) {
    let helpers = threads.min(chunks).saturating_sub(1);
    if helpers == 0 {
        return (0..chunks).for_each(work);
    }
    let work: &(dyn Fn(usize) + Sync) = &work;
    if on_openmp(threads, chunks, work) {
        return;
    }
    // SAFETY: the reference is not used after its lifetime: `Chunks::drain` follows it for claimed
    // chunks alone, and this function returns after every chunk has been claimed and finished.
    let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
    let queue = Arc::new(Chunks::new(threads, chunks, work));
    if let Some(pool) = pool::of(helpers) {
        for _ in 0..helpers {
            let queue = Arc::clone(&queue);
            pool.spawn(move || queue.drain());
        }
    }
    queue.drain();
    queue.wait();
}

/// On OpenMP's threads, if there are any; on all of them, else OpenMP would create a new team.
fn on_openmp(threads: usize, chunks: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
    let queue = Chunks::new(threads, chunks, work);
    let done = openmp::run(threads, &|| queue.drain());
    if done {
        queue.resume_panic();
    }
    done
}

struct Chunks<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    count: usize,
    /// Chunks claimed at a time: neighbours are adjacent in memory, so one thread reads on.
    step: usize,
    next: AtomicUsize,
    finished: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Chunks<'a> {
    fn new(threads: usize, count: usize, work: &'a (dyn Fn(usize) + Sync)) -> Self {
        let step = (count / (16 * threads)).clamp(1, 8);
        Self { work, count, step, next: 0.into(), finished: 0.into(), panic: Mutex::default() }
    }

    /// Claims chunks until none are left; a late helper claims none and never touches `work`.
    fn drain(&self) {
        loop {
            let first = self.next.fetch_add(self.step, Ordering::Relaxed);
            if first >= self.count {
                return;
            }
            let claimed = first..self.count.min(first + self.step);
            let count = claimed.len();
            for i in claimed {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.work)(i))) {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            // Release: a thread that reads the count also reads what the chunks wrote.
            self.finished.fetch_add(count, Ordering::Release);
        }
    }

    /// Waits for the chunks that helpers have claimed.
    fn wait(&self) {
        let mut spins = 0u32;
        while self.finished.load(Ordering::Acquire) < self.count {
            spins += 1;
            if spins < 1000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        self.resume_panic();
    }

    fn resume_panic(&self) {
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

/// Like [`for_each`], with a result for every chunk, in the order of the chunks.
pub(crate) fn map<T: Send>(
    threads: usize, chunks: usize, work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<Option<T>> = Vec::new();
    results.resize_with(chunks, || None);
    let slots = Slots(results.as_mut_ptr());
    for_each(threads, chunks, |i| {
        // SAFETY: `i` is below `chunks`, and `for_each` hands every `i` to one thread only.
        unsafe { *slots.get(i) = Some(work(i)) }
    });
    results.into_iter().flatten().collect()
}

/// A base pointer to slots that threads fill, each a different one.
pub(crate) struct Slots<T>(pub *mut T);

// SAFETY: users write disjoint slots (stated where they do).
unsafe impl<T: Send> Sync for Slots<T> {}

impl<T> Slots<T> {
    /// The address of slot `i`.
    pub(crate) fn get(&self, i: usize) -> *mut T {
        self.0.wrapping_add(i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once_in_order_of_results() {
        for threads in [0, 1, 2, 5] {
            for chunks in [0, 1, 3, 1000] {
                assert_eq!(
                    map(threads, chunks, |i| i * i),
                    (0..chunks).map(|i| i * i).collect::<Vec<_>>()
                );
            }
        }
    }

    #[test]
    fn work_that_ends_before_a_helper_wakes_is_not_touched_again() {
        for round in 0..2000 {
            let squares: Vec<usize> = (0..8).map(|i| i + round).collect();
            assert_eq!(map(4, 8, |i| squares[i]), squares);
        }
    }

    #[test]
    fn a_panic_in_any_chunk_reaches_the_caller_after_all_chunks_ended() {
        let ran = AtomicUsize::new(0);
        let call = || {
            for_each(3, 64, |i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i != 40, "chunk {i}");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(call)).is_err());
        assert_eq!(ran.load(Ordering::Relaxed), 64);
    }
}
