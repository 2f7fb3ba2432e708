//! The rayon pools of this process.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::process;
use std::sync::{Arc, Mutex, TryLockError};

/// The pool of `helpers` threads of this process; `None` while another thread is making one.
///
/// A forked child inherits the pools without their threads and would wait forever, so pools are
/// keyed by the process; the child never joins its copies of the parent's. It does not wait for the
/// lock either: if a thread of the parent held it during the fork, the child's copy is never
/// unlocked.
pub(super) fn of(helpers: usize) -> Option<Arc<ThreadPool>> {
    type Pools = Vec<((u32, usize), Arc<ThreadPool>)>;
    static POOLS: Mutex<Pools> = Mutex::new(Vec::new());
    let mut pools = match POOLS.try_lock() {
        Ok(pools) => pools,
        Err(TryLockError::Poisoned(pools)) => pools.into_inner(),
        Err(TryLockError::WouldBlock) => return None,
    };
    let key = (process::id(), helpers);
    if let Some((_, pool)) = pools.iter().find(|(of, _)| *of == key) {
        return Some(Arc::clone(pool));
    }
    let name = |i| format!("sokd-{i}");
    // A process that may start no more threads does the work itself.
    let pool =
        Arc::new(ThreadPoolBuilder::new().num_threads(helpers).thread_name(name).build().ok()?);
    pools.push((key, Arc::clone(&pool)));
    Some(pool)
}
