//! Work on several threads, with the same bits whatever their number.
//!
//! A job is cut into chunks whose borders depend on the shapes alone; threads take chunks as they come, each chunk writes its own
//! output, and whatever is reduced is reduced afterwards in the order of the chunks. The threads are OpenMP's where PyTorch has brought
//! them, a rayon pool's otherwise.

mod openmp;
mod pool;

#[cfg(feature = "python")]
pub(crate) use openmp::remember_process;
use std::any::Any;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Runs `work(i)` for every `i` below `chunks` on at most `threads` threads, the calling one included.
///
/// The calling thread begins at once and returns when every chunk is done, not when every helper has woken up: for a small job that
/// takes longer than the job.
pub(crate) fn for_each(threads: usize, chunks: usize, work: impl Fn(usize) + Sync) {
    let helpers = threads.min(chunks).saturating_sub(1);
    if helpers == 0 {
        return (0..chunks).for_each(work);
    }
    let work: &(dyn Fn(usize) + Sync) = &work;
    if on_openmp(threads, chunks, work) {
        return;
    }
    // SAFETY: the lifetime is only forgotten, not outlived: `Job::drain` follows the reference for claimed chunks alone, and this
    // function does not return before every chunk has been claimed and finished.
    let work: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(work) };
    let job = Arc::new(Job::new(threads, chunks, work));
    if let Some(pool) = pool::of(helpers) {
        for _ in 0..helpers {
            let job = Arc::clone(&job);
            pool.spawn(move || job.drain());
        }
    }
    job.drain();
    job.wait();
}

/// The same on OpenMP's threads, if there are any. Always all of them: a team of another size would have to be made anew.
fn on_openmp(threads: usize, chunks: usize, work: &(dyn Fn(usize) + Sync)) -> bool {
    let job = Job::new(threads, chunks, work);
    let done = openmp::run(threads, &|| job.drain());
    if done {
        job.resume_panic();
    }
    done
}

struct Job<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    chunks: usize,
    /// Chunks that are claimed at a time: neighbours are neighbours in memory, and one thread does well to read on.
    step: usize,
    next: AtomicUsize,
    finished: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl<'a> Job<'a> {
    fn new(threads: usize, chunks: usize, work: &'a (dyn Fn(usize) + Sync)) -> Self {
        let step = (chunks / (16 * threads)).clamp(1, 8);
        Self { work, chunks, step, next: 0.into(), finished: 0.into(), panic: Mutex::default() }
    }

    /// Claims chunks until there are none; a helper that comes too late claims none and never touches `work`.
    fn drain(&self) {
        loop {
            let first = self.next.fetch_add(self.step, Ordering::Relaxed);
            if first >= self.chunks {
                return;
            }
            let claimed = first..self.chunks.min(first + self.step);
            let count = claimed.len();
            for i in claimed {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.work)(i))) {
                    *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                }
            }
            // Release: what the chunks wrote is seen by whoever sees the count.
            self.finished.fetch_add(count, Ordering::Release);
        }
    }

    /// Waits for the chunks that helpers have claimed, which take no longer than one of the caller's own.
    fn wait(&self) {
        let mut spins = 0u32;
        while self.finished.load(Ordering::Acquire) < self.chunks {
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
    threads: usize,
    chunks: usize,
    work: impl Fn(usize) -> T + Sync,
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

/// A base pointer to slots that threads fill, each its own.
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
    fn jobs_that_end_before_a_helper_wakes_are_not_touched_again() {
        for round in 0..2000 {
            let squares: Vec<usize> = (0..8).map(|i| i + round).collect();
            assert_eq!(map(4, 8, |i| squares[i]), squares);
        }
    }

    #[test]
    fn a_panic_in_any_chunk_reaches_the_caller_after_all_chunks_ended() {
        let ran = AtomicUsize::new(0);
        let job = || {
            for_each(3, 64, |i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i != 40, "chunk {i}");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(job)).is_err());
        assert_eq!(ran.load(Ordering::Relaxed), 64);
    }
}
